"""A Docker engine for the tests: the one that runs here, or one of their own."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

TOKEN = f"vit-test-{secrets.token_hex(3)}"  # label, network and project of everything made here


@dataclass(frozen=True)
class Engine:
    """`docker` with where it connects to."""

    docker: str
    env: Mapping[str, str] = field(default_factory=dict)

    def __call__(
        self, *words: object, seconds: float = 120, check: bool = True, **more: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of it; both outputs are kept as text."""
        return run([self.docker, *words], {**os.environ, **self.env}, seconds, check, **more)

    def inspect(self, name: str) -> Any:
        return json.loads(self("inspect", name).stdout)[0]

    def size(self, image: str) -> float:
        """Of an image, in MB (10⁶ bytes)."""
        return int(self.inspect(image)["Size"]) / 1e6


def run(
    command: list[object], env: Mapping[str, str], seconds: float, check: bool, **more: Any
) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
    done = subprocess.run(words, env=env, text=True, timeout=seconds, check=False, **pipes)
    if check and done.returncode:
        pytest.fail(f"{' '.join(words)}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


@contextlib.contextmanager
def engine() -> Iterator[Engine]:
    """The one that runs; else, for root, a new one that is gone afterwards with all it made."""
    running = Engine(shutil.which("docker") or "docker", {"DOCKER_BUILDKIT": "1"})
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        if running("info", check=False, seconds=20).returncode == 0:
            try:
                yield running
            finally:
                _remove(running)
            return
    daemon = shutil.which("dockerd", path=f"{os.environ['PATH']}:/usr/sbin")
    if daemon is None or os.getuid() != 0:
        pytest.exit(
            "make containers needs a Docker engine: start yours; or let it start one of its own, "
            "as root, on Debian after "
            "`apt-get install docker.io docker-compose runc iptables mmdebstrap`",
            returncode=1,
        )
    # Debian's, and not a newer client that lacks its plugins.
    docker = Path("/usr/bin/docker") if Path("/usr/bin/docker").exists() else running.docker
    folder = Path(tempfile.mkdtemp(prefix="vit-dockerd-"))
    try:
        with _daemon(daemon, folder):
            own = {"DOCKER_HOST": f"unix://{folder}/socket", "DOCKER_BUILDKIT": "1"}
            yield Engine(str(docker), own)
    finally:
        _delete(folder)


@contextlib.contextmanager
def _daemon(daemon: str, folder: Path) -> Iterator[None]:
    command = [daemon, "--data-root", folder / "data", "--exec-root", folder / "exec"]
    command += ["--host", f"unix://{folder}/socket", "--pidfile", folder / "pid"]
    # No rules in this machine's firewall, no bridge: networks are made where they are needed.
    command += ["--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-masq=false"]
    # A session of its own: Ctrl-C is for the tests, which then clear up with it.
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(
            [str(word) for word in command], stdout=log, stderr=log, start_new_session=True
        ) as process,
    ):
        try:
            while not (folder / "socket").exists():
                if process.poll() is not None:
                    pytest.exit(f"dockerd ended: {(folder / 'log').read_text()[-2000:]}", 1)
                time.sleep(0.1)
            own = Engine("/usr/bin/docker", {"DOCKER_HOST": f"unix://{folder}/socket"})
            while own("info", check=False).returncode:
                time.sleep(0.2)
            yield
            _remove(own)
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _remove(own: Engine) -> None:
    """Containers, volumes and networks that the tests have made; images too."""
    for kind, command in (("container", "rm -f -v"), ("volume", "rm -f"), ("network", "rm")):
        every = ["--all"] if kind == "container" else []
        label = ["--filter", f"label={TOKEN}", "--quiet"]
        for name in own(kind, "ls", *every, *label, check=False).stdout.split():
            own(kind, *command.split(), name, check=False)
    for image in own("images", "--filter", f"label={TOKEN}", "--quiet", check=False).stdout.split():
        own("rmi", "--force", image, check=False)


def _delete(folder: Path) -> None:
    """What dockerd has mounted in its folders first."""
    for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
        if (mounted := line.split()[1]).startswith(f"{folder}/"):
            subprocess.run(["umount", "--lazy", mounted], check=False, capture_output=True)
    shutil.rmtree(folder, ignore_errors=True)

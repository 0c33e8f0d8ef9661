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
NO_ENGINE = (
    "make containers needs a Docker engine that builds: start yours; or let it start one of its "
    "own, as root, on Debian after "
    "`apt-get install docker.io docker-compose runc iptables mmdebstrap`"
)


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


def client() -> str:
    """A `docker` that can build: the first one on the PATH may lack its plugin for that."""
    for name in ("docker", "/usr/bin/docker"):
        if path := shutil.which(name):
            old = " 20." in run([path, "--version"], os.environ, 20, check=True).stdout
            if old or run([path, "buildx", "version"], os.environ, 20, check=False).returncode == 0:
                return path
    pytest.exit(NO_ENGINE, 1)


@contextlib.contextmanager
def engine() -> Iterator[Engine]:
    """The one that runs; else, for root, a new one that is gone afterwards with all it made."""
    docker = client()
    running = Engine(docker, {"DOCKER_BUILDKIT": "1"})
    if running("info", check=False, seconds=20).returncode == 0:
        print("\nThe images are built by the Docker engine that runs here", flush=True)
        try:
            yield running
        finally:
            _remove(running)
        return
    daemon = shutil.which("dockerd", path=f"{os.environ['PATH']}:/usr/sbin")
    if daemon is None or os.getuid() != 0:
        pytest.exit(NO_ENGINE, 1)
    print("\nNo Docker engine runs here: starting one for the tests …", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="vit-dockerd-"))
    own = Engine(docker, {"DOCKER_HOST": f"unix://{folder}/socket", "DOCKER_BUILDKIT": "1"})
    try:
        with _daemon(daemon, folder, own):
            yield own
    finally:
        _delete(folder)


@contextlib.contextmanager
def _daemon(daemon: str, folder: Path, own: Engine) -> Iterator[None]:
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
            while own("info", check=False).returncode:
                if process.poll() is not None:
                    log.flush()
                    pytest.exit(f"dockerd ended: {(folder / 'log').read_text()[-2000:]}", 1)
                time.sleep(0.1)
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
        for label in (TOKEN, f"com.docker.compose.project={TOKEN}"):
            filtered = ("--filter", f"label={label}", "--quiet")
            for name in own(kind, "ls", *every, *filtered, check=False).stdout.split():
                own(kind, *command.split(), name, check=False)
    for image in own("images", "--filter", f"label={TOKEN}", "--quiet", check=False).stdout.split():
        own("rmi", "--force", image, check=False)


def _delete(folder: Path) -> None:
    """What dockerd has mounted in its folders first."""
    for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
        if (mounted := line.split()[1]).startswith(f"{folder}/"):
            subprocess.run(["umount", "--lazy", mounted], check=False, capture_output=True)
    shutil.rmtree(folder, ignore_errors=True)

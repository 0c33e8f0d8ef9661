"""What runs in the containers, on this machine: docker/serve.sh around the wheel's tritonserver."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ports import free_ports, front, wait_for
from vit_server import tritonserver

DOCKER = Path(__file__).parents[2] / "docker"


@dataclass(frozen=True)
class Container:
    """A running serve.sh with its tritonserver."""

    process: subprocess.Popen[bytes]
    http_url: str
    metrics_url: str

    def stubs(self, model: str) -> list[int]:
        """The processes of a Python model."""
        lines = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in _children(self.triton)}
        found = [pid for pid, line in lines.items() if f"/models/{model}/1/" in line]
        assert found
        return found

    @property
    def triton(self) -> int:
        for pid in _children(self.process.pid):  # and a `sleep`
            with contextlib.suppress(FileNotFoundError):
                if Path(f"/proc/{pid}/exe").readlink().name == "tritonserver":
                    return pid
        raise AssertionError("no tritonserver")

    def kill_front(self) -> None:
        """End what passes HTTP on."""
        for pid in _children(self.process.pid):
            if "front.py" in Path(f"/proc/{pid}/cmdline").read_text():
                os.kill(pid, signal.SIGKILL)

    def kill_stub(self, model: str) -> None:
        """End the processes of a Python model, and let nobody notice."""
        self.process.send_signal(signal.SIGSTOP)
        for stub in self.stubs(model):
            os.kill(stub, signal.SIGKILL)


def _children(pid: int) -> list[int]:
    files = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in files for child in file.read_text().split()]


@contextlib.contextmanager
def container(
    repository: Path, metrics: int | None = None, **variables: str
) -> Iterator[Container]:
    """Start it on free ports, with these environment variables added; stop it at the end."""
    installation = tritonserver.find()
    http, grpc, free = free_ports(3)
    metrics = metrics or free
    with tempfile.TemporaryDirectory(prefix="container-") as backends:
        python = shutil.copytree(installation.python_backend, Path(backends, "python"))
        shutil.copy(installation.stub, python)
        shutil.copytree(tritonserver.OUR_BACKENDS / "pytorch", Path(backends, "pytorch"))
        env = tritonserver.environment(installation)
        env["PATH"] = f"{installation.binary.parent}:{env['PATH']}"
        env["MODEL_REPOSITORY"] = str(repository)
        env |= front(http, metrics)
        command = [DOCKER / "serve.sh", f"--backend-directory={backends}"]
        command += ["--grpc-address=127.0.0.1", f"--grpc-port={grpc}", "--log-info=false"]
        with subprocess.Popen(command, env={**env, **variables}, start_new_session=True) as process:
            url = f"http://127.0.0.1:{http}"
            try:
                wait_for(f"{url}/v2/health/ready", process)
                yield Container(process, url, f"http://127.0.0.1:{metrics}/metrics")
            finally:
                # All of them; where a stub has died, tritonserver's own way takes 30 s.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait(60)
                for segment in Path("/dev/shm").glob(f"vit-{process.pid}-*"):
                    segment.unlink()


def copy(repository: Path, folder: Path) -> Path:
    """A repository to change."""
    return Path(shutil.copytree(repository, folder / "models"))


def health(url: str) -> tuple[int, str]:
    """docker/health.py's exit code and what it said, by a Python that has nothing installed."""
    command = [sys.executable, "-I", "-S", DOCKER / "health.py", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout + done.stderr


def post(url: str, body: bytes) -> int:
    """The status of a request whose body is an image file."""
    header = {"Inference-Header-Content-Length": "0"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, header), timeout=60) as done:
            status: int = done.status
            return status
    except urllib.error.HTTPError as e:
        return e.code

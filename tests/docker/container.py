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

from prometheus import free_port, wait_for
from vit_server import tritonserver

DOCKER = Path(__file__).parents[2] / "docker"


@dataclass(frozen=True)
class Container:
    """A running tritonserver, with nothing around it that watches its models."""

    process: subprocess.Popen[bytes]
    http_url: str
    metrics_url: str

    def kill_stub(self, model: str) -> None:
        """End the processes of a Python model."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        lines = {int(child): Path(f"/proc/{child}/cmdline").read_text() for child in children}
        stubs = [child for child, line in lines.items() if f"/models/{model}/1/" in line]
        assert stubs
        for stub in stubs:
            os.kill(stub, signal.SIGKILL)


@contextlib.contextmanager
def container(repository: Path, **variables: str) -> Iterator[Container]:
    """Start it on free ports, with these environment variables added; stop it at the end."""
    installation = tritonserver.find()
    http, grpc, metrics = free_port(), free_port(), free_port()
    prefix = f"container_{os.getpid()}_"
    with tempfile.TemporaryDirectory(prefix="container-") as backends:
        python = shutil.copytree(installation.python_backend, Path(backends, "python"))
        shutil.copy(installation.stub, python)
        shutil.copytree(tritonserver.OUR_BACKENDS / "pytorch", Path(backends, "pytorch"))
        env = tritonserver.environment(installation)
        env["PATH"] = f"{installation.binary.parent}:{env['PATH']}"
        env["MODEL_REPOSITORY"] = str(repository)
        command = [DOCKER / "serve.sh", f"--backend-directory={backends}"]
        command += ["--http-address=127.0.0.1", "--grpc-address=127.0.0.1", f"--grpc-port={grpc}"]
        command += [f"--http-port={http}", f"--metrics-port={metrics}", "--log-info=false"]
        command += [f"--backend-config=python,shm-region-prefix-name={prefix}"]
        with subprocess.Popen(command, env={**env, **variables}) as process:
            url = f"http://127.0.0.1:{http}"
            try:
                wait_for(f"{url}/v2/health/ready", process)
                yield Container(process, url, f"http://127.0.0.1:{metrics}/metrics")
            finally:
                process.kill()  # where a stub has died, its own way takes 30 s
                process.wait(60)
                for segment in Path("/dev/shm").glob(f"{prefix}*"):
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

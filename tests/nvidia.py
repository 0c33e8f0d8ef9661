"""A stand-in for NVIDIA's image: the wheel's tritonserver in the same layout.

Its `pytorch` is the Python-based backend; theirs is the C++ one.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from conftest import Server, serving
from ports import wait_for
from processes import model_processes
from vit_server import installation

from bench.ports import free_ports

DOCKER = Path(__file__).parents[1] / "docker"


@contextlib.contextmanager
def nvidia() -> Iterator[tuple[Path, dict[str, str]]]:
    """A folder like /opt/tritonserver, and the environment variables that the image sets."""
    wheel = installation.find()
    with tempfile.TemporaryDirectory(prefix="tritonserver-") as name:
        folder = Path(name)
        (folder / "bin").mkdir()
        (folder / "bin" / "tritonserver").symlink_to(wheel.binary)
        installation.prepare(wheel, folder)
        env = installation.environment(wheel)
        yield folder, {name: env[name] for name in ("LD_LIBRARY_PATH", "PATH")}


@contextlib.contextmanager
def container(repository: Path, *arguments: str, **variables: str) -> Iterator[Server]:
    """vit-server with that tritonserver, and these environment variables added."""
    with nvidia() as (folder, env):
        under = ["env", *(f"{name}={value}" for name, value in {**env, **variables}.items())]
        options = ["--tritonserver", str(folder), *arguments]
        with serving(repository, *options, errors=True, under=under) as server:
            yield server


@dataclass(frozen=True)
class Triton:
    """A tritonserver without a supervisor."""

    process: subprocess.Popen[bytes]
    grpc_url: str
    http_url: str
    metrics_url: str

    def kill_stub(self, model: str) -> None:
        """Kill the processes of a Python model; Triton does not restart them."""
        stubs = model_processes(self.process.pid, model)
        assert stubs
        for stub in stubs:
            os.kill(stub, signal.SIGKILL)


@contextlib.contextmanager
def plain_triton(repository: Path, metrics: int | None = None) -> Iterator[Triton]:
    """`tritonserver --model-repository …`, as in a user's own Triton deployment."""
    http, grpc, free = free_ports(3)
    metrics = metrics or free
    segments = f"plain_{os.getpid()}_{grpc}_"
    with nvidia() as (folder, env):
        command = [folder / "bin" / "tritonserver", f"--model-repository={repository}"]
        command += [f"--backend-directory={folder / 'backends'}", "--log-info=false"]
        command += [f"--grpc-port={grpc}", f"--http-port={http}", f"--metrics-port={metrics}"]
        command += [f"--backend-config=python,shm-region-prefix-name={segments}"]
        env = {**os.environ, **env, "VIT_METRICS": f"127.0.0.1:{metrics}"}
        with subprocess.Popen(command, env=env, start_new_session=True) as process:
            url = f"http://127.0.0.1:{http}"
            try:
                wait_for(f"{url}/v2/health/ready", process)
                metrics_url = f"http://127.0.0.1:{metrics}/metrics"
                yield Triton(process, f"127.0.0.1:{grpc}", url, metrics_url)
            finally:
                # The whole group; once a stub has died, a graceful shutdown takes 30 s.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait(60)
                for segment in Path("/dev/shm").glob(f"{segments}*"):
                    segment.unlink()


def health(url: str, *options: str) -> tuple[int, str]:
    """Exit code and output of docker/health.py, run without site-packages."""
    command = [sys.executable, "-I", "-S", DOCKER / "health.py", *options, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout + done.stderr


def status(url: str, body: bytes | None = None, **headers: str) -> int:
    """The HTTP status of a GET, or of a POST if there is a body."""
    request = urllib.request.Request(url, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            code: int = response.status
            return code
    except urllib.error.HTTPError as e:
        return e.code


def post(url: str, body: bytes) -> int:
    """The HTTP status of an inference request whose body is an image file."""
    return status(url, body, **{"Inference-Header-Content-Length": "0"})

"""Real servers for the tests: a tiny model for behaviour, the full-size one for numbers."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import vit_builder
from tritonclient.grpc import service_pb2_grpc

TESTS = Path(__file__).parent
GOLDENS = TESTS / "goldens"
PHOTOS = TESTS.parent / "photos"
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Server:
    """A running vit-server."""

    process: subprocess.Popen[str]
    url: str  # gRPC, host:port
    http_url: str
    metrics_url: str
    repository: Path

    @property
    def stub(self) -> service_pb2_grpc.GRPCInferenceServiceStub:
        """Raw gRPC, to say what the SDK would not."""
        limits = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        return service_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(self.url, limits))


@contextlib.contextmanager
def serving(repository: Path, *arguments: str) -> Iterator[Server]:
    """Start vit-server as a user would, on free ports; stop it at the end."""
    ports = ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"]
    command = [BIN / "vit-server", "--model-repository", repository, *ports, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            said = {}
            for line in process.stdout or ():
                name, _, rest = line.strip().partition(" ")
                said[name] = rest.strip()
                if name == "Ready:":
                    break
            else:
                pytest.fail(f"vit-server ended with exit code {process.wait()}")
            yield Server(process, said["gRPC"], said["HTTP"], said["metrics"], repository)
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture(scope="session")
def tiny_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny golden model (64 px, 12 classes, 64 dimensions) in fp32, batches to 16."""
    folder = tmp_path_factory.mktemp("tiny") / "models"
    settings = vit_builder.Settings(precision="fp32", max_batch_size=16, top_k=12)
    vit_builder.build(vit_builder.load(GOLDENS / "tiny.pt"), settings, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_server(tiny_repository: Path) -> Iterator[Server]:
    with serving(tiny_repository) as server:
        yield server


@pytest.fixture(scope="session")
def full_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The full-size network with made weights, in fp32, batches to 4."""
    folder = tmp_path_factory.mktemp("full") / "models"
    settings = vit_builder.Settings(precision="fp32", max_batch_size=4, top_k=100)
    vit_builder.build(vit_builder.random(), settings, folder)
    return folder


@pytest.fixture(scope="session")
def full_server(full_repository: Path) -> Iterator[Server]:
    with serving(full_repository) as server:
        yield server

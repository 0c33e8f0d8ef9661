"""Real servers for the tests: a tiny model for behaviour, the full-size one for numerics."""

import contextlib
import importlib
import io
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import vit_builder
from PIL import Image
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import np_to_triton_dtype

TESTS = Path(__file__).parent
GOLDENS = TESTS / "goldens"
PHOTOS = TESTS.parent / "photos"
PREPROCESS = TESTS.parent / "model_repository" / "preprocess" / "1"
BIN = Path(sys.executable).parent
# Minutes each: they begin first, so that none is what the others wait for in the end.
LONG = {
    *("test_server", "test_containers", "test_wheels", "test_versions", "test_readme", "test_int8"),
    *("test_monitoring", "test_scale_out", "test_bodies", "test_shutdown", "test_poison"),
    *("test_updates", "test_overload", "test_stall", "test_soak", "test_edge"),
}
Array = npt.NDArray[Any]
Rows = list[bytes] | Array


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONG)


def golden_image(name: str) -> Path:
    """The image file of a golden; photos are those that ship with the project."""
    photo = name.removeprefix("photo-")
    return PHOTOS / photo if photo != name else GOLDENS / "images" / name


def png(pixels: Array) -> bytes:
    """uint8 [H, W, 3] as a lossless file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@dataclass(frozen=True)
class Server:
    """A running vit-server."""

    process: subprocess.Popen[str]
    url: str  # gRPC, host:port
    http_url: str
    metrics_url: str
    repository: Path

    def infer(
        self, model: str, name: str, rows: Rows, datatype: str = "", outputs: Sequence[str] = ()
    ) -> dict[str, Array]:
        """One request with Triton's own client, for requests that the SDK would not send.

        Args:
            rows: images as bytes, one per row, or an array that is sent unchanged.
            outputs: the requested outputs; all by default.

        Raises:
            InferenceServerException: the server returned an error.
        """
        if isinstance(rows, list):
            rows = np.array(rows, np.object_).reshape(-1, 1)
        tensor = InferInput(name, rows.shape, datatype or np_to_triton_dtype(rows.dtype))
        tensor.set_data_from_numpy(rows)
        with InferenceServerClient(self.url) as client:
            wanted = [InferRequestedOutput(output) for output in outputs] or None
            result = client.infer(model, [tensor], outputs=wanted, client_timeout=120)
        return {out.name: result.as_numpy(out.name) for out in result.get_response().outputs}


@pytest.fixture(scope="session")
def cache(request: pytest.FixtureRequest) -> Path:
    """Where Debian's package of Prometheus is kept, for the next run."""
    return Path(request.config.cache.mkdir("prometheus"))


@pytest.fixture(scope="session")
def decoding() -> ModuleType:
    """model_repository/preprocess/1/decode.py."""
    sys.path.append(str(PREPROCESS))  # as Triton does
    return importlib.import_module("decode")


@contextlib.contextmanager
def serving(
    repository: Path,
    *arguments: str,
    errors: bool = False,
    under: Sequence[str] = (),
    bin: Path = BIN,
) -> Iterator[Server]:
    """Start vit-server as a user would, on free ports; stop it at the end.

    Args:
        errors: whether the caller reads `process.stderr`.
        under: a wrapper command that runs the command appended to it.
        bin: the folder of vit-server.
    """
    ports = ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"]
    command = [*under, bin / "vit-server", "--model-repository", repository, *ports, *arguments]
    stderr = subprocess.PIPE if errors else None
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process:
        try:
            said = {}
            for line in process.stdout or ():
                name, _, rest = line.strip().partition(" ")
                said[name] = rest.strip()
                if name == "Ready:":
                    break
            else:
                reason = process.stderr.read() if process.stderr else ""
                pytest.fail(f"vit-server exited with code {process.wait()}: {reason}")
            yield Server(process, said["gRPC"], said["HTTP"], said["metrics"], repository)
        finally:
            process.terminate()
            process.wait(60)


def copy(repository: Path, folder: Path) -> Path:
    """A copy of a repository, to modify."""
    return Path(shutil.copytree(repository, folder / "models"))


def builder(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run vit-builder as a user would."""
    command = [BIN / "vit-builder", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def reloaded(module: torch.jit.ScriptModule, map_location: str = "cpu") -> torch.jit.ScriptModule:
    """The module saved and loaded, as it is served: loading packs the weights."""
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer, map_location)


def built(repository: Path, model: str, name: str = "") -> Path:
    """The version folder of a model, or a file in it."""
    (folder,) = (path for path in (repository / model).iterdir() if path.is_dir())
    return folder / name


def at_each_batch(repository: Path, folder: Path, *lines: str) -> Path:
    """A copy whose `preprocess` runs these lines before each batch, with `os` and `time`."""
    changed = copy(repository, folder)
    code = built(changed, "preprocess", "model.py")
    before = "        self.backlog.wait()\n"
    assert before in code.read_text()
    added = "".join(f"        {line}\n" for line in lines)
    text = code.read_text().replace(before, before + added)
    code.write_text(f"import os\nimport time\n{text}")
    return changed


def start_and_fail(repository: Path, *arguments: str, under: Sequence[str] = ()) -> str:
    """The one-line error of a vit-server that must not start."""
    command = [*under, BIN / "vit-server", "--model-repository", repository, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1
    assert "Ready" not in result.stdout
    assert "Traceback" not in result.stderr
    sentences = result.stderr.removeprefix("Starting tritonserver …\n").splitlines()
    assert len(sentences) == 1, result.stderr
    return sentences[0]


@pytest.fixture(scope="session")
def tiny_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny golden model (64 px, 12 classes, 64 dimensions) in fp32, batches up to 16."""
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
    """The full-size network with random weights, in fp32, batches up to 4."""
    folder = tmp_path_factory.mktemp("full") / "models"
    settings = vit_builder.Settings(precision="fp32", max_batch_size=4, top_k=100)
    vit_builder.build(vit_builder.random(), settings, folder)
    return folder


@pytest.fixture(scope="session")
def full_server(full_repository: Path) -> Iterator[Server]:
    with serving(full_repository) as server:
        yield server

"""Real servers for the tests: a tiny model for behaviour, the full-size one for numbers."""

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
Array = npt.NDArray[Any]
Rows = list[bytes] | Array


def golden_image(name: str) -> Path:
    """The file that a golden is about; the photos are those that ship with the project."""
    photo = name.removeprefix("photo-")
    return PHOTOS / photo if photo != name else GOLDENS / "images" / name


def png(pixels: Array) -> bytes:
    """uint8 [H, W, 3] as a file that loses nothing."""
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
        """One request with Triton's own client, to say what the SDK would not.

        Args:
            rows: images as bytes, one a row, or an array that is sent as it is.
            outputs: those that are asked for; all, if there are none.

        Raises:
            InferenceServerException: what the server said.
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
        errors: whether `process.stderr` is to be read.
        under: a command that ends by running what follows it.
        bin: where vit-server is.
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
                pytest.fail(f"vit-server exited with code {process.wait()}")
            yield Server(process, said["gRPC"], said["HTTP"], said["metrics"], repository)
        finally:
            process.terminate()
            process.wait(60)


def copy(repository: Path, folder: Path) -> Path:
    """A repository to change."""
    return Path(shutil.copytree(repository, folder / "models"))


def builder(*arguments: object) -> subprocess.CompletedProcess[str]:
    """vit-builder, as a user would call it."""
    command = [BIN / "vit-builder", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def reloaded(module: torch.jit.ScriptModule, map_location: str = "cpu") -> torch.jit.ScriptModule:
    """As it is served: weights are packed on loading."""
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer, map_location)


def built(repository: Path, model: str, name: str = "") -> Path:
    """The version folder of a model, or a file in it."""
    (folder,) = (path for path in (repository / model).iterdir() if path.is_dir())
    return folder / name


def at_each_batch(repository: Path, folder: Path, *lines: str) -> Path:
    """A copy whose `preprocess` runs these lines before each batch; it has `os` and `time`."""
    changed = copy(repository, folder)
    code = built(changed, "preprocess", "model.py")
    before = "        self.backlog.wait()\n"
    assert before in code.read_text()
    added = "".join(f"        {line}\n" for line in lines)
    text = code.read_text().replace(before, before + added)
    code.write_text(f"import os\nimport time\n{text}")
    return changed


def start_and_fail(repository: Path, *arguments: str, under: Sequence[str] = ()) -> str:
    """The one sentence of vit-server where it must not start."""
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

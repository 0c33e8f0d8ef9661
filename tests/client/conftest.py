"""Clients of the tiny model, and test images."""

import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from vit_client import Client

from .proxy import Proxy, proxying

Pixels = npt.NDArray[np.uint8]


@pytest.fixture(scope="session")
def url(tiny_server: Any) -> str:
    """The gRPC address of the tiny model."""
    return str(tiny_server.url)


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url) as client:
        yield client


def pixels(seed: int, height: int = 64, width: int = 64) -> Pixels:
    """Noise, different for each seed."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def encoded(seed: int, kind: str = "PNG") -> bytes:
    """An image file, different for each seed."""
    file = io.BytesIO()
    Image.fromarray(pixels(seed)).save(file, kind)
    return file.getvalue()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of 20 images."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(20):
        (folder / f"{seed:02}.png").write_bytes(encoded(seed))
    return folder


def open_to_all(folder: Path) -> None:
    """Make the folder accessible to other users."""
    for each in (folder, *folder.parents):
        if each == Path(tempfile.gettempdir()):
            return
        each.chmod(0o755)


def images_seen(url: str, model: str) -> int:
    """Images that the model has processed, from Triton's statistics."""
    from tritonclient.grpc import InferenceServerClient  # not in test_versions' environments

    with InferenceServerClient(url) as triton:
        statistics = triton.get_inference_statistics(model)
    return int(statistics.model_stats[0].inference_count)


@pytest.fixture
def proxy(url: str) -> Iterator[Proxy]:
    """A proxy in front of the tiny model."""
    with proxying(url) as proxy:
        yield proxy

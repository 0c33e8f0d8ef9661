"""The same model file and preprocessing for all servers in the comparison."""

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import vit_builder
from PIL import Image
from vit_builder.export import ServedViT
from vit_builder.model import ViTConfig
from vit_builder.repository import model_file

Pixels = npt.NDArray[np.uint8]
CORES = len(os.sched_getaffinity(0))
MAX_BATCH = 16


class Served:
    """model.pt of a built repository, as a user would call it from Python."""

    def __init__(self, repository: Path) -> None:
        self.size = sizes(repository).image_size
        self.module = torch.jit.load(str(model_file(repository))).eval()  # type: ignore[no-untyped-call]
        for batch in (1, 2, 4, 8, MAX_BATCH):  # the first runs are slow
            self.embed([np.zeros((*self.size, 3), np.uint8)] * batch)

    @torch.inference_mode()
    def embed(self, pixels: Sequence[Pixels]) -> npt.NDArray[np.float32]:
        """Return the embeddings [N, D] of N images."""
        # As in the server: the profiling executor would specialise on each batch size.
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            embedding = self.module(torch.from_numpy(np.stack(pixels)))[1]
        result: npt.NDArray[np.float32] = embedding.numpy()
        return result


def decode(data: bytes, size: tuple[int, int]) -> Pixels:
    """Return the same pixels as the model `preprocess`, by Pillow alone."""
    with Image.open(io.BytesIO(data)) as image:
        rgb = image.convert("RGB").resize((size[1], size[0]), Image.Resampling.BICUBIC)
        return np.asarray(rgb)


def sizes(repository: Path) -> ViTConfig:
    """Return the sizes of the built network."""
    network: dict[str, Any] = _report(repository)["network"]
    return ViTConfig(**{**network, "image_size": tuple(network["image_size"])})


def precision(repository: Path) -> str:
    """Return the precision of model.pt: fp32, bf16, fp16 or int8."""
    name: str = _report(repository)["precision"]
    return name


def eager(repository: Path) -> ServedViT:
    """Return the same network in fp32, not traced, with random weights, which cost the same."""
    checkpoint = vit_builder.random(sizes(repository))
    top_k = _report(repository)["top_k"]
    return ServedViT(checkpoint.network(), checkpoint, "fp32", top_k).eval()


def _report(repository: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((repository / "build_report.json").read_text())
    return report

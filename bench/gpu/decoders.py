"""JPEG decoders: images per second, and how far their pixels are from those of `preprocess`."""

import io
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.dlpack import from_dlpack
from vit_server import installation

from .bare import Run
from .device import Device, reason

sys.path.append(str(Path(__file__).parents[2] / "model_repository" / "preprocess" / "1"))
import decode as preprocess  # type: ignore[import-not-found]

Decode = Callable[[list[bytes]], list[Tensor]]  # whole images, uint8 [3, H, W] on the device
CORES = installation.cores()
PIXELS = 110_000_000  # decoded at once at most


class Decoders:
    """The installed decoders, each followed by torch's resize on the device, and `preprocess`."""

    def __init__(self, device: Device, size: tuple[int, int], files: list[bytes]) -> None:
        self.device, self.size, self.files = device, size, files
        self.pool = ThreadPoolExecutor(CORES)
        self.decode: dict[str, Decode] = {"Pillow, resized by torch": self._pillow_whole}
        self.missing: list[str] = []
        for name, make in {"torchvision": _torchvision, "nvImageCodec": _nvimgcodec}.items():
            try:
                decode = make(device)
                decode(files)
            except Exception as e:  # any failure: the others are still measured
                self.missing.append(f"{name}: {reason(e)}")
            else:
                self.decode[f"{name}, resized by torch"] = decode

    def preprocess(self, files: Sequence[bytes]) -> Tensor:
        """Decode by `preprocess` on all cores; return [N, H, W, 3]."""
        return by_preprocess(files, self.size, self.pool.map)

    def other(self, name: str, files: Sequence[bytes]) -> Tensor:
        """Decode by another decoder, on the device; return [N, H, W, 3]."""
        return torch.stack([self._resized(image) for image in self.decode[name](list(files))])

    def measure(self, run: Run, batch: int, seconds: float, rounds: int) -> dict[str, Any]:
        """Measure rates, interleaved, with `batch` files; then how the outputs of `run` differ."""
        many = list(itertools.islice(itertools.cycle(self.files), batch))
        ways: dict[str, Callable[[], Tensor]] = {
            f"preprocess, {CORES} cores": lambda: self.preprocess(many)
        }
        for name in self.decode:
            ways[name] = lambda name=name: self.other(name, many)  # type: ignore[misc]
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                rates[name].append(batch * self._per_second(way, seconds))
        expected = self.preprocess(self.files)
        differences = {
            name: _difference(self.other(name, self.files), expected.to(self.device.kind), run)
            for name in self.decode
        }
        return {"rates": rates, "differences": differences, "missing": self.missing}

    def _per_second(self, way: Callable[[], Tensor], seconds: float) -> float:
        """Return runs/s by the host's clock, as most of the work is there, after a warm-up run."""
        way()
        count, began = 0, time.perf_counter()
        while (took := time.perf_counter() - began) < seconds or not count:
            way()[0, 0, 0, 0].item()  # waits for the device
            count += 1
        return count / took

    def _pillow_whole(self, files: list[bytes]) -> list[Tensor]:
        def one(data: bytes) -> Tensor:
            with Image.open(io.BytesIO(data)) as image:
                return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)

        return [image.to(self.device.kind) for image in self.pool.map(one, files)]

    def _resized(self, image: Tensor) -> Tensor:
        """Resize with antialiasing, as Pillow's bicubic does when shrinking; return [H, W, 3]."""
        small = F.interpolate(image[None].float(), self.size, mode="bicubic", antialias=True)
        return small[0].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)


def by_preprocess(
    files: Sequence[bytes], size: tuple[int, int], apply: Callable[..., Iterable[Any]] = map
) -> Tensor:
    """Decode files with the code of `preprocess`; return [N, H, W, 3]."""
    room = preprocess.Room(PIXELS)

    def one(data: bytes) -> Any:
        return preprocess.decode(data, *size, room)

    return torch.from_numpy(np.stack(list(apply(one, files))))


def _difference(actual: Tensor, expected: Tensor, run: Run) -> dict[str, float]:
    """Return the differences of the pixels, in levels (0 to 255), and of the network's outputs, for
    the worst photo."""
    levels = (actual.int() - expected.int()).abs()
    ours, theirs = run(actual), run(expected)
    return {
        "mean level": float(levels.float().mean()),
        "highest level": float(levels.max()),
        "lowest embedding cosine": float(torch.cosine_similarity(ours[1], theirs[1]).min()),
        "top-1 agreement": float((ours[4][:, 0] == theirs[4][:, 0]).float().mean()),
    }


def _torchvision(device: Device) -> Decode:
    """Return torchvision's decoder: nvJPEG on a GPU."""
    from torchvision.io import ImageReadMode, decode_jpeg  # type: ignore[import-not-found]

    def decode(files: list[bytes]) -> list[Tensor]:
        data = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files]
        images: list[Tensor] = decode_jpeg(data, mode=ImageReadMode.RGB, device=device.kind)
        return images

    return decode


def _nvimgcodec(device: Device) -> Decode:
    from nvidia import nvimgcodec  # type: ignore[import-not-found]

    decoder = nvimgcodec.Decoder()
    params = nvimgcodec.DecodeParams(apply_exif_orientation=False)  # as Pillow

    def decode(files: list[bytes]) -> list[Tensor]:
        images = decoder.decode(files, params=params)
        if None in images:  # the decoder reports why on standard error
            raise RuntimeError("a photo was not decoded")
        tensors = [from_dlpack(image.to_dlpack()) for image in images]
        return [tensor.to(device.kind).permute(2, 0, 1) for tensor in tensors]

    return decode

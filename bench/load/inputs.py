"""perf_analyzer's input files, created from photos: `python -m bench.load.inputs --help`.

perf_analyzer sends the decoded base64 unchanged. The wire format of a STRING tensor has a 4-byte
length (little-endian) before each element, so the base64 must contain that length and then the
file; otherwise every request fails.
"""

import argparse
import base64
import io
import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PHOTOS = Path(__file__).parents[2] / "photos"


class NoPhotosError(Exception):
    """There are no photos to send; the message is for the user."""


def photos(path: Path) -> list[Path]:
    """Return the image files in a folder, or the one file.

    Raises:
        NoPhotosError: there is none.
    """
    suffixes = {".jpg", ".jpeg", ".png", ".webp"}
    found = (
        sorted(p for p in path.iterdir() if p.suffix.lower() in suffixes)
        if path.is_dir()
        else [path]
    )
    if not found or not all(p.is_file() for p in found):
        raise NoPhotosError(f"no photos at {path}")
    return found


def resized(photo: Path, megapixels: float) -> bytes:
    """Return the photo as a JPEG of about that many megapixels, with the same aspect ratio."""
    with Image.open(photo) as image:
        scale = math.sqrt(megapixels * 1e6 / (image.width * image.height))
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        file = io.BytesIO()
        image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_images(path: Path, files: Sequence[bytes], *, bare: bool = False) -> None:
    """Write requests with one encoded image each, which perf_analyzer sends in turn.

    Args:
        bare: leave the shape to the command line (`--shape image:1`).
    """
    elements = [base64.b64encode(struct.pack("<I", len(data)) + data).decode() for data in files]
    _write(path, [_tensor("image", element, None if bare else [1]) for element in elements])


def write_pixels(path: Path, paths: Sequence[Path], height: int, width: int) -> None:
    """Write requests for `vit` itself: each photo as `preprocess` would decode it."""
    rows = []
    for photo in paths:
        with Image.open(photo) as image:
            rgb = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        data = base64.b64encode(np.asarray(rgb).tobytes()).decode()
        rows.append(_tensor("pixels", data, [height, width, 3]))
    _write(path, rows)


def _tensor(name: str, b64: str, shape: list[int] | None) -> dict[str, Any]:
    content = {"b64": b64}
    return {name: content if shape is None else {"content": content, "shape": shape}}


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps({"data": rows}))


def main() -> None:
    """Write files for your own perf_analyzer commands; the load test writes its own."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.load.inputs",
        description="Write perf_analyzer's input files: your photos at several sizes, in both "
        "forms that it accepts.",
    )
    parser.add_argument("output", type=Path, metavar="DIR", help="folder for the files")
    parser.add_argument(
        "--photos",
        type=Path,
        default=PHOTOS,
        metavar="PATH",
        help="file or folder (default: photos/)",
    )
    args = parser.parse_args()
    try:
        paths = photos(args.photos)
    except NoPhotosError as e:
        parser.error(str(e))
    args.output.mkdir(parents=True, exist_ok=True)
    for megapixels in (0.05, 0.3, 2.0):
        files = [resized(photo, megapixels) for photo in paths]
        with_shape = args.output / f"{megapixels:g}mp.json"
        bare = args.output / f"{megapixels:g}mp-bare.json"
        write_images(with_shape, files)
        write_images(bare, files, bare=True)
        print(f"perf_analyzer -i grpc -m embed --input-data {with_shape}")
        print(f"perf_analyzer -i grpc -m embed --input-data {bare} --shape image:1")


if __name__ == "__main__":
    main()

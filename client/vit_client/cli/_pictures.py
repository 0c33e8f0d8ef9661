"""Decoding images and writing pictures, shared by `--picture` and `--sheet`."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from ..errors import ConfigurationError, shortened
from ._files import check_place, replacing
from ._inputs import STDIN

# The formats that the server opens (FORMATS in its preprocess/1/decode.py). For others Pillow may
# start programs, such as Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")


def decoded(file: str | BinaryIO, side: int = 0) -> Image.Image:
    """The pixels as the model sees them: RGB, alpha dropped, EXIF orientation ignored.

    Args:
        side: If given, a JPEG may be decoded smaller; its longest side stays at least 2 × `side`.

    Raises:
        Exception: Pillow raises nearly any.
    """
    Image.init()
    Image.MAX_IMAGE_PIXELS = None  # the server has a limit of its own
    formats = [name for name in Image.ID if name in _FORMATS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about dropped transparency and odd metadata
        with Image.open(file, formats=formats) as photo:
            if side:
                longest = max(photo.size)
                width, height = (max(1, 2 * side * each // longest) for each in photo.size)
                photo.draft(None, (width, height))
            rgb: Image.Image = photo.convert("RGB")
            return rgb


def check_picture(path: Path, names: Sequence[str], hint: str = "choose another name") -> None:
    """Like `check_place`; also raises ConfigurationError for a suffix that Pillow cannot write,
    and, with a `hint`, for a picture that would overwrite one of the images `names`."""
    check_place(path)
    try:
        Image.new("RGB", (8, 8)).save(io.BytesIO(), _format(path))
    except Exception:  # no such format, not in colour, or not in this Pillow
        text = f"{shortened(path)}: cannot write pictures of this kind; try .png"
        raise ConfigurationError(text) from None
    if not os.path.exists(path):  # noqa: PTH110
        return
    for name in names:
        if name != STDIN and os.path.exists(name) and path.samefile(name):  # noqa: PTH110
            what = "the image itself" if len(names) == 1 else "one of the images"
            raise ConfigurationError(f"{shortened(path)} is {what}: {hint}")


def write_picture(image: Image.Image, path: Path) -> None:
    """Write `image` atomically, in the format of the suffix."""
    with replacing(path) as temporary:
        image.save(temporary, _format(path))


def _format(path: Path) -> str:
    Image.init()
    return Image.EXTENSION.get(path.suffix.lower(), "")

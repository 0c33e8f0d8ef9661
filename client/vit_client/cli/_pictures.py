"""Images to look at, and files of pictures: what `--picture` and `--sheet` share."""

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

# What the server opens (FORMATS in its preprocess/1/decode.py). For others Pillow may start
# programs, such as Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")


def decoded(file: str | BinaryIO, side: int = 0) -> Image.Image:
    """The pixels as the model sees them: RGB without transparency, not turned as EXIF has it.

    Args:
        side: If given, a JPEG may come smaller, with a longest side of no less than twice that.

    Raises:
        Exception: Nearly any, from Pillow.
    """
    Image.init()
    Image.MAX_IMAGE_PIXELS = None  # the server has a limit of its own
    formats = [name for name in Image.ID if name in _FORMATS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transparency that is dropped, of odd metadata
        with Image.open(file, formats=formats) as photo:
            if side:
                longest = max(photo.size)
                width, height = (max(1, 2 * side * each // longest) for each in photo.size)
                photo.draft(None, (width, height))
            rgb: Image.Image = photo.convert("RGB")
            return rgb


def check_picture(path: Path, names: Sequence[str], hint: str = "choose another name") -> None:
    """As `check_place`; and a suffix that Pillow cannot write, or a picture that would take the
    place of one of the images `names`, is a ConfigurationError, the latter with a `hint`."""
    check_place(path)
    try:
        Image.new("RGB", (8, 8)).save(io.BytesIO(), _format(path))
    except Exception:  # no such format, or not in colour, or Pillow has no code for it
        text = f"{shortened(path)}: cannot write pictures of this kind; try .png"
        raise ConfigurationError(text) from None
    if not os.path.exists(path):  # noqa: PTH110
        return
    for name in names:
        if name != STDIN and os.path.exists(name) and path.samefile(name):  # noqa: PTH110
            what = "the image itself" if len(names) == 1 else "one of the images"
            raise ConfigurationError(f"{shortened(path)} is {what}: {hint}")


def write_picture(image: Image.Image, path: Path) -> None:
    """Write `image` in the format that the suffix names, whole or not at all."""
    with replacing(path) as temporary:
        image.save(temporary, _format(path))


def _format(path: Path) -> str:
    Image.init()
    return Image.EXTENSION.get(path.suffix.lower(), "")

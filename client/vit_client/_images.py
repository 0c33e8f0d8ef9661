"""Any image that a caller may hold, as the bytes of one encoded file."""

from __future__ import annotations

import io
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

    from .types import ImageLike

ENCODED = (bytes, bytearray, memoryview)

# PIL opens files lazily, and two threads must not load the same image at once. One of these locks
# is picked by the image's identity, so that different images still load side by side.
_LOCKS = [threading.Lock() for _ in range(16)]


class Unusable(Exception):
    """Why something is not an image, in a few words."""


class Refused(Unusable):
    """The same in the server's words."""


def is_one_image(value: Any) -> bool:
    """Whether `value` is one image rather than several: everything that is not a collection."""
    return (
        isinstance(value, (str, os.PathLike, np.ndarray, *ENCODED))
        or hasattr(value, "read")
        or not (hasattr(value, "__iter__") or hasattr(value, "__aiter__"))
    )


def name_of(image: ImageLike) -> str | None:
    """Path or file name, for messages; None for what has none."""
    if isinstance(image, (str, os.PathLike)):
        return os.fspath(image)
    # File objects have `name`, PIL images that came from a file have `filename`.
    name = getattr(image, "name", None) or getattr(image, "filename", None)
    return name if isinstance(name, str) else None


def encode(image: ImageLike, size: tuple[int, int]) -> bytes:
    """The image as an encoded file. Files and bytes pass unchanged, whatever their format.

    PIL images and arrays become PPM, which costs no more than a copy. They are first scaled to
    `size` (height, width) if that makes them smaller, just as the server would: it then finds
    nothing left to scale and ends up with the same pixels, bit for bit.

    Raises:
        Unusable: if there is no such file, or the value is no image.
    """
    if isinstance(image, ENCODED):
        data = bytes(image)
    elif isinstance(image, (str, os.PathLike)):
        data = _read(Path(image))
    elif isinstance(image, np.ndarray):
        data = _from_array(image, size)
    elif hasattr(image, "read"):
        data = _read_open(image)
    else:
        data = _from_pil(image, size)
    if not data:
        raise Unusable("is empty")
    return data


def _read(path: Path) -> bytes:
    try:
        if path.is_char_device():  # /dev/zero has no end
            raise Unusable("is a device, not a file")
        return path.read_bytes()
    except OSError as error:
        raise Unusable((error.strerror or str(error)).lower()) from None
    except ValueError as error:  # a NUL in the name
        raise Unusable(str(error)) from None


def _read_open(file: Any) -> bytes:
    if isinstance(file, io.TextIOBase):
        raise Unusable('is open as text; open it with "rb"')
    try:
        data = file.read()
    except (OSError, ValueError) as error:  # ValueError: the file is closed
        raise Unusable(str(error)) from None
    if not isinstance(data, bytes):
        raise Unusable('is open as text; open it with "rb"')
    return data


def _from_array(array: np.ndarray[Any, Any], size: tuple[int, int]) -> bytes:
    _check_array(array)
    height, width, _ = array.shape
    if _shrinks(height, width, size):
        from PIL import Image

        return _scaled(Image.fromarray(np.ascontiguousarray(array)), size)
    return _ppm(height, width, array.tobytes())


def _check_array(array: np.ndarray[Any, Any]) -> None:
    what = f"array of {array.dtype} {list(array.shape)} is not uint8 [height, width, 3]"
    if array.ndim == 4:
        raise Unusable(f"{what}: for a batch pass list(array)")
    if array.ndim == 2:
        raise Unusable(f"{what}: for grey pixels pass PIL.Image.fromarray(array)")
    if array.ndim != 3:
        raise Unusable(what)
    if array.shape[2] != 3:
        if array.shape[0] == 3:
            raise Unusable(f"{what}: put the channels last with array.transpose(1, 2, 0)")
        raise Unusable(what)
    if array.dtype != np.uint8:
        raise Unusable(f"{what}: scale it to 0…255 and convert with astype('uint8')")
    if array.size == 0:
        raise Unusable(f"{what}: it has no pixels")


def _from_pil(image: Any, size: tuple[int, int]) -> bytes:
    from PIL import Image

    if not isinstance(image, Image.Image):
        raise Unusable(
            f"{type(image).__name__} is not an image: give a path, bytes, a binary file, a PIL "
            "image or a uint8 array [height, width, 3]"
        )
    try:
        with _LOCKS[(id(image) >> 4) % len(_LOCKS)]:
            image.load()
            rgb = image if image.mode == "RGB" else image.convert("RGB")
            if _shrinks(rgb.height, rgb.width, size):
                return _scaled(rgb, size)
            return _ppm(rgb.height, rgb.width, rgb.tobytes())
    except Exception as error:  # a closed or broken file raises nearly anything in Pillow
        raise Unusable(f"it cannot be decoded: {str(error) or type(error).__name__}") from None


def _shrinks(height: int, width: int, size: tuple[int, int]) -> bool:
    """Whether an image is to be scaled here rather than by the server."""
    return height * width > size[0] * size[1]


def _scaled(image: Image.Image, size: tuple[int, int]) -> bytes:
    """Exactly as the server's `preprocess` scales: one axis after the other, in the order that
    Pillow 13 has chosen. Other orders, such as that of earlier versions, round to other pixels."""
    from PIL import Image

    height, width = size
    vertical_first = image.height > height and image.height - height > 2 * (image.width - width)
    between = (image.width, height) if vertical_first else (width, image.height)
    bicubic = Image.Resampling.BICUBIC
    small = image.resize(between, bicubic).resize((width, height), bicubic)
    return _ppm(height, width, small.tobytes())


def _ppm(height: int, width: int, pixels: bytes) -> bytes:
    return b"P6 %d %d 255\n" % (width, height) + pixels

"""Encodes any supported kind of image as the bytes of one image file."""

from __future__ import annotations

import array as arrays
import contextlib
import errno
import inspect
import io
import os
import re
import stat
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

    from .types import ImageLike

ENCODED = (bytes, bytearray, memoryview)

_READ_BYTES = 1 << 18


class Unusable(Exception):
    """Why something cannot be used as an image, in a few words."""


class Refused(Unusable):
    """An image that the server rejected; the reason is the server's.

    Attributes:
        request_id: id of the rejected request.
    """

    def __init__(self, reason: str, request_id: str) -> None:
        super().__init__(reason)
        self.request_id = request_id


def is_one_image(value: Any) -> bool:
    """Whether `value` is treated as one image rather than several. So is everything that is not a
    collection of images, so that encoding it reports what is wrong."""
    return (
        isinstance(value, (str, os.PathLike, *ENCODED))
        or hasattr(value, "read")
        or is_array(value)
        or bool(mistaken(value))
        or not (hasattr(value, "__iter__") or hasattr(value, "__aiter__"))
    )


def is_read(image: Any) -> bool:
    """Whether an image is read from a file or the like, which may hang."""
    return (
        isinstance(image, (str, os.PathLike))
        or hasattr(image, "read")
        or hasattr(image, "read_bytes")
    )


def is_array(value: Any) -> bool:
    """Whether `value` is an array or tensor of numbers, rather than a column of names, which has
    the same attributes."""
    if isinstance(value, np.ndarray):
        return value.ndim != 1 or value.dtype.kind not in "OUT"
    if not all(hasattr(value, name) for name in ("__array__", "shape", "dtype")):
        return False
    return len(value.shape) != 1 or "uint8" in str(value.dtype)


def mistaken(value: Any) -> str:
    """What to pass instead of an unsupported container of images or names; "" for everything
    else."""
    kind = type(value).__name__
    if isinstance(value, Mapping):
        return f"{kind} is not a list of images: pass list(images.values()), or its keys as a list"
    if hasattr(value, "iloc") and hasattr(value, "columns"):
        return f"{kind} is a table: pass its column of paths"
    if hasattr(value, "status_code") and hasattr(value, "content"):
        return f"{kind} is an HTTP response, not an image: pass its .content"
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], bool):
        return f"{kind} of a truth value and more: pass [1] of what OpenCV's imencode gives"
    if isinstance(value, arrays.array) or (
        isinstance(value, (list, tuple)) and value and isinstance(value[0], int)
    ):
        return f"{kind} of numbers: pass bytes(…) of it, if it is an image file"
    if hasattr(value, "namelist") or hasattr(value, "getmembers"):
        return f"{kind} is an archive: pass the bytes of each of its files"
    return ""


def name_of(image: ImageLike) -> str | None:
    """Path or file name, for messages; None if there is none."""
    if isinstance(image, (str, os.PathLike)):
        return os.fsdecode(image)
    # File objects have `name`, PIL images that came from a file have `filename`.
    name = getattr(image, "name", None) or getattr(image, "filename", None)
    return name if isinstance(name, str) else None


def encode(image: ImageLike, size: tuple[int, int], most: int = 2**31 - 1) -> bytes:
    """The image as an encoded file. Files and bytes pass unchanged, whatever their format.

    PIL images and arrays become PPM, which costs no more than a copy. If that makes them smaller,
    they are first scaled to `size` exactly as the server would: it then has nothing left to scale
    and gets the same pixels, bit for bit.

    Args:
        size: Height and width to which the server scales.
        most: Bytes of the largest file that the server accepts. No more than that is read.

    Raises:
        Unusable: There is no such file, it is too large, or the value is not an image.
    """
    if hasattr(image, "as_py"):  # an element of an Arrow column
        image = image.as_py()
    if isinstance(image, ENCODED):
        data = bytes(image)
    elif isinstance(image, (str, os.PathLike)):
        data = _read(os.fsdecode(image), most)
    elif words := mistaken(image):
        raise Unusable(words)
    elif is_array(image):
        data = _from_array(_as_numpy(image), size)
    elif hasattr(image, "read"):
        data = _read_open(image, most)
    elif hasattr(image, "read_bytes"):  # a path in an archive, a package, a bucket
        data = _read_whole(image)
    else:
        data = _from_pil(image, size)
    if not data:
        raise Unusable("is empty")
    if len(data) > most:
        raise too_large(len(data), _limit(most))
    return data


def too_large(size: int | None, limit: str) -> Unusable:
    """
    Args:
        size: Bytes of the file, if known.
        limit: Whose limit it is, as text.
    """
    is_large = f"is {_amount(size)}, too large" if size else "is too large"
    return Unusable(f"{is_large} ({limit}): save it as JPEG, or pass a PIL image")


def _limit(size: int) -> str:
    return f"the server accepts {_amount(size)} per request"


def _amount(size: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"


def _read(name: str, most: int) -> bytes:
    if not name:  # Path("") is the current directory
        raise Unusable("an empty name")
    path = Path(name)
    try:
        status = path.stat()
        if stat.S_ISCHR(status.st_mode):  # /dev/zero is endless
            raise Unusable("is a device, not a file")
        if status.st_size > most and stat.S_ISREG(status.st_mode):
            raise too_large(status.st_size, _limit(most))
        with path.open("rb", buffering=0) as file:
            return _read_up_to(file, most, status.st_size + 1)
    except OSError as error:
        words = (error.strerror or str(error)).lower()
        if error.errno == errno.ENAMETOOLONG:
            words += ": is it base64? Decode it, and pass the bytes"
        raise Unusable(_not_a_path(name) or words) from None
    except ValueError as error:  # a NUL in the name
        raise Unusable(str(error)) from None


def _read_whole(path: Any) -> bytes:
    try:
        data: bytes = path.read_bytes()
    except (OSError, KeyError, ValueError) as error:
        raise Unusable(str(error)) from None
    return data


def _not_a_path(name: str) -> str:
    """What to pass instead of a URL; "" for everything else."""
    scheme = re.match(r"(?:(data):|([a-z][a-z0-9+.-]+)://)", name, re.IGNORECASE)
    if not scheme:
        return ""
    if scheme[1]:
        return "data: URIs are not read: decode it, and pass the bytes"
    if scheme[2].lower() == "file":
        return "URLs are not read: pass only the path"
    return "URLs are not fetched: download it first"


def _read_open(file: Any, most: int) -> bytes:
    if isinstance(file, io.TextIOBase):
        raise Unusable('is open as text; open it with "rb"')
    try:
        # `image.save(file)`, and an earlier read, leave it at its end: the whole file is meant.
        return _read_up_to(file, most) or _read_again(file, most)
    except (OSError, ValueError) as error:  # ValueError: the file is closed
        raise Unusable(str(error)) from None


def _read_again(file: Any, most: int) -> bytes:
    try:
        if not file.tell():
            return b""
        file.seek(0)
    except (AttributeError, OSError):
        raise Unusable("has nothing left to read: has it been read before?") from None
    return _read_up_to(file, most)


def _read_up_to(file: Any, most: int, expected: int = 0) -> bytes:
    """All of a file, in as many reads as it takes. Raises Unusable as soon as it is known to have
    more than `most` bytes."""
    step = max(expected, _READ_BYTES)  # not more: read() allocates that much first
    parts: list[bytes] = []
    size = 0
    while size <= most:
        try:
            part = _checked(file, file.read(min(step, most + 1 - size)))
        except TypeError:  # its read() takes no size and returns everything
            return _checked(file, file.read())
        if not part:
            return parts[0] if len(parts) == 1 else b"".join(parts)
        parts.append(part)
        size += len(part)
    raise too_large(None, _limit(most))


def _checked(file: Any, part: Any) -> bytes:
    """The result of a read, if it is bytes; else raises Unusable."""
    if inspect.isawaitable(part):
        if inspect.iscoroutine(part):
            part.close()  # or Python warns that it was never awaited
        raise Unusable(f"the read() of {type(file).__name__} is async: pass await file.read()")
    if part is None:
        raise Unusable("is open in non-blocking mode, and has no data yet: pass the bytes")
    if not isinstance(part, ENCODED):
        raise Unusable('is open as text; open it with "rb"')
    return bytes(part)


def _as_numpy(array: Any) -> np.ndarray[Any, Any]:
    if isinstance(array, np.ndarray):
        return array
    try:
        return np.asarray(array)
    except Exception as error:  # on a GPU, or part of a graph: each library raises its own
        raise Unusable(f"{type(array).__name__} cannot be converted to an array: {error}") from None


def _from_array(array: np.ndarray[Any, Any], size: tuple[int, int]) -> bytes:
    if array.dtype == np.uint8 and array.ndim in (1, 2) and 0 < array.size == max(array.shape):
        return array.tobytes()  # an encoded file as a vector, from OpenCV's `imencode`
    _check_array(array)
    height, width, _ = array.shape
    if _shrinks(height, width, size):
        from PIL import Image

        return _scaled(Image.fromarray(np.ascontiguousarray(array)), size)
    return _ppm(height, width, array.tobytes())


def _check_array(array: np.ndarray[Any, Any]) -> None:
    what = f"array of {array.dtype} {list(array.shape)} is not uint8 [height, width, 3]"
    if array.dtype.kind in "OSU":
        raise Unusable(f"{what}: pass a list of paths, or of the bytes of image files")
    if array.ndim == 4:
        raise Unusable(f"{what}: for a batch pass list(array)")
    if array.ndim == 2:
        raise Unusable(f"{what}: for grey pixels pass PIL.Image.fromarray(array)")
    if array.ndim != 3:
        raise Unusable(what)
    if array.shape[2] != 3:
        if array.shape[2] == 4:
            raise Unusable(f"{what}: leave out the alpha with array[:, :, :3]")
        if array.shape[0] == 3:
            scale = "" if array.dtype == np.uint8 else ", scale it to 0…255, make it uint8"
            raise Unusable(f"{what}: put the channels last with transpose(1, 2, 0){scale}")
        raise Unusable(what)
    if array.dtype != np.uint8:
        raise Unusable(f"{what}: scale it to 0…255 and convert with astype('uint8')")
    if array.size == 0:
        raise Unusable(f"{what}: it has no pixels")


def _from_pil(image: Any, size: tuple[int, int]) -> bytes:
    from PIL import Image

    if not isinstance(image, Image.Image):
        raise Unusable(
            f"{type(image).__name__} is not an image: pass a path, bytes, a binary file, a PIL "
            "image or a uint8 array [height, width, 3]"
        )
    try:
        with _alone_with(image):
            image.load()
            rgb = image if image.mode == "RGB" else image.convert("RGB")
            if _shrinks(rgb.height, rgb.width, size):
                return _scaled(rgb, size)
            return _ppm(rgb.height, rgb.width, rgb.tobytes())
    except Exception as error:  # a closed or broken file raises nearly anything in Pillow
        raise Unusable(f"it cannot be decoded: {str(error) or type(error).__name__}") from None


# A lock, and how many threads hold it or wait for it, by the id() of an image.
_locks: dict[int, tuple[threading.Lock, int]] = {}
_locks_lock = threading.Lock()


@contextlib.contextmanager
def _alone_with(image: Any) -> Iterator[None]:
    """PIL reads files lazily, and two threads must not load the same image at once. The lock is per
    image, so that one that hangs does not block others."""
    key = id(image)
    with _locks_lock:
        lock, users = _locks.get(key, (threading.Lock(), 0))
        _locks[key] = (lock, users + 1)
    try:
        with lock:
            yield
    finally:
        with _locks_lock:
            lock, users = _locks.pop(key)
            if users > 1:
                _locks[key] = (lock, users - 1)


def _shrinks(height: int, width: int, size: tuple[int, int]) -> bool:
    """Whether an image is scaled here rather than by the server."""
    return height * width > size[0] * size[1]


def _scaled(image: Image.Image, size: tuple[int, int]) -> bytes:
    """Scale exactly as the server's `preprocess`: one axis after the other, in the order of Pillow
    13. Other orders, such as that of earlier versions, round to different pixels."""
    from PIL import Image

    height, width = size
    vertical_first = image.height > height and image.height - height > 2 * (image.width - width)
    between = (image.width, height) if vertical_first else (width, image.height)
    bicubic = Image.Resampling.BICUBIC
    small = image.resize(between, bicubic).resize((width, height), bicubic)
    return _ppm(height, width, small.tobytes())


def _ppm(height: int, width: int, pixels: bytes) -> bytes:
    return b"P6 %d %d 255\n" % (width, height) + pixels

"""Hand-written image files, for what Pillow cannot write."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

from PIL import Image

PHOTOS = Path(__file__).parents[2] / "photos"


def small() -> Image.Image:
    """A photo, 96x64."""
    with Image.open(PHOTOS / "coffee.jpg") as image:
        return image.convert("RGB").resize((96, 64))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """A PNG chunk."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int, kind: int, raw: bytes, between: bytes = b"") -> bytes:
    """A PNG with the given filtered rows; `between` are chunks before the pixels."""
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(raw, 9))
    parts = chunk(b"IHDR", header), between, pixels, chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(tags: dict[int, tuple[int, int, int]], data: bytes, next_page: int = 0) -> bytes:
    """A little-endian TIFF: tag -> (type, count, value or offset); `data` starts at byte 8."""
    entries = b"".join(struct.pack("<HHII", tag, *rest) for tag, rest in sorted(tags.items()))
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", next_page)
    return b"II*\x00" + struct.pack("<I", 8 + len(data)) + data + directory


def tiff_gray(width: int, height: int, size: int, **more: int) -> dict[int, tuple[int, int, int]]:
    """Tags of an 8-bit gray page of one strip, `size` bytes at offset 8."""
    short, long = 3, 4
    values = {256: width, 257: height, 273: 8, 278: height, 279: size}
    tags = {tag: (long, 1, value) for tag, value in values.items()}
    compression = more.get("compression", 1)
    return tags | {258: (short, 1, 8), 259: (short, 1, compression), 262: (short, 1, 1)}


def segment(marker: int, data: bytes) -> bytes:
    """A JPEG segment."""
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data

"""A corpus of bad images, generated from the goldens and photos: the same bytes in every run.

`corpus()` yields more than 2,000; `pillow()` gives the expected result for each: Pillow's pixels
after the documented transform, or a rejection.
"""

import io
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from . import bombs
from .files import encoded, png, small

ROOT = Path(__file__).parents[2]
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
MAX_PIXELS, MAX_SIDE = 110_000_000, 65535
Pixels = npt.NDArray[np.uint8]
# either: Pillow's pixels, or refused. good: Pillow's pixels. refused: whatever Pillow does.
Owed = Literal["either", "good", "refused"]


@dataclass(frozen=True)
class Case:
    """One input."""

    name: str
    data: bytes
    owed: Owed = "either"


def corpus(large: bool = True) -> Iterator[Case]:
    """All cases, lazily, because some are tens of megabytes; without the bombs if not `large`."""
    seeds = dict(originals())
    for name, data in seeds.items():
        yield Case(f"as it is/{name}", data, "good")
        yield from truncated(name, data)
        yield from flipped(name, data)
        yield from rearranged(name, data)
    yield from nothing()
    yield from wrong_magic(seeds)
    yield from odd_sizes()
    yield from foreign()
    yield from polyglots(seeds)
    for name, data in bombs.metadata():
        yield Case(f"metadata/{name}", data)
    if not large:
        return
    for name, data in bombs.allowed():
        yield Case(f"large/{name}", data, "good")
    for name, data in bombs.heavy():
        yield Case(f"heavy/{name}", data)
    for name, data in bombs.refused():
        yield Case(f"bomb/{name}", data, "refused")


def pillow(data: bytes, side: int) -> Pixels | None:
    """The result of Pillow and the documented transform; None if they reject the file."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE:
                return None
            rgb = image.convert("RGB")
    except Exception:  # Pillow's decoders raise nearly anything
        return None
    return resized(rgb, side, side)


def resized(image: Image.Image, height: int, width: int) -> Pixels:
    """Pillow's resize, with the passes in the order of Pillow 13; earlier versions differ."""
    vertical_first = image.height > height and image.height - height > 2 * (image.width - width)
    between = (image.width, height) if vertical_first else (width, image.height)
    bicubic = Image.Resampling.BICUBIC
    return np.asarray(image.resize(between, bicubic).resize((width, height), bicubic))


def originals() -> Iterator[tuple[str, bytes]]:
    """Intact files: the goldens, the photos, and a small one of each other encoding."""
    for folder in ("tests/goldens/images", "photos"):
        for path in sorted((ROOT / folder).iterdir()):
            if path.suffix != ".md":
                yield path.name, path.read_bytes()
    yield from encodings()


def encodings() -> Iterator[tuple[str, bytes]]:
    image = small()
    frames = [image.rotate(angle) for angle in (90, 180)]
    animated: dict[str, Any] = {"save_all": True, "append_images": frames}
    yield "animated.gif", encoded(image, "GIF", **animated)
    yield "animated.webp", encoded(image, "WEBP", **animated)
    yield "animated.png", encoded(image, "PNG", **animated)
    yield "animated.avif", encoded(image, "AVIF", **animated)
    yield "pages.tiff", encoded(image, "TIFF", **animated)
    yield "lossless.webp", encoded(image.convert("RGBA"), "WEBP", lossless=True)
    yield "still.avif", encoded(image, "AVIF")
    for compression in ("raw", "tiff_deflate", "jpeg", "packbits", "zstd"):
        yield f"{compression}.tiff", encoded(image, "TIFF", compression=compression)
    for mode in ("CMYK", "LAB", "YCbCr", "F", "I;16", "1", "P", "LA"):
        yield f"{mode}.tiff", encoded(image.convert("L" if mode == "I;16" else mode), "TIFF")
    yield "420.jpg", encoded(image, "JPEG", subsampling="4:2:0", restart_marker_rows=1)
    yield "rgb.jpg", encoded(image, "JPEG", keep_rgb=True)
    yield "palette.bmp", encoded(image.convert("P"), "BMP")
    yield "gray.ppm", encoded(image.convert("L"), "PPM")
    yield "colour.ppm", encoded(image, "PPM")
    yield "plain.ppm", b"P3 2 2 255\n0 0 0 255 0 0\n0 255 0 0 0 255\n"
    yield "deep.ppm", b"P6 2 2 65535\n" + bytes(range(24))
    noise = random.Random(0).randbytes(1 << 16)
    for bits, kind, values in (
        (16, 2, 3),
        (16, 0, 1),
        (16, 4, 2),
        (16, 6, 4),
        (2, 0, 1),
        (4, 0, 1),
    ):
        row = (40 * bits * values + 7) // 8
        raw = b"".join(bytes([y % 5]) + noise[y * row : (y + 1) * row] for y in range(30))
        yield f"{bits} bits, type {kind}.png", png(40, 30, bits, kind, raw)


def truncated(name: str, data: bytes) -> Iterator[Case]:
    """Cut short in the header, at even steps, and just before the end."""
    steps = {len(data) * i // 16 for i in range(1, 16)}
    for size in sorted({1, 2, 4, 9, 17, 26, 40, len(data) - 9, len(data) - 2} | steps):
        if 0 < size < len(data):
            yield Case(f"truncated/{name} at {size}", data[:size])


def flipped(name: str, data: bytes) -> Iterator[Case]:
    """Single bits of the header flipped, then 1 to 64 bytes anywhere changed."""
    rng = random.Random(name)
    for i in range(12):
        at, bit = rng.randrange(min(len(data), 200)), rng.randrange(8)
        damaged = bytearray(data)
        damaged[at] ^= 1 << bit
        yield Case(f"flipped/{name} byte {at} bit {bit}, {i}", bytes(damaged))
    for i in range(12):
        damaged = bytearray(data)
        for _ in range(1 << i % 7):
            damaged[rng.randrange(len(data))] = rng.randrange(256)
        yield Case(f"flipped/{name} {1 << i % 7} bytes, {i}", bytes(damaged))


def rearranged(name: str, data: bytes) -> Iterator[Case]:
    """Parts zeroed, set to ones, repeated and removed."""
    rng = random.Random(name)
    for i in range(4):
        start, size = rng.randrange(len(data)), rng.randrange(1, len(data) // 4 + 2)
        before, part, after = data[:start], data[start : start + size], data[start + size :]
        for what, now in (
            ("zeroed", bytes(len(part))),
            ("set", b"\xff" * len(part)),
            ("repeated", part * 2),
            ("left out", b""),
        ):
            yield Case(f"rearranged/{name} {what} {start}+{size}, {i}", before + now + after)


def nothing() -> Iterator[Case]:
    for size in (0, 1, 2, 3, 4, 7, 8, 12, 16, 100, 10_000, 10_000_000):
        for byte in (b"\x00", b"\xff", b" "):
            yield Case(f"nothing/{size} times {byte!r}", byte * size, "refused")
        yield Case(f"nothing/{size} of noise", random.Random(size).randbytes(size), "refused")


MAGIC = {
    "jpeg": b"\xff\xd8\xff\xe0\x00\x10JFIF\x00",
    "png": b"\x89PNG\r\n\x1a\n",
    "webp": b"RIFF\x24\x00\x00\x00WEBPVP8 ",
    "gif": b"GIF89a",
    "bmp": b"BM",
    "tiff": b"II*\x00",
    "tiff, big-endian": b"MM\x00*",
    "bigtiff": b"II+\x00\x08\x00\x00\x00",
    "ppm": b"P6\n",
    "pbm": b"P4\n",
    "pfm": b"Pf\n",
    "avif": b"\x00\x00\x00\x20ftypavif\x00\x00\x00\x00",
}


def wrong_magic(seeds: dict[str, bytes]) -> Iterator[Case]:
    for kind, magic in MAGIC.items():
        yield Case(f"magic/{kind} alone", magic, "refused")
        yield Case(f"magic/{kind} and zeros", magic + bytes(1000))
        yield Case(f"magic/{kind} and 0xff", magic + b"\xff" * 1000)
        yield Case(f"magic/{kind} and noise", magic + random.Random(kind).randbytes(1000))
        for name in ("gray.jpg", "rgba.png", "lossy.webp", "palette.gif", "rgb.bmp", "lzw.tiff"):
            yield Case(f"magic/{kind} on {name}", magic + seeds[name][len(magic) :])


def odd_sizes() -> Iterator[Case]:
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM", "WEBP", "AVIF"):
        yield Case(f"size/1x1 {kind}", encoded(Image.new("RGB", (1, 1), "red"), kind), "good")
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM"):
        for size in ((65_000, 1), (1, 65_000), (65_000, 3)):
            image = Image.new("L", size, 99)
            yield Case(f"size/{size[0]}x{size[1]} {kind}", encoded(image, kind), "good")
    for width, height in ((0, 0), (0, 9), (9, 0), (2**31 - 1, 1), (2**32 - 1, 2**32 - 1)):
        yield Case(f"size/{width}x{height} PNG", png(width, height, 8, 2, bytes(99)), "refused")
        text = f"P6 {width} {height} 255\n".encode()
        yield Case(f"size/{width}x{height} PPM", text + bytes(99), "refused")
        bmp = bytearray(encoded(Image.new("RGB", (2, 2)), "BMP"))
        bmp[18:26] = width.to_bytes(4, "little") + height.to_bytes(4, "little")
        yield Case(f"size/{width}x{height} BMP", bytes(bmp))
    for digits in (20, 4000, 100_000):
        yield Case(
            f"size/PPM of {digits} digits", b"P6 " + b"9" * digits + b" 1 255\n\0", "refused"
        )


def foreign() -> Iterator[Case]:
    """Files that are not photos, and formats that Pillow could open but must not."""
    svg = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
    xxe = b'<!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg>&x;</svg>'
    texts = {"svg": svg, "svg with an entity": xxe, "html": b"<!doctype html><img src=x>"}
    texts |= {"json": b'{"b64": "aGVsbG8="}', "base64": b"/9j/4AAQSkZJRgABAQAAAQABAAD/2wBD"}
    texts |= {"path": b"/etc/passwd", "url": b"http://127.0.0.1/a.jpg", "xpm": b"/* XPM */"}
    texts |= {"eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage"}
    texts |= {"zip": b"PK\x03\x04" + bytes(99), "elf": b"\x7fELF" + bytes(99)}
    texts |= {"gzip": b"\x1f\x8b\x08" + bytes(99), "pickle": b"\x80\x04\x95" + bytes(99)}
    texts |= {"heic": b"\x00\x00\x00\x18ftypheic" + bytes(99), "jxl": b"\xff\x0a" + bytes(99)}
    texts |= {
        "mp4": b"\x00\x00\x00\x18ftypmp42" + bytes(99),
        "wmf": b"\xd7\xcd\xc6\x9a" + bytes(99),
    }
    for name, data in texts.items():
        yield Case(f"foreign/{name}", data, "refused")
    for kind in ("PDF", "EPS", "ICO", "JPEG2000", "SGI", "TGA", "PCX", "DDS", "MSP", "QOI"):
        image = small().convert("1") if kind == "MSP" else small()
        yield Case(f"foreign/{kind}", encoded(image, kind), "refused")


def polyglots(seeds: dict[str, bytes]) -> Iterator[Case]:
    """Files that are valid in two formats."""
    photo, icon = seeds["gray.jpg"], seeds["one-pixel.png"]
    archive = b"PK\x03\x04" + bytes(26) + b"PK\x05\x06" + bytes(18)
    script = b"<script>alert(1)</script>"
    for name, data in seeds.items():
        yield Case(f"polyglot/{name} and a zip", data + archive)
        yield Case(f"polyglot/{name} and a script", data + script)
        yield Case(f"polyglot/pdf before {name}", b"%PDF-1.7\n" + data)
        yield Case(f"polyglot/{name} in a heredoc", b"#!/bin/sh\n" + data)
    yield Case("polyglot/jpeg and png", photo + icon)
    yield Case("polyglot/png and jpeg", icon + photo)
    yield Case("polyglot/gif that is a script", b"GIF89a=1/*" + bytes(9) + b"*/;alert(1)")
    yield Case("polyglot/bmp that is a script", b"BM=1;/*" + bytes(60) + b"*/alert(1)")

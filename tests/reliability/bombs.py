"""Small files that demand much memory or time, or have malformed metadata."""

import random
import struct
import zlib
from collections.abc import Iterator

from PIL import Image

from .files import chunk, encoded, png, segment, small, tiff, tiff_gray

Named = Iterator[tuple[str, bytes]]
SHORT, LONG, UNDEFINED = 3, 4, 7  # TIFF's types


def metadata() -> Named:
    """Malformed ICC, EXIF and the like, in every format that has them."""
    image, rng = small(), random.Random(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    good = exif.tobytes()
    for name, data in {
        "nothing": b"",
        "noise": rng.randbytes(5000),
        "zeros": bytes(5000),
        "64 KiB": rng.randbytes(65_500),
        "a loop": b"Exif\0\0II*\0\x08\0\0\0\x01\0" + bytes(12) + b"\x08\0\0\0",
        "a tag of 4 GiB": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\xff\xff\xff\xff\x09\0\0\0",
        "cut short": good[:-9],
        "65535 tags": b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + rng.randbytes(5000),
    }.items():
        for kind in ("JPEG", "PNG", "WEBP"):
            # Written with valid data of that length, then replaced, because Pillow checks it.
            yield f"EXIF: {name}.{kind}", _with_exif(encoded(image, kind), kind, data)
        for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
            yield f"ICC: {name}.{kind}", encoded(image, kind, icc_profile=data)
        jpeg = encoded(image, "JPEG")
        for marker in (0xE0, 0xE2, 0xED, 0xEE, 0xFE, 0xDB, 0xC4, 0xDD):
            yield f"marker {marker:x}: {name}.jpg", jpeg[:2] + segment(marker, data) + jpeg[2:]
        rows = bytes(3 * 7)
        for kind in (b"iCCP", b"zTXt", b"iTXt", b"tEXt", b"tRNS", b"gAMA", b"acTL", b"fcTL"):
            between = chunk(kind, data)
            yield f"chunk {kind.decode()}: {name}.png", png(2, 3, 8, 2, rows, between)


def _with_exif(data: bytes, kind: str, exif: bytes) -> bytes:
    if kind == "JPEG":
        return data[:2] + segment(0xE1, exif) + data[2:]
    if kind == "PNG":
        return data[:33] + chunk(b"eXIf", exif) + data[33:]
    riff = data + b"EXIF" + struct.pack("<I", len(exif)) + exif + bytes(len(exif) % 2)
    return riff[:4] + struct.pack("<I", len(riff) - 8) + riff[8:]


def allowed() -> Named:
    """Large but below the pixel limit, or with more frames and parts than are decoded."""
    yield "65000x700.png", png(65_000, 700, 1, 0, bytes(8126 * 700))
    yield "50 million pixels.png", png(50_000, 1_000, 8, 0, bytes(50_001 * 1_000))
    yield "110 million pixels.png", png(55_000, 2_000, 8, 0, bytes(55_001 * 2_000))
    jpeg = encoded(small(), "JPEG")  # a decoder in C skips these in 0.1 s
    yield "2 million comments.jpg", jpeg[:2] + segment(0xFE, b"") * 2_000_000 + jpeg[2:]
    yield "a million frames.gif", gif(1_000_000)
    yield "65535 frames.webp", webp(65_535)
    yield "100000 pages.tiff", _pages(100_000)
    page = tiff_gray(8, 8, 64)
    yield "a page that is its own next.tiff", tiff(page, bytes(64), next_page=8 + 64)


def refused() -> Named:
    """Above the pixel limit; or what no legitimate file has and would take minutes or gigabytes."""
    tiny = bytes(1000)
    yield "60000x60000.png", png(60_000, 60_000, 1, 0, bytes(7501 * 60_000))
    yield "55001x2000.png", png(55_001, 2_000, 8, 0, bytes(55_002 * 2_000))
    yield "50000000x1.png", png(50_000_000, 1, 8, 2, bytes(150_000_001))
    rows = zlib.compress(bytes(60_000 * 1000))
    page = tiff_gray(60_000, 60_000, len(rows), compression=8)
    yield "60000x60000.tiff", tiff(page, rows)
    yield "60000x60000.ppm", b"P6 60000 60000 255\n" + tiny
    bmp = encoded(Image.new("RGB", (2, 2)), "BMP")
    yield "60000x60000.bmp", bmp[:18] + struct.pack("<II", 60_000, 60_000) + bmp[26:]
    jpeg = encoded(small(), "JPEG")
    at = jpeg.index(b"\xff\xc0") + 5
    yield "65500x65500.jpg", jpeg[:at] + struct.pack(">HH", 65_500, 65_500) + jpeg[at + 4 :]
    yield "65535x65535.gif", b"GIF89a\xff\xff\xff\xff" + gif(1)[10:]
    canvas = webp(2)
    yield "16384x16384.webp", canvas[:24] + b"\xff\x3f\0\xff\x3f\0" + canvas[30:]
    avif = encoded(small(), "AVIF")
    at = avif.index(b"ispe") + 8
    yield "20000x20000.avif", avif[:at] + struct.pack(">II", 20_000, 20_000) + avif[at + 8 :]
    yield "20000 scans.jpg", scans(20_000)
    yield "16 MB between two markers.jpg", jpeg[:2] + segment(0xFE, b"") + bytes(1 << 24) + jpeg[2:]
    many = chunk(b"teXt", b"") * 1_000_000
    yield "a million chunks.png", png(2, 3, 8, 2, bytes(21), many)
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 29)))
    yield "half a gigabyte of text.png", png(2, 3, 8, 2, bytes(21), text)
    profile = chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1 << 29)))
    yield "half a gigabyte of profile.png", png(2, 3, 8, 2, bytes(21), profile)


def heavy() -> Named:
    """Files that made decoders use gigabytes. Current Pillow decodes them or raises an error."""
    jpeg = encoded(small(), "JPEG")
    yield "4 million strips.tiff", _strips(4_000_000)
    yield "65000 tags of a megabyte each.tiff", _overlapping(65_000, 1 << 20)
    exif = b"Exif\0\0"
    blob = _overlapping(65_000, 1 << 20)
    parts = (segment(0xE1, exif + blob[i : i + 65_000]) for i in range(0, len(blob), 65_000))
    yield "65000 EXIF tags of a megabyte each.jpg", jpeg[:2] + b"".join(parts) + jpeg[2:]


def gif(frames: int) -> bytes:
    """A GIF of 1x1 with that many frames."""
    screen = b"GIF89a\x01\0\x01\0\x80\0\0\0\0\0\xff\xff\xff"
    frame = b"\x2c\0\0\0\0\x01\0\x01\0\0\x02\x02\x4c\x01\0"
    return screen + frame * frames + b";"


def webp(frames: int) -> bytes:
    """An animated WebP that repeats its first frame."""
    image = Image.new("RGB", (8, 8), "red")
    other = Image.new("RGB", (8, 8), "blue")
    data = encoded(image, "WEBP", save_all=True, append_images=[other])
    start = data.index(b"ANMF")
    end = start + 8 + int.from_bytes(data[start + 4 : start + 8], "little")
    body = data[8:start] + data[start:end] * frames
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _pages(count: int) -> bytes:
    """A TIFF with a chain of directories, all with the same pixels."""
    size = len(tiff(tiff_gray(8, 8, 64), b"")) - 8
    first = tiff(tiff_gray(8, 8, 64), bytes(64), next_page=72 + size)
    rest = (
        tiff(tiff_gray(8, 8, 64), b"", next_page=72 + size * (i + 1) if i < count else 0)[8:]
        for i in range(2, count + 1)
    )
    return first + b"".join(rest)


def _strips(count: int) -> bytes:
    """A TIFF of one pixel in that many strips."""
    tags = tiff_gray(1, 1, 1)
    tags[273] = (LONG, count, 8)
    tags[279] = (LONG, count, 8)
    tags[278] = (LONG, 1, 1)
    return tiff(tags, b"\x08\0\0\0" * count)


def _overlapping(tags: int, size: int) -> bytes:
    """A TIFF in which the value of each tag is the whole file."""
    entries = dict.fromkeys(range(300, 300 + tags), (UNDEFINED, size, 8))
    return tiff(tiff_gray(8, 8, 64) | entries, bytes(size))


def scans(count: int) -> bytes:
    """A progressive JPEG of 50 million pixels of one gray, repeated in `count` scans."""
    width, height = 50_000, 1_000
    blocks = (width // 8) * (height // 8)
    start = b"\xff\xd8" + segment(0xDB, b"\0" + b"\x01" * 64)
    frame = segment(0xC2, struct.pack(">BHHB", 8, height, width, 1) + b"\x01\x11\0")
    # One one-bit code each: DC category 0 is "0"; AC symbol 0xE0 ends 2^14 or more blocks.
    direct = segment(0xC4, b"\0\x01" + bytes(15) + b"\0")
    ends = segment(0xC4, b"\x10\x01" + bytes(15) + b"\xe0")
    first = segment(0xDA, b"\x01\x01\0\0\0\0") + bytes(blocks // 8 + 1)
    runs = -(-blocks // (1 << 14))
    bits = "0" + "0" * 14  # the code, then how many more than 2^14
    code = (bits * runs).ljust(-(-15 * runs // 8) * 8, "1")
    scan = segment(0xDA, b"\x01\x01\0\x01\x3f\0")
    scan += int(code, 2).to_bytes(len(code) // 8, "big")
    return start + frame + direct + ends + first + scan * count + b"\xff\xd9"

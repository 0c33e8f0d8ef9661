"""Decodes one encoded image file to pixels, with limits on the CPU time and memory it can cost."""

import io
import re
import threading
from contextlib import contextmanager

import jpeg
from bicubic import resize
from PIL import Image, UnidentifiedImageError

# Formats that Pillow may open. Not all it supports: EPS, for example, starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
MAX_MESSAGE = 200  # characters

# A JPEG's maximum. Decoding and resizing buffer whole rows of any length: a PNG of 50 million
# pixels in one row (146 kB) took 1.7 GB.
MAX_SIDE = 65535
MAX_READS = 1_000_000  # far more than any encoder's file needs
MAX_BMP_READS = 8_000_000  # Pillow reads a run of pixels (RLE) in two one-byte reads: some 5 s
OTHERS = {
    "HEIC": re.compile(rb"....ftyp(hei|hev|mif|msf)", re.DOTALL),
    "JPEG XL": re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "),
    "JPEG 2000": re.compile(rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  "),
    "PDF": re.compile(rb"%PDF-"),
    "SVG": re.compile(rb"\s*<(\?xml|svg)"),
}


REASONS = (  # why files are rejected, as labelled in the metrics
    "empty",
    "not_an_image",
    "unsupported_format",
    "too_many_bytes",
    "too_many_pixels",
    "too_many_parts",
    "damaged",
)


class BadImage(Exception):
    """An image was rejected: one of REASONS, and a message for the client."""

    def __init__(self, reason, message):
        super().__init__(message)
        self.reason = reason


def decode(data, height, width, room, fast_jpeg=False):
    """Decode a file (bytes) to a uint8 array [height, width, 3]. Raises BadImage.

    With `fast_jpeg` a JPEG is decoded at 1/2, 1/4 or 1/8 of its size, but at no less than twice
    the target size.
    """
    if not data:
        raise BadImage("empty", "it is empty (0 bytes)")
    if jpeg.has_too_many_scans(data):
        raise BadImage("too_many_parts", f"a JPEG of more than {jpeg.MAX_SCANS} scans")
    least = (2 * height, 2 * width) if fast_jpeg else None
    try:
        pixels = plain_jpeg(data, height, width, room, least)
        return by_pillow(data, height, width, room, least) if pixels is None else pixels
    except BadImage:
        raise
    except UnidentifiedImageError:
        reason, what = what_else(data)
        raise BadImage(reason, f"{len(data)} bytes that are {what}") from None
    except Exception as e:  # Pillow's decoders raise nearly any exception for a damaged file
        why = f"it cannot be decoded: {str(e) or type(e).__name__}"
        raise BadImage("damaged", why[:MAX_MESSAGE]) from e


def plain_jpeg(data, height, width, room, least):
    """Decode a plain JPEG as `decode` does; return None if Pillow has to handle the file."""
    size = jpeg.size(data)
    if size is None or size[0] * size[1] > room.pixels:
        return None
    fraction = 1
    while least and min(size[0] // least[0], size[1] // least[1]) >= 2 * fraction < 16:
        fraction *= 2
    with room.taken(size[0] * size[1]):
        pixels = jpeg.decode(data, *size, fraction)
        return None if pixels is None else resize(pixels, height, width)


def by_pillow(data, height, width, room, least):
    """Decode as `decode` does; raises nearly any exception for a damaged file."""
    reader = Reader(data)
    with Image.open(reader, formats=FORMATS) as image:
        pixels = image.width * image.height
        if pixels > room.pixels:
            raise BadImage(
                "too_many_pixels",
                f"{image.width}x{image.height} is over {room.pixels} pixels, the limit of this "
                "server (vit-builder --max-image-pixels)",
            )
        if max(image.size) > MAX_SIDE:
            raise BadImage(
                "too_many_pixels",
                f"{image.width}x{image.height} has a side of over {MAX_SIDE} pixels",
            )
        if image.format == "BMP":
            reader.most = MAX_BMP_READS
        if least:
            image.draft(None, least[::-1])
        with room.taken(pixels):
            image.load()
            # convert() would copy an image that is already RGB: a third of a small image's time.
            rgb = image if image.mode == "RGB" else image.convert("RGB")
            return resize(rgb, height, width)


def what_else(data):
    """Identify a file that cannot be decoded; return one of REASONS and a description."""
    for name, magic in OTHERS.items():
        if magic.match(data):
            what = f"{name}: not supported by the server; convert it, or pass a PIL image"
            return "unsupported_format", what
    return "not_an_image", f"not an image ({', '.join(FORMATS)})"


class Room:
    """Limits the pixels being decoded at once, and with them this process's memory.

    An image of the maximum size is decoded alone, so more cores do not need more memory.
    """

    def __init__(self, pixels):
        self.pixels = self.free = pixels
        self.freed = threading.Condition()

    @contextmanager
    def taken(self, pixels):
        with self.freed:
            self.freed.wait_for(lambda: self.free >= pixels)
            self.free -= pixels
        try:
            yield
        finally:
            with self.freed:
                self.free += pixels
                self.freed.notify_all()


class Part:
    """A Room for one image, which records the image's number of pixels."""

    def __init__(self, room):
        self.room, self.pixels, self.seen = room, room.pixels, 0

    def taken(self, pixels):
        self.seen = pixels
        return self.room.taken(pixels)


class Reader(io.BytesIO):
    """A file in memory that limits the number of reads: millions of markers, chunks or comments.

    Pillow parses these in Python, at about 3 s per million reads.
    """

    reads, most = 0, MAX_READS

    def read(self, size=-1):
        self.reads += 1
        if self.reads > self.most:
            raise BadImage("too_many_parts", f"it has more than {self.most} parts")
        return super().read(size)

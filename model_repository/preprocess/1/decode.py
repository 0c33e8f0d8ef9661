"""One encoded image file -> pixels, or why there are none; with bounds on what a file can cost."""

import io
import re
import threading
from contextlib import contextmanager

import jpeg
from bicubic import resize
from PIL import Image, UnidentifiedImageError

# What Pillow may open. Not all it can: EPS, for one, starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
MAX_REASON = 200  # characters

# The longest side that a JPEG can have. Decoding and resizing hold whole rows, of any length: a PNG
# of 50 million pixels in one row (146 kB) took 1.7 GB.
MAX_SIDE = 65535
MAX_READS = 1_000_000  # no encoder comes near it
MAX_BMP_READS = 8_000_000  # Pillow reads a run of pixels (RLE) in two, of a byte each: some 5 s
OTHERS = {
    "HEIC": re.compile(rb"....ftyp(hei|hev|mif|msf)", re.DOTALL),
    "JPEG XL": re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "),
    "JPEG 2000": re.compile(rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  "),
    "PDF": re.compile(rb"%PDF-"),
    "SVG": re.compile(rb"\s*<(\?xml|svg)"),
}


class BadImage(Exception):
    """A row that has no pixels; the message is for the person who sent it."""


def decode(data, height, width, room, fast_jpeg=False):
    """Encoded file (bytes) -> uint8 array [height, width, 3]. Raises BadImage.

    With `fast_jpeg` a JPEG is decoded at 1/2, 1/4 or 1/8 of its size, but at no less than twice
    what is wanted.
    """
    if not data:
        raise BadImage("it is empty (0 bytes)")
    if jpeg.has_too_many_scans(data):
        raise BadImage(f"a JPEG of more than {jpeg.MAX_SCANS} scans")
    least = (2 * height, 2 * width) if fast_jpeg else None
    try:
        pixels = plain_jpeg(data, height, width, room, least)
        return by_pillow(data, height, width, room, least) if pixels is None else pixels
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage(f"{len(data)} bytes that are {what_else(data)}") from None
    except Exception as e:  # a broken file raises nearly anything in Pillow's decoders
        raise BadImage(f"it cannot be decoded: {str(e) or type(e).__name__}"[:MAX_REASON]) from e


def plain_jpeg(data, height, width, room, least):
    """As `decode`; None for what Pillow is to look at."""
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
    """As `decode`; raises nearly anything for a broken file."""
    reader = Reader(data)
    with Image.open(reader, formats=FORMATS) as image:
        pixels = image.width * image.height
        if pixels > room.pixels:
            raise BadImage(
                f"{image.width}x{image.height} is over {room.pixels} pixels, the limit of this "
                "server (vit-builder --max-image-pixels)"
            )
        if max(image.size) > MAX_SIDE:
            raise BadImage(f"{image.width}x{image.height} has a side of over {MAX_SIDE} pixels")
        if image.format == "BMP":
            reader.most = MAX_BMP_READS
        if least:
            image.draft(None, least[::-1])
        with room.taken(pixels):
            image.load()
            # convert() would copy an image that is RGB already: a third of a small one's time.
            rgb = image if image.mode == "RGB" else image.convert("RGB")
            return resize(rgb, height, width)


def what_else(data):
    """What a file is that nothing here decodes, as far as people take it for an image."""
    for name, magic in OTHERS.items():
        if magic.match(data):
            return f"{name}: not supported by the server; convert it, or pass a PIL image"
    return f"not an image ({', '.join(FORMATS)})"


class Room:
    """Bounds the pixels that are decoded at once, and with them this process's memory.

    One image of the largest size has it all for itself, so more cores do not need more memory.
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


class Reader(io.BytesIO):
    """A file that stops those who read it in tiny pieces: millions of markers, chunks, comments.

    Pillow walks through these in Python, at about 3 s a million reads.
    """

    reads, most = 0, MAX_READS

    def read(self, size=-1):
        self.reads += 1
        if self.reads > self.most:
            raise BadImage(f"it has more than {self.most} parts")
        return super().read(size)

"""Plain JPEGs by simplejpeg, straight into an array: Pillow's pixels in less time.

Both have libjpeg-turbo inside, but Pillow's pixels have to be copied out of its memory, most of it
while no other thread of this process can run. What is not plain, and what libjpeg as much as warns
about, is Pillow's: its verdict stands.
"""

import re

import numpy as np
import simplejpeg

# No encoder comes near it. libtiff stops at 100 scans of a JPEG too.
MAX_SCANS, MAX_MARKERS = 100, 1_000_000
MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
START = b"\xff\xd8"


def size(data):
    """Height and width of a plain JPEG, or None."""
    if not data.startswith(START):
        return None
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data, strict=True)
    except ValueError:
        return None
    # Of CMYK Pillow makes other colours than libjpeg.
    return (height, width) if colors in ("YCbCr", "Gray", "RGB") else None


def decode(data, height, width, fraction=1):
    """uint8 [h, w, 3], at 1, 1/2, 1/4 or 1/8 of the size that the file has; None where it is not
    quite in order."""
    least = {"min_height": -(-height // fraction), "min_width": -(-width // fraction)}
    try:
        return simplejpeg.decode_jpeg(data, "RGB", strict=True, **least)
    except ValueError:
        return None


def has_too_many_scans(data):
    """Whether a JPEG asks for far more passes over its pixels than any encoder writes.

    A scan of a few bytes can cost as much as the whole image: 2 MB took 87 s.
    """
    if not data.startswith(START) or most_scans(data) <= MAX_SCANS:
        return False
    # More may be in a thumbnail, or after the image. Count those that a decoder comes to.
    scans, at = 0, 2
    for _ in range(MAX_MARKERS):
        marker = MARKER.search(data, at)
        if marker is None or marker[0] == b"\xff\xd9":
            return False
        scans += marker[0] == b"\xff\xda"
        if scans > MAX_SCANS:
            return True
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return True


def most_scans(data):
    """How often FF DA is in a file: as data.count(), in a quarter of its time and without Python's
    lock."""
    pairs = (np.frombuffer(data, "<u2", (len(data) - at) // 2, at) for at in (0, 1))
    return sum(np.count_nonzero(numbers == 0xDAFF) for numbers in pairs)

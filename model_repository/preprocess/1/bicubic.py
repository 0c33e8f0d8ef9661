"""Pillow's bicubic resize, bit for bit (verified on x86-64), in a third of Pillow's time.

Pillow (src/libImaging/Resample.c) resizes one axis after the other and rounds to uint8 in between.
A pixel is a weighted sum of its neighbours, in fixed point, so the order of the additions does not
matter: here they are vectorised over many pixels. vectors.py compiles the loops for this
processor's vector instructions; Pillow's wheels are built for any processor.
"""

import functools

import numpy as np
from vectors import BITS, LANES, SQUARE, STRIP, compiled, transpose, weigh_columns, weigh_rows

PIECE = 2**17  # pixels copied out of Pillow's memory at a time
CODE = compiled(weigh_rows, transpose, weigh_columns)


def resize(image, height, width):
    """RGB image, Pillow's or uint8 [h, w, 3] -> uint8 [height, width, 3], as
    Image.resize((width, height), BICUBIC) returns it.

    The order of the axes makes a difference of up to 8 levels in tall images. Pillow 13 changed it;
    this uses Pillow 13's order with any version of Pillow.
    """
    is_array = isinstance(image, np.ndarray)
    w, h = image.shape[1::-1] if is_array else image.size
    down_first = h > height and h - height > 2 * (w - width)
    if is_array:
        return (
            across(down(image, height), width) if down_first else down(across(image, width), height)
        )
    if down_first:
        step = max(STRIP, PIECE // h)
        pieces = [(x, 0, min(x + step, w), h) for x in range(0, w, step)]
        resized = [down(np.asarray(image.crop(piece)), height) for piece in pieces]
        return across(np.concatenate(resized, axis=1), width)
    step = max(1, PIECE // (w * STRIP)) * STRIP
    pieces = [(0, y, w, min(y + step, h)) for y in range(0, h, step)]
    resized = [across(np.asarray(image.crop(piece)), width) for piece in pieces]
    return down(np.concatenate(resized), height)


def down(pixels, height):
    """Resize vertically: uint8 [h, w, 3] -> [height, w, 3]."""
    h, w, _ = pixels.shape
    rows = pixels.reshape(h, -1)
    if 3 * w < LANES:
        rows = np.pad(rows, ((0, 0), (0, LANES - 3 * w)))
    rows, n = np.ascontiguousarray(rows), rows.shape[1]
    out = np.empty((height, n), np.uint8)
    first, count, weight = weights(h, height)
    CODE.weigh_rows(*at(rows, first, count, weight), weight.shape[1], *at(out), height, n)
    return np.ascontiguousarray(out[:, : 3 * w]).reshape(height, w, 3)


def across(pixels, width):
    """Resize horizontally: uint8 [h, w, 3] -> [h, width, 3]."""
    h, w, _ = pixels.shape
    if min(h, 3 * w, 3 * width) < SQUARE:  # too small to be transposed in squares
        turned = down(np.ascontiguousarray(pixels.transpose(1, 0, 2)), width)
        return np.ascontiguousarray(turned.transpose(1, 0, 2))
    rows, out = np.ascontiguousarray(pixels), np.empty((h, width, 3), np.uint8)
    columns, narrow = (np.empty((size, STRIP), np.uint8) for size in (3 * w, 3 * width))
    first, count, weight = weights(w, width)
    CODE.weigh_columns(
        *at(rows, first, count, weight),
        *(weight.shape[1], *at(out), width, 3 * w, h, *at(columns, narrow)),
    )
    return out


def at(*arrays):
    """Return the arrays' addresses."""
    return [array.ctypes.data for array in arrays]


@functools.lru_cache(32)
def weights(size, new):
    """Return, for each of `new` pixels, its first source pixel, their count, and weights [new, k].

    The formula is the cubic convolution of Keys (1981) with a = -0.5, widened when shrinking. The
    operations and their order are Pillow's: the last bit of a double can decide a rounding.
    """
    scale = size / new
    stretch = max(scale, 1.0)
    centers = (np.arange(new) + 0.5) * scale
    first = np.maximum((centers - 2 * stretch + 0.5).astype(np.int64), 0)
    count = np.minimum((centers + 2 * stretch + 0.5).astype(np.int64), size) - first
    source = np.arange(count.max())[:, None]
    x = np.abs((source + first - centers + 0.5) * (1 / stretch))
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    weight = np.where(x < 1, near, np.where(x < 2, far, 0))
    weight[source >= count] = 0
    weight /= weight.cumsum(axis=0)[-1]  # sum() may add in a different order
    fixed = (weight * 2**BITS + np.copysign(0.5, weight)).astype(np.int32)  # truncates
    return first, count, np.ascontiguousarray(fixed.T)

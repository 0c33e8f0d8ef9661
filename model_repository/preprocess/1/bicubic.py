"""Pillow's bicubic, the same pixels bit for bit (seen on x86-64), in about half of Pillow's time.

Pillow (src/libImaging/Resample.c) takes one axis after the other and rounds to uint8 in between. A
pixel is a weighted sum of those around it, in fixed point, so the order of the additions changes
nothing: here they are taken for many pixels at once. Numba compiles the loops when the model loads,
for the vector instructions of this very processor; Pillow's wheels are made for any.
"""

import functools

import numpy as np
from numba import int32, int64, njit, types, uint8, uint32, void

BITS = 22  # of a weight's fraction: Pillow's PRECISION_BITS
PIECE = 2**17  # pixels that are copied out of Pillow's memory at a time
STRIP = 32  # rows that are transposed at a time: a photo's stay in the core's own cache

ROWS = types.Array(uint8, 2, "C", readonly=True)
WEIGHTS = (int64[::1], int64[::1], int32[:, ::1])


def resize(image, height, width):
    """RGB image, Pillow's or uint8 [h, w, 3] -> uint8 [height, width, 3], as
    Image.resize((width, height), BICUBIC) gives it.

    Which axis is first makes up to 8 levels of difference in tall images. It changed in Pillow 13,
    whose choice this is, with any Pillow.
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
    """uint8 [h, w, 3] -> [height, w, 3]."""
    h, w, _ = pixels.shape
    out = np.empty((height, w, 3), np.uint8)
    weigh_rows(pixels.reshape(h, -1), *weights(h, height), out.reshape(height, -1))
    return out


def across(pixels, width):
    """uint8 [h, w, 3] -> [h, width, 3]."""
    h, w, _ = pixels.shape
    out = np.empty((h, width, 3), np.uint8)
    weigh_columns(pixels.reshape(h, -1), *weights(w, width), out.reshape(h, -1))
    return out


@functools.lru_cache(32)
def weights(size, new):
    """What each of `new` pixels is made of: its first source, how many, and their weights [new, k].

    The formula is the cubic convolution of Keys (1981) with a = -0.5, stretched where it shrinks.
    Every operation is one of Pillow's, in its order: the last bit of a double decides a rounding.
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
    weight /= weight.cumsum(axis=0)[-1]  # sum() may add in another order
    fixed = (weight * 2**BITS + np.copysign(0.5, weight)).astype(np.int32)  # towards zero
    return first, count, np.ascontiguousarray(fixed.T)


@njit(void(ROWS, *WEIGHTS, uint8[:, ::1]), nogil=True)
def weigh_rows(rows, first, count, weights, out):
    """Each row of `out` [new, n] is a weighted sum of some of `rows` [size, n]."""
    total = np.empty(rows.shape[1], np.int32)
    for i in range(len(out)):
        total[:] = 1 << (BITS - 1)  # a half, so that cutting off the fraction rounds
        for j in range(count[i]):
            row, weight = rows[first[i] + j], weights[i, j]
            for n in range(len(total)):
                total[n] += np.int32(row[n]) * weight
        for n in range(len(total)):
            out[i, n] = min(max(total[n] >> BITS, 0), 255)


@njit(void(ROWS, uint32[:, ::1]), nogil=True)
def transpose(rows, columns):
    """uint8 [STRIP, n] -> [n, STRIP], of which four at a time are one uint32 (little-endian).

    Where rows are missing, the last one is there again.
    """
    last = len(rows) - 1
    for i in range(columns.shape[1]):
        a, b = rows[min(4 * i, last)], rows[min(4 * i + 1, last)]
        c, d = rows[min(4 * i + 2, last)], rows[min(4 * i + 3, last)]
        for n in range(len(columns)):
            low = uint32(a[n]) | uint32(b[n]) << uint32(8)
            columns[n, i] = low | uint32(c[n]) << uint32(16) | uint32(d[n]) << uint32(24)


@njit(void(uint8[:, ::1], uint8[:, ::1]), nogil=True)
def transpose_back(columns, rows):
    """uint8 [n, STRIP] -> as many rows of n as there are."""
    for i in range(len(rows)):
        for n in range(len(columns)):
            rows[i, n] = columns[n, i]


@njit(void(ROWS, *WEIGHTS, uint8[:, ::1]), nogil=True)
def weigh_columns(rows, first, count, weights, out):
    """The same along each row: rows [h, size * 3], out [h, new * 3], both R, G, B, R, G, B, …

    Along a row each pixel has other weights than its neighbour. So STRIP rows are turned on their
    side, where one weight meets 3 * STRIP bytes in a row.
    """
    columns = np.empty((rows.shape[1], STRIP // 4), np.uint32)
    narrow = np.empty((out.shape[1], STRIP), np.uint8)
    wide = columns.view(np.uint8).reshape(-1, 3 * STRIP)
    for y in range(0, len(rows), STRIP):
        transpose(rows[y : y + STRIP], columns)
        weigh_rows(wide, first, count, weights, narrow.reshape(-1, 3 * STRIP))
        transpose_back(narrow, out[y : y + STRIP])

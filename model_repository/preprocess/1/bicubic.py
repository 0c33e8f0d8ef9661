"""Pillow's bicubic, the same pixels bit for bit (seen on x86-64), in a third of Pillow's time.

Pillow (src/libImaging/Resample.c) takes one axis after the other and rounds to uint8 in between. A
pixel is a weighted sum of those around it, in fixed point, so the order of the additions changes
nothing: here they are taken for many pixels at once (vectors.py). Numba compiles the loops when the
model loads, for the vector instructions of this very processor; Pillow's wheels are made for any.
"""

import functools

import numpy as np
from numba import int32, int64, njit, types, uint8, void
from vectors import BITS, LANES, SQUARE, transpose_square, weigh

PIECE = 2**17  # pixels that are copied out of Pillow's memory at a time
STRIP = 64  # rows that are on their side at a time: a cache line of each column

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
    rows = pixels.reshape(h, -1)
    if 3 * w < LANES:
        rows = np.pad(rows, ((0, 0), (0, LANES - 3 * w)))
    out = np.empty((height, rows.shape[1]), np.uint8)
    weigh_rows(rows, *weights(h, height), out)
    return np.ascontiguousarray(out[:, : 3 * w]).reshape(height, w, 3)


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
    """Each row of `out` [new, n] is a weighted sum of some of `rows` [size, n], n >= LANES."""
    n = rows.shape[1]
    for i in range(len(out)):
        for lane in range(0, n, LANES):
            x = min(lane, n - LANES)  # the last ones overlap
            at, to = rows[first[i], x:].ctypes.data, out[i, x:].ctypes.data
            weigh(at, n, weights[i].ctypes.data, count[i], to)


@njit(void(ROWS, uint8[:, ::1], int64, int64), nogil=True)
def transpose(rows, columns, h, n):
    """columns[j, i] = rows[i, j] for the first h rows and n columns."""
    if min(h, n) < SQUARE:
        for i in range(h):
            for j in range(n):
                columns[j, i] = rows[i, j]
        return
    for line in range(0, h, SQUARE):
        i = min(line, h - SQUARE)  # the last squares overlap
        for column in range(0, n, SQUARE):
            j = min(column, n - SQUARE)
            at, to = rows[i, j:].ctypes.data, columns[j, i:].ctypes.data
            transpose_square(at, rows.shape[1], to, columns.shape[1])


@njit(void(ROWS, *WEIGHTS, uint8[:, ::1]), nogil=True)
def weigh_columns(rows, first, count, weights, out):
    """The same along each row: rows [h, size * 3], out [h, new * 3], both R, G, B, R, G, B, …

    Along a row each pixel has other weights than its neighbour. So STRIP rows are turned on their
    side, where one weight meets 3 * STRIP bytes in a row.
    """
    columns = np.empty((rows.shape[1], STRIP), np.uint8)
    narrow = np.empty((out.shape[1], STRIP), np.uint8)
    wide, weighed = columns.reshape(-1, 3 * STRIP), narrow.reshape(-1, 3 * STRIP)
    h = min(STRIP, len(rows))
    for line in range(0, len(rows), STRIP):
        y = min(line, len(rows) - h)
        transpose(rows[y:], columns, h, rows.shape[1])
        weigh_rows(wide, first, count, weights, weighed)
        transpose(narrow, out[y:], out.shape[1], h)

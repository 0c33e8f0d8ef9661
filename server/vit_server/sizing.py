"""Number of processes and threads that decode images and name classes, by cores and memory.

Each process decodes up to `max_image_pixels` at once, of at most 16 bytes each (1.8 GB by default),
and takes 0.1 GB idle and a segment of /dev/shm. So a server with many cores and little memory has
fewer of them.
"""

import math

from .tritonserver import SEGMENT

LEAST = 2  # as in preprocess/config.pbtxt, which explains it
# Cores that one process keeps busy: a tenth of decoding a photo (0.2 of 2.3 ms), and all work per
# batch, runs on one thread at a time.
CORES = 3
BYTES_A_PIXEL = 16


def wanted(cores: int) -> int:
    """Return how many processes of `preprocess` keep the cores busy, memory aside."""
    return max(LEAST, math.ceil(cores / CORES))


def processes(cores: int, pixels: int, memory: int, shm: int) -> int:
    """Return the number of processes of `preprocess`.

    Args:
        pixels: the most pixels that one process decodes at once.
        memory: bytes that the server may use, half of them for images being decoded.
        shm: bytes free in /dev/shm, a third of them for the initial segments of `preprocess`;
            those of `postprocess` and of an embedded `vit` are there too, and all may grow.
    """
    room = min(memory // 2 // (BYTES_A_PIXEL * pixels), shm // 3 // SEGMENT)
    return max(LEAST, min(wanted(cores), room))


def threads(cores: int, processes: int) -> int:
    """Return the threads per process.

    While one process stalls or is between two batches, the others can use all cores.
    """
    return math.ceil(cores / max(1, processes - 1))


def naming(processes: int) -> int:
    """Return the number of processes of `postprocess` for a number of those of `preprocess`.

    Naming 100 classes takes 0.19 ms of CPU time, on one thread: 5,000 images/s per process.
    """
    return math.ceil(processes / 3)

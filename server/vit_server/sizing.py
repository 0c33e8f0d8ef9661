"""How many processes decode images and name classes, on how many threads: as the cores want it.

It costs memory. Each process decodes up to `max_image_pixels` at once, of at most 16 bytes each
(1.8 GB by default), and takes 0.1 GB idle and a segment of /dev/shm. So a server with many cores
and little memory has fewer of them.
"""

import math

from .tritonserver import SEGMENT

LEAST = 2  # as in the template, whose comment says why
# That a process is to keep busy: a tenth of decoding a photo (0.2 of 2.3 ms), and all that is done
# for a batch as a whole, is for one thread at a time.
CORES = 3
BYTES_A_PIXEL = 16


def wanted(cores: int) -> int:
    """Processes of `preprocess` that keep the cores busy, where nothing else bounds them."""
    return max(LEAST, math.ceil(cores / CORES))


def processes(cores: int, pixels: int, memory: int, shm: int) -> int:
    """How many there are to be.

    Args:
        pixels: that one of them decodes at once.
        memory: bytes that the server may take, of which images being decoded get half.
        shm: bytes free in /dev/shm, of which their segments get a third, to begin with; those of
            `postprocess` and of an embedded `vit` are there too, and all of them grow.
    """
    room = min(memory // 2 // (BYTES_A_PIXEL * pixels), shm // 3 // SEGMENT)
    return max(LEAST, min(wanted(cores), room))


def threads(cores: int, processes: int) -> int:
    """In each process: while one is held up, or between two batches, the others have all cores."""
    return math.ceil(cores / max(1, processes - 1))


def naming(processes: int) -> int:
    """Processes of `postprocess`, for so many of `preprocess`.

    Naming 100 classes takes a process 0.19 ms of a core, on one thread: 5,000 images a second.
    """
    return math.ceil(processes / 3)

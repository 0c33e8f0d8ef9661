"""How many photos a second this machine's cores decode and resize, as `preprocess` does."""

import multiprocessing
import os
import sys
import threading
import time
from multiprocessing.queues import Queue
from pathlib import Path

from vit_server import sizing

from tests.load import inputs

PREPROCESS = Path(__file__).parents[2] / "model_repository" / "preprocess" / "1"


def rates(side: int, seconds: float) -> dict[int, float]:
    """Photos a second by 1, 4, 8 … of the cores, in as many processes as the server would have."""
    mine = sorted(os.sched_getaffinity(0))
    counts = [count for count in (1, 4, 8, 16, 32, 64) if count < len(mine)]
    return {count: _rate(mine[:count], side, seconds) for count in [*counts, len(mine)]}


def _rate(cores: list[int], side: int, seconds: float) -> float:
    count = sizing.wanted(len(cores))
    threads = sizing.threads(len(cores), count)
    context = multiprocessing.get_context("spawn")
    ready, found = context.Barrier(count), context.Queue()
    processes = [
        context.Process(target=_process, args=(cores, threads, side, seconds, ready, found))
        for _ in range(count)
    ]
    for process in processes:
        process.start()
    total: float = sum(found.get() for _ in processes)
    for process in processes:
        process.join()
    return total


def _process(
    cores: list[int],
    threads: int,
    side: int,
    seconds: float,
    ready: threading.Barrier,
    found: "Queue[float]",
) -> None:
    """One of them: puts its photos a second into `found`."""
    os.sched_setaffinity(0, cores)
    sys.path.append(str(PREPROCESS))
    import decode  # type: ignore[import-not-found]

    files = [path.read_bytes() for path in inputs.photos(inputs.PHOTOS)]
    room, done = decode.Room(110_000_000), [0] * threads
    end = 0.0

    def work(number: int) -> None:
        while time.perf_counter() < end:
            for file in files:
                decode.decode(file, side, side, room)
            done[number] += len(files)

    for file in files:  # what is made at the first use
        decode.decode(file, side, side, room)
    ready.wait()
    began = time.perf_counter()
    end = began + seconds
    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    found.put(sum(done) / (time.perf_counter() - began))

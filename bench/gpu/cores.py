"""Photos per second that this machine's cores decode and resize, as `preprocess` does."""

import multiprocessing
import os
import queue
import sys
import threading
import time
from multiprocessing.context import SpawnProcess
from multiprocessing.queues import Queue
from pathlib import Path

from vit_server import installation, sizing

from ..load import inputs

PREPROCESS = Path(__file__).parents[2] / "model_repository" / "preprocess" / "1"


def rates(side: int, seconds: float) -> list[dict[str, float]]:
    """Return photos/s on 1, 4, 8 … cores, with the number of processes that suits each."""
    mine = sorted(os.sched_getaffinity(0))[: installation.cores()]
    counts = [count for count in (1, 4, 8, 16, 32, 64) if count < len(mine)]
    return [
        {
            "cores": count,
            "processes": sizing.wanted(count),
            "photos": _rate(mine[:count], sizing.wanted(count), side, seconds),
        }
        for count in [*counts, len(mine)]
    ]


def _rate(cores: list[int], count: int, side: int, seconds: float) -> float:
    threads = sizing.threads(len(cores), count)
    context = multiprocessing.get_context("spawn")
    ready, found = context.Barrier(count), context.Queue()
    processes = [
        context.Process(target=_process, args=(cores, threads, side, seconds, ready, found))
        for _ in range(count)
    ]
    try:
        for process in processes:
            process.start()
        return sum(_next(found, processes) for _ in processes)
    finally:
        for process in processes:
            process.kill()


def _next(found: "Queue[float]", processes: list[SpawnProcess]) -> float:
    """Return the next result of a process. Raises RuntimeError if one exited without any."""
    while True:
        try:
            return found.get(timeout=1)
        except queue.Empty:
            if any(process.exitcode for process in processes):
                raise RuntimeError("a decoding process has exited, see above") from None


def _process(
    cores: list[int],
    threads: int,
    side: int,
    seconds: float,
    ready: threading.Barrier,
    found: "Queue[float]",
) -> None:
    """Run one process: it puts its photos/s into `found`."""
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

    for file in files:  # warm-up
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

"""What Triton's C++ LibTorch backend does with a batch, without Triton.

One process with a thread for each instance, and in each a module and a stream of its own: a copy in
for each request, from pinned memory; forward; the embeddings out. The embedded server's instances
are processes, which a GPU runs in turns, so what it does says little about how many are best.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from .bare import Network, Run
from .device import Device

SETTLE = 1.0  # seconds, in which every thread has run its first batches


def rates(
    network: Network, device: Device, instances: list[int], batches: list[int], seconds: float
) -> list[dict[str, Any]]:
    """Images a second for each count of instances and batch size."""
    return [
        {"instances": count, "batch": batch, "images": rate(network, device, count, batch, seconds)}
        for count in instances
        for batch in batches
    ]


def rate(network: Network, device: Device, instances: int, batch: int, seconds: float) -> float:
    """Images a second."""
    done, stop = [0] * instances, threading.Event()
    failed: list[Exception] = []

    def work(number: int) -> None:
        try:
            one = _batch(network, device, batch)
            while not stop.is_set():
                one()
                done[number] += batch
        except Exception as error:  # out of memory, most of all
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(instances)]
    try:
        for thread in threads:
            thread.start()
        while not all(done) and not failed:
            time.sleep(0.01)
        time.sleep(SETTLE if device.kind == "cuda" else 0)
        before, began = sum(done), time.perf_counter()
        time.sleep(seconds)
        found = (sum(done) - before) / (time.perf_counter() - began)
    finally:  # at Ctrl-C too
        stop.set()
        for thread in threads:
            thread.join()
    if failed:
        raise failed[0]
    return found


def _batch(network: Network, device: Device, batch: int) -> Callable[[], None]:
    """One batch of requests with an image each."""
    cuda = device.kind == "cuda"
    run: Run = network.traced(device)
    shape = (*network.checkpoint.config.image_size, 3)
    requests = [torch.randint(0, 256, shape, dtype=torch.uint8) for _ in range(batch)]
    if cuda:
        requests = [request.pin_memory() for request in requests]
    rows = torch.empty((batch, *shape), dtype=torch.uint8, device=device.kind)
    stream = torch.cuda.Stream() if cuda else None  # type: ignore[no-untyped-call]

    def one() -> None:
        on_it = torch.cuda.stream(stream) if stream else contextlib.nullcontext()
        with torch.inference_mode(), on_it:
            for row, request in zip(rows, requests, strict=True):
                row.copy_(request, non_blocking=True)
            if stream:
                stream.synchronize()  # as the backend does before it runs the network
            run(rows)[1].cpu()

    return one

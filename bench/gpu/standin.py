"""Simulates what Triton's C++ LibTorch backend does with a batch, without Triton.

One process with a thread per instance, each with its own module and stream: it copies each request
in from pinned memory, runs forward, and copies the embeddings out. The embedded server's instances
are processes, which a GPU time-slices, so they say little about the best number of instances.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from .bare import Network, Run
from .device import Device

SETTLE = 1.0  # seconds, for the first batches of every thread


def rates(
    network: Network, device: Device, instances: list[int], batches: list[int], seconds: float
) -> list[dict[str, Any]]:
    """Return images/s for each number of instances and batch size."""
    return [
        {"instances": count, "batch": batch, "images": rate(network, device, count, batch, seconds)}
        for count in instances
        for batch in batches
    ]


def rate(network: Network, device: Device, instances: int, batch: int, seconds: float) -> float:
    """Return images/s for one number of instances and one batch size."""
    done, stop = [0] * instances, threading.Event()
    failed: list[Exception] = []

    def work(number: int) -> None:
        try:
            one = _batch(network, device, batch)
            while not stop.is_set():
                one()
                done[number] += batch
        except Exception as error:  # mostly out of memory
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
    finally:  # on Ctrl-C too
        stop.set()
        for thread in threads:
            thread.join()
    if failed:
        raise failed[0]
    return found


def _batch(network: Network, device: Device, batch: int) -> Callable[[], None]:
    """Return a function that runs one batch of requests with one image each."""
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

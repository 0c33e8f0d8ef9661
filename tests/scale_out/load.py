"""Requests without a pause, each answer compared with the known right one."""

import asyncio
import contextlib
import io
import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from vit_client import AsyncClient, Client

CALLERS = 5  # of single images, of each client, beside one stream
PAUSE = 0.1  # seconds between the calls of one: the servers that start need the cores too


@dataclass
class Load:
    """What came of it so far. It goes on until the block around it ends."""

    images: list[bytes]
    right: npt.NDArray[np.float32]  # the embedding of each
    answers: int = 0
    slowest: float = 0.0  # seconds
    lost: list[str] = field(default_factory=list)  # why, for each that got no or a wrong answer
    ended: bool = False
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def go_on(self, seconds: float) -> None:
        """Until there have been some more answers, and for no less than these seconds."""
        before, started = self.answers, time.monotonic()
        while time.monotonic() - started < seconds or self.answers - before < 100:
            if self.lost:
                return
            time.sleep(0.05)

    def __str__(self) -> str:
        lost = "".join(f"\n  lost: {reason}" for reason in self.lost)
        return f"{self.answers} answers, {len(self.lost)} lost, slowest {self.slowest:.2f} s{lost}"

    def start(self) -> tuple[int, bytes, float]:
        """The next image, and when it was sent."""
        number = next(self._numbers) % len(self.images)
        return number, self.images[number], time.monotonic()

    def check(self, number: int, answer: Any) -> None:
        if np.abs(answer - self.right[number]).max() < 1e-4:
            with self._lock:
                self.answers += 1
        else:
            self.lost.append(f"a wrong answer for image {number}")

    def took(self, since: float) -> None:
        self.slowest = max(self.slowest, time.monotonic() - since)


@contextlib.contextmanager
def load(url: str, right_url: str, **settings: Any) -> Iterator[Load]:
    """A Client and an AsyncClient, each with single calls and a stream, while the block runs.

    Args:
        right_url: the server whose answers are right.
        settings: those of both clients.
    """
    images = [png(seed) for seed in range(20)]
    with Client(right_url) as client:
        state = Load(images, client.embed(images))
    threads = [
        threading.Thread(target=_run_client, args=(state, url, settings)),
        threading.Thread(target=lambda: asyncio.run(_run_async(state, url, settings))),
    ]
    for thread in threads:
        thread.start()
    try:
        yield state
    finally:
        state.ended = True
        for thread in threads:
            thread.join()


def _run_client(state: Load, url: str, settings: dict[str, Any]) -> None:
    def call() -> None:
        while not state.ended:
            number, image, sent = state.start()
            state.check(number, client.embed(image))
            state.took(sent)
            time.sleep(PAUSE)

    def stream() -> None:
        for item in client.stream(_until_ended(state)):
            state.check(item.index % len(state.images), item.result)

    def attempt(work: Any) -> None:
        try:
            work()
        except Exception as error:
            state.lost.append(repr(error))

    with Client(url, **settings) as client:
        threads = [threading.Thread(target=attempt, args=(w,)) for w in (stream, *[call] * CALLERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


async def _run_async(state: Load, url: str, settings: dict[str, Any]) -> None:
    async def call() -> None:
        while not state.ended:
            number, image, sent = state.start()
            state.check(number, await client.embed(image))
            state.took(sent)
            await asyncio.sleep(PAUSE)

    async def stream() -> None:
        async with contextlib.aclosing(client.stream(_until_ended(state))) as items:
            async for item in items:
                state.check(item.index % len(state.images), item.result)

    async with AsyncClient(url, **settings) as client:
        work = (stream(), *(call() for _ in range(CALLERS)))
        for result in await asyncio.gather(*work, return_exceptions=True):
            if isinstance(result, Exception):
                state.lost.append(repr(result))


def _until_ended(state: Load) -> Iterator[bytes]:
    for image in itertools.cycle(state.images):
        if state.ended:
            return
        time.sleep(PAUSE / 10)
        yield image


def png(seed: int) -> bytes:
    """An image of noise, different for each seed."""
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()

"""Reads and converts the images of a request in a thread, which may hang."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from ._images import Unusable

Encode = Callable[[Any], bytes]

Loaded = dict[int, "bytes | Unusable"]
"""Encoded images, or why they cannot be used, by position."""


class Threads:
    """Daemon threads, one per concurrent job. A job that hangs blocks neither the next job, nor
    `close`, nor Python's exit, which would wait for the threads of a ThreadPoolExecutor."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._idle = 0
        self._closed = False

    def run(self, job: Callable[[], None]) -> None:
        """Run `job` at once, in an idle or a new thread."""
        with self._lock:
            new = self._idle == 0
            if not new:
                self._idle -= 1
        self._jobs.put(job)
        if new:
            threading.Thread(target=self._work, daemon=True, name="vit-load").start()

    def close(self) -> None:
        """Stop the idle threads; each of the others ends with its job."""
        with self._lock:
            self._closed = True
            for _ in range(self._idle):
                self._jobs.put(None)

    def _work(self) -> None:
        while job := self._jobs.get():
            job()
            del job  # free its images before the next wait
            with self._lock:
                if self._closed:
                    return
                self._idle += 1


class Reading:
    """Loads images in a thread, one after another, until they fill a request.

    A read of a pipe that nobody writes to, or of a file on a dead mount, hangs and cannot be
    cancelled. So the images loaded so far can be taken while the thread hangs.
    """

    def __init__(
        self, images: list[Any], start: int, kept: bytes | None, room: int, encode: Encode
    ) -> None:
        """
        Args:
            images: The images of a chunk.
            start: Position of the first to load.
            kept: That image, encoded, if an earlier reading had no room for it.
            room: Maximum bytes of all together; a single image may be larger.
            encode: Loads one image.
        """
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.next = start  # the first image not loaded yet; the thread is at it
        self.kept: bytes | None = None  # that image, loaded, if there was no room for it
        self._given = kept
        self._images = images
        self._room = room
        self._encode = encode
        self._lock = threading.Lock()
        self._loaded: Loaded = {}
        self._left = False

    def run(self) -> None:
        """Load in the calling thread."""
        total = 0
        for position in range(self.next, len(self._images)):
            data = self._given or self._load(self._images[position])
            self._given = None
            with self._lock:
                if isinstance(data, bytes):
                    if total and total + len(data) > self._room and not self._left:
                        self.kept = data
                        return
                    total += len(data) + 4  # preceded by its length
                self._loaded[position] = data
                self.next = position + 1
                if self._left:
                    return

    async def wait(self, seconds: float) -> bool:
        """Whether the thread ends within that time."""
        await asyncio.wait([self.ended], timeout=max(0.0, seconds))
        return self.ended.done()

    def take(self) -> tuple[Loaded, int, bool]:
        """The images loaded so far, the position after them, and whether the thread is still at the
        image there. It loads only that one more, for another `take`."""
        with self._lock:
            loaded, self._loaded = self._loaded, {}
            self._left = True
            busy = self.next < len(self._images) and self.kept is None
            return loaded, self.next, busy

    def give_up(self) -> None:
        """Wake those that wait for the thread."""
        if not self.ended.done():
            self.ended.set_result(None)

    def run_in_thread(self) -> None:
        """Load, then wake those that wait in the event loop."""
        self.run()
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            self.ended.get_loop().call_soon_threadsafe(self.give_up)

    def _load(self, image: Any) -> bytes | Unusable:
        try:
            return self._encode(image)
        except Unusable as error:
            return error
        except Exception as error:  # from the caller's read() or __array__()
            return Unusable(f"cannot be read: {str(error) or type(error).__name__}")

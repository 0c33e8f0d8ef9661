"""Images of a request, read and converted in a thread that nobody has to wait for."""

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
"""Images as they are sent, or why they cannot be, by position."""


class Threads:
    """Daemon threads, as many as there are jobs at once. A job may hang, of which nobody takes
    notice: not the next job, not `close`, and not Python at exit, which waits for the threads of a
    ThreadPoolExecutor."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._idle = 0
        self._closed = False

    def run(self, job: Callable[[], None]) -> None:
        """Run `job` at once, in a thread that is idle or new."""
        with self._lock:
            new = self._idle == 0
            if not new:
                self._idle -= 1
        self._jobs.put(job)
        if new:
            threading.Thread(target=self._work, daemon=True, name="vit-load").start()

    def close(self) -> None:
        """End the idle threads; each of the others ends when its job does."""
        with self._lock:
            self._closed = True
            for _ in range(self._idle):
                self._jobs.put(None)

    def _work(self) -> None:
        while job := self._jobs.get():
            job()
            del job  # and the images that it has
            with self._lock:
                if self._closed:
                    return
                self._idle += 1


class Reading:
    """A thread's way through images, one after another, until they fill a request.

    A read may hang, of a pipe that nobody writes to or of a file on a server that is gone, and
    nothing can end it. So what the thread has loaded can be taken while it hangs.
    """

    def __init__(
        self, images: list[Any], start: int, kept: bytes | None, room: int, encode: Encode
    ) -> None:
        """
        Args:
            images: Those of a chunk.
            start: Position of the first to load.
            kept: That one as it is sent, if an earlier reading had no room for it.
            room: Bytes of all together; one alone may have more.
            encode: Loads one image.
        """
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.next = start  # the first that is not loaded; its thread is busy with it
        self.kept: bytes | None = None  # that one, loaded, where there was no more room for it
        self._given = kept
        self._images = images
        self._room = room
        self._encode = encode
        self._lock = threading.Lock()
        self._loaded: Loaded = {}
        self._left = False

    def run(self) -> None:
        """Load here, what needs no waiting."""
        total = 0
        for position in range(self.next, len(self._images)):
            data = self._given or self._load(self._images[position])
            self._given = None
            with self._lock:
                if isinstance(data, bytes):
                    if total and total + len(data) > self._room and not self._left:
                        self.kept = data
                        return
                    total += len(data) + 4  # its length goes before it
                self._loaded[position] = data
                self.next = position + 1
                if self._left:
                    return

    async def wait(self, seconds: float) -> bool:
        """Whether the thread comes to its end within that time."""
        await asyncio.wait([self.ended], timeout=max(0.0, seconds))
        return self.ended.done()

    def take(self) -> tuple[Loaded, int, bool]:
        """What is loaded, the position after that, and whether the thread is still busy with the
        image there. It will load that one only, for another `take`."""
        with self._lock:
            loaded, self._loaded = self._loaded, {}
            self._left = True
            busy = self.next < len(self._images) and self.kept is None
            return loaded, self.next, busy

    def give_up(self) -> None:
        """Wake whoever waits."""
        if not self.ended.done():
            self.ended.set_result(None)

    def run_in_thread(self) -> None:
        """Load in a thread, and wake whoever waits."""
        self.run()
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits any more
            self.ended.get_loop().call_soon_threadsafe(self.give_up)

    def _load(self, image: Any) -> bytes | Unusable:
        try:
            return self._encode(image)
        except Unusable as error:
            return error
        except Exception as error:  # of somebody else's read() or __array__()
            return Unusable(f"cannot be read: {str(error) or type(error).__name__}")

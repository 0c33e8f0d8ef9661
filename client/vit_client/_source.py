"""Splits any iterable or async iterable into chunks, reading ahead by at most one chunk."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Iterable
from functools import partial
from typing import Any

# Seconds to wait for a chunk to fill. A slower source sends its images as they arrive, without
# waiting for more; a faster one fills its chunks.
_LINGER = 0.01


async def chunks(
    images: Iterable[Any] | AsyncIterable[Any], size: int
) -> AsyncGenerator[list[Any], None]:
    """Lists of up to `size` images, in order.

    A list or tuple is sliced. Everything else is read ahead: an iterable in a thread of its own,
    because it may block; an async iterable in a task.
    """
    if isinstance(images, (list, tuple)):
        for start in range(0, len(images), size):
            yield list(images[start : start + size])
        return
    reader = _Reader(size)
    if isinstance(images, AsyncIterable):
        reading: asyncio.Task[None] | None = asyncio.ensure_future(reader.read_async(images))
    else:
        reading = None
        # A daemon, because a source that blocks forever must not keep the process alive. With this
        # context, so that its spans are children of the current one.
        read = partial(contextvars.copy_context().run, reader.read, images)
        threading.Thread(target=read, daemon=True, name="vit-read").start()
    try:
        while chunk := await reader.next_chunk():
            yield chunk
    finally:
        reader.stop()
        if reading is not None:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)


class _Reader:
    """A bounded buffer between whatever produces the images and the event loop."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._buffer: deque[Any] = deque()
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._room = threading.Semaphore(size)
        self._async_room = asyncio.Semaphore(size)
        self._stopped = False
        self._finished = False
        self._error: BaseException | None = None

    async def next_chunk(self) -> list[Any]:
        """The next images, at least one; empty at the end. Re-raises the source's error."""
        while not self._buffer and not self._finished:
            # Clear before checking: the producer appends before it sets the event.
            self._arrived.clear()
            if not self._buffer and not self._finished:
                await self._arrived.wait()
        if len(self._buffer) < self._size and not self._finished:
            await asyncio.sleep(_LINGER)
        chunk = [self._buffer.popleft() for _ in range(min(self._size, len(self._buffer)))]
        for _ in chunk:
            self._room.release()
            self._async_room.release()
        if not chunk and self._error is not None:
            raise self._error
        return chunk

    def stop(self) -> None:
        """Stop the producer, even while it waits for room."""
        self._stopped = True
        self._room.release()

    def read(self, images: Iterable[Any]) -> None:
        """Producer, in its own thread."""
        iterator: Any = None
        try:
            iterator = iter(images)
            for image in iterator:
                self._room.acquire()
                if self._stopped:
                    break
                self._add(image)
        except BaseException as error:
            self._error = _as_exception(error)
        finally:
            if self._stopped and hasattr(iterator, "close"):
                iterator.close()
            self._finish()

    async def read_async(self, images: AsyncIterable[Any]) -> None:
        """Producer, in a task."""
        try:
            async for image in images:
                await self._async_room.acquire()
                self._buffer.append(image)
                self._arrived.set()
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._error = _as_exception(error)
        finally:
            self._finished = True
            self._arrived.set()

    def _add(self, image: Any) -> None:
        self._buffer.append(image)
        if not self._arrived.is_set():
            self._wake()

    def _finish(self) -> None:
        self._finished = True
        self._wake()

    def _wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._arrived.set)
        except RuntimeError:  # the event loop is closed
            self._stopped = True


def _as_exception(error: BaseException) -> Exception:
    """The source's error as an Exception: others, such as SystemExit, would stop the event loop."""
    if isinstance(error, Exception):
        return error
    wrapped = RuntimeError(f"the iterable of images raised {error!r}")
    wrapped.__cause__ = error
    return wrapped

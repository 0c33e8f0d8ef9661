"""The pipeline behind every call: images into chunks, chunks into requests, answers in order."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from . import _wire
from ._channel import Settings
from ._connection import Connection
from ._images import ENCODED, Refused, Unusable, encode, name_of
from ._source import chunks
from .errors import BadImage, InvalidRequest, ServerError
from .types import Item

# A request keeps well below the 64 MB that proxies and servers commonly allow.
_MAX_REQUEST_BYTES = 32 << 20
# Larger answers gain nothing: the cost of a request is already spread over many images, and big
# messages wait for each other.
_MAX_ANSWER_BYTES = 4 << 20


class Engine:
    """Reads images, asks the server about them over one connection, and sorts out the answers."""

    def __init__(self, settings: Settings) -> None:
        self.connection = Connection(settings)
        self._pool = ThreadPoolExecutor(min(16, (os.cpu_count() or 1) + 4), "vit-load")
        self._tasks: set[asyncio.Task[Any]] = set()

    async def close(self) -> None:
        """Cancel what is in flight and close the connection."""
        self.connection.closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        # Of streams that were left in the middle. Waited for, or asyncio would report them.
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.connection.close()

    # -- one chunk ---------------------------------------------------------------------------

    async def chunk(
        self, task: str, images: list[Any], first: int, timeout: float, top_k: int
    ) -> list[Item[Any]]:
        """Answers to a few images, the first of which has index `first`. A bad image becomes an
        item with an error; every other failure raises."""
        started = time.monotonic()
        size = (await self.connection.model(timeout)).image_size
        timeout = max(0.0, timeout - (time.monotonic() - started))
        items: dict[int, Item[Any]] = {}
        row = 0
        while row < len(images):
            if all(isinstance(image, ENCODED) for image in images[row:]):
                # Nothing to read or convert: not worth a trip through a thread.
                loaded = _load(images, row, size)
            else:
                loop = asyncio.get_running_loop()
                loaded = await loop.run_in_executor(self._pool, _load, images, row, size)
            results = await self._infer(task, loaded, timeout, top_k)
            for position, result in results.items():
                items[position] = _item(task, first + position, images[position], result)
            row += len(loaded)
        return [items[position] for position in range(len(images))]

    async def _infer(
        self, task: str, loaded: dict[int, bytes | Unusable], timeout: float, top_k: int
    ) -> dict[int, Any]:
        """Result or Unusable for each of `loaded`. The server refuses a request whole if it has
        bad images, and names them; the others are sent again without those."""
        results: dict[int, Any] = {k: v for k, v in loaded.items() if isinstance(v, Unusable)}
        files = {k: v for k, v in loaded.items() if not isinstance(v, Unusable)}
        while files:
            message = _wire.request(task, list(files.values()))
            try:
                response = await self.connection.call(
                    "ModelInfer", message, timeout=timeout, task=task
                )
            except InvalidRequest as error:
                rows = list(files)
                bad = {
                    rows[row]: reason
                    for row, reason in _wire.bad_rows(error.details or "").items()
                    if row < len(rows)
                }
                if not bad:
                    raise
                for position, reason in bad.items():
                    results[position] = Refused(reason)
                    del files[position]
            else:
                answers = _wire.answer(task, response, top_k)
                if len(answers) != len(files):  # seen once, from a Triton 2.51 about to crash
                    raise ServerError(
                        f"the server answered {len(files)} images with {len(answers)} rows",
                        task=task,
                    )
                results.update(zip(files, answers, strict=True))
                break
        return results

    # -- many chunks -------------------------------------------------------------------------

    async def batches(
        self, task: str, images: Any, timeout: float, top_k: int
    ) -> AsyncGenerator[list[Item[Any]], None]:
        """Items of all images, in order, a chunk at a time. Closing it cancels what is in
        flight."""
        model = await self.connection.model(timeout)
        fitting = max(1, _MAX_ANSWER_BYTES // _wire.answer_bytes(task, model))
        source = chunks(images, min(model.max_batch_size, fitting))
        window = _Window(self.connection.settings.concurrency, timeout)
        queue: asyncio.Queue[asyncio.Task[list[Item[Any]]] | None] = asyncio.Queue()
        untaken: set[asyncio.Task[Any]] = set()

        async def send(chunk: list[Any], first: int) -> list[Item[Any]]:
            started = time.monotonic()
            items = await self.chunk(task, chunk, first, timeout, top_k)
            window.took(time.monotonic() - started)
            return items

        async def feed() -> None:
            index = 0
            try:
                await window.enter()
                async for chunk in source:
                    sending = self._start(send(chunk, index))
                    untaken.add(sending)
                    queue.put_nowait(sending)
                    index += len(chunk)
                    await window.enter()
            finally:
                queue.put_nowait(None)

        feeding = self._start(feed())
        try:
            while (sent := await queue.get()) is not None:
                items = await sent
                untaken.discard(sent)
                yield items
                window.leave()
            if self.connection.closed:
                raise self.connection.closed_meanwhile(task)
            await feeding
        finally:
            tasks = [feeding, *untaken]
            for task_left in tasks:
                task_left.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await source.aclose()

    def _start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class _Window:
    """Bounds the chunks of one call that are under way or not yet taken by the caller.

    Starts small and grows by one with each chunk that is answered in good time, so that a slow
    server is not given more than it can answer before the deadline.
    """

    def __init__(self, limit: int, timeout: float) -> None:
        self._limit = limit
        self._size = min(2, limit)
        self._slots = asyncio.Semaphore(self._size)
        self._target = timeout / 4
        self._slow = False

    async def enter(self) -> None:
        await self._slots.acquire()

    def leave(self) -> None:
        if self._slow and self._size > 1:
            self._size -= 1
        elif not self._slow and self._size < self._limit:
            self._size += 1
            self._slots.release()
            self._slots.release()
        else:
            self._slots.release()

    def took(self, seconds: float) -> None:
        self._slow = seconds > self._target


def _load(images: list[Any], start: int, size: tuple[int, int]) -> dict[int, bytes | Unusable]:
    """Encoded images from position `start` on, until they fill a request."""
    loaded: dict[int, bytes | Unusable] = {}
    total = 0
    for position in range(start, len(images)):
        try:
            data: bytes | Unusable = encode(images[position], size)
        except Unusable as error:
            data = error
        loaded[position] = data
        if not isinstance(data, Unusable):
            total += len(data)
        if total > _MAX_REQUEST_BYTES:
            break
    return loaded


def _item(task: str, index: int, image: Any, result: Any) -> Item[Any]:
    if not isinstance(result, Unusable):
        return Item(index, image, result)
    reason = str(result)
    details = reason if isinstance(result, Refused) else None
    error = BadImage(reason, index=index, name=name_of(image), task=task, details=details)
    return Item(index, image, None, error)

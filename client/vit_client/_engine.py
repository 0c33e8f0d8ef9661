"""The pipeline of every call: images to chunks, chunks to requests, results in order."""

from __future__ import annotations

import asyncio
import os
import time
import weakref
from collections.abc import AsyncGenerator, Coroutine
from functools import partial
from typing import Any, NamedTuple

from . import _wire
from ._connection import Connection
from ._images import ENCODED, Refused, Unusable, encode, is_read, name_of, too_large
from ._loading import Loaded, Reading, Threads
from ._question import Question
from ._settings import Settings
from ._source import chunks
from ._telemetry import annotate, log
from .errors import (
    BadImage,
    InvalidRequest,
    ModelChanged,
    ServerError,
    is_too_large,
    is_too_many,
)
from .types import Item

# Keeps a request well below the 64 MiB that proxies and servers commonly allow, unless one image
# alone is larger.
_MAX_REQUEST_BYTES = 32 << 20
# The part of a request that is not image data: names, shapes, and the length of each image.
_FRAME_BYTES = 4096
# Larger responses gain nothing: the cost per request is already spread over many images, and large
# messages block each other.
_MAX_ANSWER_BYTES = 4 << 20
# Seconds after which a file that is still being read no longer delays the others of its chunk; the
# same for the files after it, which likely hang for the same reason; and for conversions, which are
# slow and take much memory.
_PATIENCE = 1.0
_PATIENCE_THEN = 0.1
_PATIENCE_CONVERTING = 10.0
# Threads that load images, including those that hang: on a dead mount, all do.
_MOST_THREADS = 64


class Answered(NamedTuple):
    """A model's answers for one image."""

    answers: dict[str, Any]
    model_version: str
    sent: bytes


class Engine:
    """Reads images, sends them over one connection, and puts the results in order."""

    def __init__(self, settings: Settings) -> None:
        self.connection = Connection(settings)
        self._room = _MAX_REQUEST_BYTES
        # Limits the threads that load images, except for those that hang.
        self._loaders = asyncio.Semaphore(min(16, (os.cpu_count() or 1) + 4))
        self._readings: set[Reading] = set()
        self._threads = Threads()
        weakref.finalize(self, self._threads.close)  # if the client is never closed
        self._tasks: set[asyncio.Task[Any]] = set()

    async def close(self) -> None:
        """Cancel the requests in flight and close the connection."""
        self.connection.closed = True
        for reading in list(self._readings):
            reading.give_up()
        self._threads.close()
        # Of streams that were abandoned. Awaited, because asyncio would report pending tasks.
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.connection.close()

    # -- one chunk ---------------------------------------------------------------------------

    async def chunk(
        self, question: Question, images: list[Any], first: int, timeout: float
    ) -> list[Item[Any]]:
        """Like `_chunk`, but retries if images were scaled for a model that has been replaced."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                return await self._chunk(question, images, first, timeout)
            except ModelChanged:
                if question.model_version or time.monotonic() >= deadline:
                    raise
                self.connection.forget()

    async def _chunk(
        self, question: Question, images: list[Any], first: int, timeout: float
    ) -> list[Item[Any]]:
        """Items of a few images, the first of which has index `first`. A bad image becomes an item
        with an error; every other failure raises.

        A request's timeout starts when its first image is read. An image that is not read in time
        is a bad image: it is not the server's fault, and the others get their results.
        """
        begun = time.monotonic()
        model = await self.connection.model(timeout, question.model_version)
        if not all(isinstance(image, ENCODED) or is_read(image) for image in images):
            # They are scaled to its size; a model of another size would need other pixels.
            question = question.of_model(model.version)
        most = max(1, model.max_request_bytes - _FRAME_BYTES)
        load = partial(encode, size=model.image_size, most=most)
        results: dict[int, Any] = {}
        hanging: list[tuple[Reading, int, float]] = []
        row, kept = 0, None
        while row < len(images):
            reading = Reading(images, row, kept, min(self._room, most), load)
            patience = min(_PATIENCE_THEN if hanging else _PATIENCE, timeout / 4)
            await self._load(reading, images, patience, begun + timeout / 2, question.task)
            loaded, row, busy = reading.take()
            kept = reading.kept
            if busy:
                hanging.append((reading, row, begun + timeout))
                row += 1
            results.update(await self._infer(question, loaded, timeout, begun + timeout))
            begun = time.monotonic()
        for reading, row, deadline in hanging:
            await self._wait(reading, deadline - time.monotonic(), question.task)
            loaded, _, _ = reading.take()
            if not loaded:
                loaded = {row: Unusable(f"could not be read within {timeout:g} s")}
            results.update(await self._infer(question, loaded, timeout, deadline))
        return [
            _item(question.task, first + position, image, results[position])
            for position, image in enumerate(images)
        ]

    async def _load(
        self, reading: Reading, images: list[Any], patience: float, until: float, task: str
    ) -> None:
        """Returns when `reading` has ended, has spent longer than `patience` on one image, or at
        `until`: reading must leave some of the request's timeout."""
        if all(isinstance(image, ENCODED) for image in images[reading.next :]):
            reading.run()  # nothing to read or convert: not worth a thread
            return
        async with self._loaders:
            while len(self._readings) >= _MOST_THREADS:
                ends = [other.ended for other in self._readings]
                left = until - time.monotonic()
                if left <= 0:
                    return
                await asyncio.wait(ends, timeout=left, return_when="FIRST_COMPLETED")
            self._readings.add(reading)
            reading.ended.add_done_callback(lambda _: self._readings.discard(reading))
            self._threads.run(reading.run_in_thread)
            at = -1
            while at != reading.next < len(images) and (left := until - time.monotonic()) > 0:
                at = reading.next
                seconds = patience if is_read(images[at]) else _PATIENCE_CONVERTING
                if await self._wait(reading, min(seconds, left), task):
                    return

    async def _wait(self, reading: Reading, seconds: float, task: str) -> bool:
        try:
            ended = await reading.wait(seconds)
        except asyncio.CancelledError:
            reading.take()  # the thread ends after its current image
            if self.connection.closed:
                raise self.connection.closed_meanwhile(task) from None
            raise
        if self.connection.closed:
            raise self.connection.closed_meanwhile(task)
        return ended

    async def _infer(
        self, question: Question, loaded: Loaded, timeout: float, deadline: float
    ) -> dict[int, Any]:
        """Result or Unusable for each of `loaded`. The server rejects a whole request if it has bad
        images, and names them; the others are sent again without those."""
        results: dict[int, Any] = {k: v for k, v in loaded.items() if isinstance(v, Unusable)}
        files = {k: v for k, v in loaded.items() if not isinstance(v, Unusable)}
        while files:
            message = _wire.request(question, list(files.values()))
            log.debug("request %s: %s of %d images", message.id, question.ensemble, len(files))
            try:
                response = await self.connection.call(
                    "ModelInfer", message, timeout=timeout, deadline=deadline, task=question.task
                )
            except InvalidRequest as error:
                deadline = time.monotonic() + timeout
                if is_too_many(error):  # another server, with a lower limit than reported
                    self.connection.forget()
                    return results | await self._in_parts(question, files, timeout, error)
                if is_too_large(error, message.ByteSize()):
                    if len(files) > 1:
                        size = sum(len(data) + 4 for data in files.values())
                        self._room = min(self._room, size // 2)
                    return results | await self._in_parts(question, files, timeout, error)
                rows = list(files)
                bad = {
                    rows[row]: reason
                    for row, reason in _wire.bad_rows(error.details or "").items()
                    if row < len(rows)
                }
                if not bad:
                    raise
                for position, reason in bad.items():
                    results[position] = Refused(reason, message.id)
                    del files[position]
            else:
                answers = _wire.rows(question, response)
                if len(answers) != len(files):  # seen once, from a Triton 2.51 about to crash
                    raise ServerError(
                        f"the server answered {len(files)} images with {len(answers)} rows",
                        task=question.task,
                        request_id=message.id,
                    )
                self.connection.answered(response.model_version)
                annotate(model_version=response.model_version)
                results.update(
                    (position, Answered(answer, response.model_version, data))
                    for (position, data), answer in zip(files.items(), answers, strict=True)
                )
                break
        return results

    async def _in_parts(
        self, question: Question, files: dict[int, bytes], timeout: float, error: InvalidRequest
    ) -> dict[int, Any]:
        """Send a request again in smaller ones: it was too large for the server or a proxy in front
        of it, although within the limits that the server reports."""
        if len(files) == 1:
            return {row: too_large(len(data), error.message) for row, data in files.items()}
        half = len(files) // 2
        results: dict[int, Any] = {}
        for rows in (list(files)[:half], list(files)[half:]):
            part: Loaded = {row: files[row] for row in rows}
            deadline = time.monotonic() + timeout
            results |= await self._infer(question, part, timeout, deadline)
        return results

    # -- many chunks -------------------------------------------------------------------------

    async def batches(
        self, question: Question, images: Any, timeout: float
    ) -> AsyncGenerator[list[Item[Any]], None]:
        """Items of all images, in order, in chunks. Closing it cancels the requests in flight."""
        model = await self.connection.model(timeout, question.model_version)
        fitting = max(1, _MAX_ANSWER_BYTES // question.answer_bytes(model))
        source = chunks(images, min(model.max_batch_size, fitting))
        window = _Window(self.connection.settings.concurrency, timeout)
        queue: asyncio.Queue[asyncio.Task[list[Item[Any]]] | None] = asyncio.Queue()
        untaken: set[asyncio.Task[Any]] = set()

        async def send(chunk: list[Any], first: int) -> list[Item[Any]]:
            started = time.monotonic()
            items = await self.chunk(question, chunk, first, timeout)
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
                raise self.connection.closed_meanwhile(question.task)
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
    """Bounds the chunks of one call that are in flight or not yet taken by the caller.

    Starts small and grows by one with each chunk that completes well within the timeout, so that a
    slow server does not get more than it can process before the deadline.
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


def _item(task: str, index: int, image: Any, result: Any) -> Item[Any]:
    if isinstance(result, Answered):
        # An open file may be readable only once.
        sent = result.sent if hasattr(image, "read") else None
        version = result.model_version
        return Item(index, image, result.answers, model_version=version, _sent=sent)
    reason = str(result)
    refused = isinstance(result, Refused)
    error = BadImage(
        reason,
        index=index,
        name=name_of(image),
        task=task,
        details=reason if refused else None,
        request_id=result.request_id if refused else None,
    )
    return Item(index, image, None, error)

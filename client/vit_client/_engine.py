"""The pipeline behind every call: images into chunks, chunks into requests, answers in order."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from . import _wire
from ._channel import Settings
from ._images import ENCODED, Refused, Unusable, encode, name_of
from ._retry import RetryBudget, backoff
from ._source import chunks
from .errors import (
    BadImage,
    ClientClosed,
    DeadlineExceeded,
    InvalidRequest,
    VitClientError,
    from_grpc,
)
from .types import Item, Model

# A request keeps well below the 64 MB that proxies and servers commonly allow.
_MAX_REQUEST_BYTES = 32 << 20
# Larger answers gain nothing: the cost of a request is already spread over many images, and big
# messages wait for each other.
_MAX_ANSWER_BYTES = 4 << 20

_Call = Callable[..., Any]


class Engine:
    """One channel and what all calls over it share. Belongs to the event loop it is first used
    in."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = 0
        self._closed = False
        self._channel: grpc.aio.Channel | None = None
        self._stub: Any = None
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._budget = RetryBudget()
        self._pool = ThreadPoolExecutor(min(16, (os.cpu_count() or 1) + 4), "vit-load")
        self._model: Model | None = None
        self._model_lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    # -- lifetime ----------------------------------------------------------------------------

    def stub(self) -> Any:
        """The gRPC methods. Opens the channel on first use, so that a client which was made
        before a fork, and not used, works in the child."""
        loop = asyncio.get_running_loop()
        if self._stub is None and not self._closed:
            self._loop, self._pid = loop, os.getpid()
            self._channel = self.settings.open()
            self._stub = GRPCInferenceServiceStub(self._channel)
        if self._closed:
            raise ClientClosed("this client is closed")
        if self._pid != os.getpid():
            raise ClientClosed(forked(self._pid))
        if self._loop is not loop:
            raise ClientClosed(
                "this AsyncClient belongs to another event loop: make one for each asyncio.run()"
            )
        return self._stub

    async def close(self) -> None:
        """Cancel what is in flight and close the channel."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        channel, self._channel, self._stub = self._channel, None, None
        if channel is not None and self._pid == os.getpid():
            # Of streams that were left in the middle. Waited for, or asyncio would report them.
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await channel.close()

    # -- one request -------------------------------------------------------------------------

    async def call(
        self,
        method: str,
        message: Any,
        *,
        timeout: float,
        task: str | None = None,
        retries: int | None = None,
    ) -> Any:
        """Send one message and return its answer, trying again within one deadline.

        The deadline covers everything: the wait for one of the client's slots, every try, and
        the pauses between them.
        """
        rpc: _Call = getattr(self.stub(), method)
        left = self.settings.retries if retries is None else retries
        deadline = time.monotonic() + timeout
        await self._take_slot(timeout, task)
        try:
            for attempt in itertools.count():
                try:
                    response = await rpc(
                        message,
                        timeout=max(0.0, deadline - time.monotonic()),
                        metadata=self.settings.metadata,
                    )
                except asyncio.CancelledError:
                    # What closing the channel does to its calls.
                    if self._closed:
                        raise self._closed_meanwhile(task) from None
                    raise
                except grpc.RpcError as failure:
                    error = self._error(failure, task, timeout)
                    pause = self._pause(error, attempt, deadline) if attempt < left else None
                    if pause is None:
                        raise error from failure
                    await asyncio.sleep(pause)
                else:
                    self._budget.success()
                    return response
        finally:
            self._slots.release()

    async def _take_slot(self, timeout: float, task: str | None) -> None:
        if not self._slots.locked():
            await self._slots.acquire()
            return
        try:
            await asyncio.wait_for(self._slots.acquire(), timeout)
        except asyncio.TimeoutError:
            raise DeadlineExceeded(
                f"waited {timeout:g} s for one of this client's {self.settings.concurrency} "
                "slots for requests in flight",
                task=task,
            ) from None

    def _error(self, failure: grpc.RpcError, task: str | None, timeout: float) -> VitClientError:
        if self._closed:
            return self._closed_meanwhile(task)
        return from_grpc(failure, url=self.settings.target, task=task, timeout=timeout)

    def _closed_meanwhile(self, task: str | None) -> ClientClosed:
        return ClientClosed("the client was closed during the call", task=task)

    def _pause(self, error: VitClientError, attempt: int, deadline: float) -> float | None:
        """Seconds to wait before the next try, or None if there is none."""
        if not error.retryable:
            return None
        pause = max(backoff(attempt), self._budget.reserve())
        if time.monotonic() + pause >= deadline:
            self._budget.give_back()
            return None
        return pause

    async def model(self, timeout: float) -> Model:
        """What the server serves; asked for once."""
        if self._model is None:
            async with self._model_lock:
                if self._model is None:
                    self._model = await self._ask_model(timeout)
        return self._model

    async def _ask_model(self, timeout: float) -> Model:
        request = pb.ModelConfigRequest(name=_wire.MODEL)
        config = (await self.call("ModelConfig", request, timeout=timeout)).config
        metadata = await self.call(
            "ModelMetadata", pb.ModelMetadataRequest(name=_wire.MODEL), timeout=timeout
        )
        return _wire.model(config, max(metadata.versions, key=_number, default=""))

    # -- one chunk ---------------------------------------------------------------------------

    async def chunk(
        self, task: str, images: list[Any], first: int, timeout: float, top_k: int
    ) -> list[Item[Any]]:
        """Answers to a few images, the first of which has index `first`. A bad image becomes an
        item with an error; every other failure raises."""
        size = (await self.model(timeout)).image_size
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
                response = await self.call("ModelInfer", message, timeout=timeout, task=task)
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
                results.update(zip(files, _wire.answer(task, response, top_k), strict=True))
                break
        return results

    # -- many chunks -------------------------------------------------------------------------

    async def batches(
        self, task: str, images: Any, timeout: float, top_k: int
    ) -> AsyncGenerator[list[Item[Any]], None]:
        """Items of all images, in order, a chunk at a time. Closing it cancels what is in
        flight."""
        model = await self.model(timeout)
        fitting = max(1, _MAX_ANSWER_BYTES // _wire.answer_bytes(task, model))
        source = chunks(images, min(model.max_batch_size, fitting))
        window = _Window(self.settings.concurrency, timeout)
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
            if self._closed:
                raise self._closed_meanwhile(task)
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


def forked(pid: int) -> str:
    """What to say of a client that was used before a fork."""
    return (
        f"this client was used in process {pid} and gRPC does not survive a fork: make the client "
        f"in process {os.getpid()} instead, or start processes with the 'spawn' method"
    )


def _number(version: str) -> int:
    return int(version) if version.isdigit() else 0


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

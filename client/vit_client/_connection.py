"""One channel: opening and closing it, and calls with a deadline and retries."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from . import _wire
from ._channel import Settings
from ._retry import RetryBudget, backoff
from .errors import ClientClosed, DeadlineExceeded, VitClientError, from_grpc
from .types import Model

_Call = Callable[..., Any]


class Connection:
    """One channel and what all calls over it share. Belongs to the event loop it is first used
    in."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = 0
        self._channel: grpc.aio.Channel | None = None
        self._stub: Any = None
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._budget = RetryBudget()
        self._model: Model | None = None
        self._model_lock = asyncio.Lock()

    def stub(self) -> Any:
        """The gRPC methods. Opens the channel on first use, so that a client which was made
        before a fork, and not used, works in the child."""
        if self.closed:
            raise ClientClosed("this client is closed")
        loop = asyncio.get_running_loop()
        if self._stub is None:
            self._loop, self._pid = loop, os.getpid()
            self._channel = self.settings.open()
            self._stub = GRPCInferenceServiceStub(self._channel)
        if self._pid != os.getpid():
            raise ClientClosed(forked(self._pid))
        if self._loop is not loop:
            raise ClientClosed(
                "this AsyncClient belongs to another event loop: make one for each asyncio.run()"
            )
        return self._stub

    async def close(self) -> None:
        """Cancel what is in flight and close the channel."""
        self.closed = True
        channel, self._channel = self._channel, None
        if channel is not None and self._pid == os.getpid():
            await channel.close()

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
                    if self.closed:
                        raise self.closed_meanwhile(task) from None
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
        if self.closed:
            return self.closed_meanwhile(task)
        return from_grpc(failure, url=self.settings.target, task=task, timeout=timeout)

    def closed_meanwhile(self, task: str | None) -> ClientClosed:
        """The error for a call that close() cut off."""
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


def forked(pid: int) -> str:
    """What to say of a client that was used before a fork."""
    return (
        f"this client was used in process {pid} and gRPC does not survive a fork: make the client "
        f"in process {os.getpid()} instead, or start processes with the 'spawn' method"
    )


def _number(version: str) -> int:
    return int(version) if version.isdigit() else 0

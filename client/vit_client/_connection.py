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

# The process in which a client first used gRPC. A forked child inherits the number, and gRPC's
# state with it, which hangs or aborts there even for a channel of its own.
_grpc_pid = 0


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
        self._asking: asyncio.Task[Model] | None = None

    def stub(self) -> Any:
        """The gRPC methods. Opens the channel on first use, so that a client which was made
        before a fork, and not used, works in the child."""
        if self.closed:
            raise ClientClosed("this client is closed")
        loop = asyncio.get_running_loop()
        if self._stub is None:
            global _grpc_pid
            _grpc_pid = _grpc_pid or os.getpid()
            if _grpc_pid != os.getpid():
                raise ClientClosed(forked(_grpc_pid))
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
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)
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
        """What the server serves; asked for once, for all who wait for it."""
        deadline = time.monotonic() + timeout
        while self._model is None:
            left = deadline - time.monotonic()
            if self._asking is None:
                self._asking = asyncio.ensure_future(self._ask_model(left))
                self._asking.add_done_callback(self._asked)
            try:
                await asyncio.wait_for(asyncio.shield(self._asking), left)
            except asyncio.CancelledError:
                if self.closed:
                    raise self.closed_meanwhile(None) from None
                raise
            except (asyncio.TimeoutError, DeadlineExceeded):
                # The deadline may have been that of another caller, who asked first.
                if time.monotonic() + 0.01 >= deadline:
                    raise DeadlineExceeded(
                        f"no answer from {self.settings.target} within {timeout:.3g} s"
                    ) from None
        return self._model

    def _asked(self, asking: asyncio.Task[Model]) -> None:
        self._asking = None
        if not asking.cancelled() and asking.exception() is None:
            self._model = asking.result()

    async def _ask_model(self, timeout: float) -> Model:
        deadline = time.monotonic() + timeout
        request = pb.ModelConfigRequest(name=_wire.MODEL)
        config = (await self.call("ModelConfig", request, timeout=timeout)).config
        left = max(0.0, deadline - time.monotonic())
        metadata = await self.call(
            "ModelMetadata", pb.ModelMetadataRequest(name=_wire.MODEL), timeout=left
        )
        return _wire.model(config, max(metadata.versions, key=_number, default=""))


def forked(pid: int) -> str:
    """What to say where a client was used before a fork."""
    return (
        f"a client was used in process {pid} before process {os.getpid()} was forked from it, and "
        "gRPC does not survive a fork: start processes with the 'spawn' method, or use no client "
        "before the fork"
    )


def _number(version: str) -> int:
    return int(version) if version.isdigit() else 0

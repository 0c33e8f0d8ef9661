"""One channel: opening and closing it, and calls with a deadline and retries."""

from __future__ import annotations

import asyncio
import copy
import itertools
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from . import _protocol as pb
from . import _wire
from ._channel import open_channel
from ._retry import RetryBudget, backoff
from ._settings import Settings
from ._telemetry import Telemetry, log, retrying
from .errors import (
    ClientClosed,
    DeadlineExceeded,
    ModelChanged,
    Overloaded,
    VitClientError,
    from_grpc,
    is_neighbours,
    is_not_begun,
    is_stopping,
    shortened,
)
from .types import Model

# Attempts that do not count as retries. A server that is shutting down rejects requests at once, or
# closes its connections, as it also does with old ones; of several servers, the next attempt likely
# reaches another. Of two, every second attempt reaches the one that is shutting down, or that has
# another model.
_MOST_TURNED_AWAY = 16

# Maximum seconds before retrying a request that a malformed one in the same batch failed. The batch
# failed before any work, so the server is idle now. Later it processes another batch, during which
# the next malformed request queues up with ours: longer pauses starve callers.
_BESIDE_PAUSE = 0.1

# Minimum seconds before a channel is replaced because a server behind it is shutting down.
_MIN_CHANNEL_AGE = 1.0

# The process in which a client first used gRPC. A forked child inherits the number together with
# gRPC's state, which hangs or aborts there even for a new channel.
_grpc_pid = 0


@dataclass(eq=False)
class _Open:
    channel: grpc.aio.Channel
    methods: dict[str, Callable[..., Any]]
    since: float
    calls: int = 0  # in flight


@dataclass
class _Tries:
    """Failed attempts of one call."""

    counted: int = 0
    turned_away: int = 0


class Connection:
    """One channel and the state that all calls over it share. Bound to the event loop that first
    uses it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.telemetry = Telemetry(settings)
        self.closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = 0
        self._current: _Open | None = None
        self._left: set[_Open] = set()  # replaced channels, each with calls in flight
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._overload_budget = RetryBudget(per_success=0.1, per_second=1)
        self._neighbour_budget = RetryBudget(per_success=1, per_second=40)
        self._answered = ""  # model version of the last response; "" before the first
        self._models: dict[str, Model] = {}  # by version
        self._asking: dict[str, asyncio.Task[None]] = {}  # in flight, by version

    def _open(self) -> _Open:
        """The channel, opened on first use: so a client that was created but not used before a
        fork works in the child."""
        if self.closed:
            raise ClientClosed("this client is closed")
        loop = asyncio.get_running_loop()
        if self._loop is None:
            global _grpc_pid
            _grpc_pid = _grpc_pid or os.getpid()
            if _grpc_pid != os.getpid():
                raise ClientClosed(forked(_grpc_pid))
        elif self._pid != os.getpid():
            raise ClientClosed(forked(self._pid))
        elif self._loop is not loop:
            raise ClientClosed(
                "this AsyncClient belongs to another event loop: create one for each asyncio.run()"
            )
        if self._current is None:
            channel = open_channel(self.settings)
            self._current = _Open(channel, pb.methods(channel), time.monotonic())
            self._loop, self._pid = loop, os.getpid()
        return self._current

    async def close(self) -> None:
        """Cancel the calls in flight and close the channel."""
        self.closed = True
        asking = list(self._asking.values())
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        opened = [*self._left, *([self._current] if self._current else [])]
        self._current = None
        if self._pid == os.getpid():
            for each in opened:
                await each.channel.close()

    async def call(
        self,
        method: str,
        message: Any,
        *,
        timeout: float,
        task: str | None = None,
        retries: int | None = None,
        deadline: float | None = None,
    ) -> Any:
        """Send one message and return the response, retrying within one deadline.

        The deadline covers everything: the wait for one of the client's slots, every attempt, and
        the pauses between them. Pass `deadline`, by the monotonic clock, if a part of `timeout`
        has already elapsed.

        Even with `retries` 0, a call that no server has started to process is sent again. So is
        one for a model version that the server does not have: another server may have it.
        """
        self._open()  # raise at once if the client cannot be used
        name = f"request {message.id}" if method == "ModelInfer" else method
        left = self.settings.retries if retries is None else retries
        if deadline is None:
            deadline = time.monotonic() + timeout
        await self._take_slot(timeout, deadline, task)
        try:
            tries = _Tries()
            for number in itertools.count(1):
                begun = time.monotonic()
                log.debug("%s: try %d, %.3f s left", name, number, max(0, deadline - begun))
                try:
                    response = await self._try(method, message, task, timeout, deadline)
                except asyncio.CancelledError:
                    # Closing the channel cancels its calls.
                    if self.closed:
                        raise self.closed_meanwhile(task) from None
                    raise
                except VitClientError as error:
                    pause = self._pause(error, tries, left, deadline)
                    if pause is None or time.monotonic() + pause >= deadline:
                        why = shortened(error.message, 1000)
                        log.debug("%s: try %d failed, the last: %s", name, number, why)
                        raise
                    retrying(name, error, number, pause)
                    await asyncio.sleep(pause)
                else:
                    log.debug(
                        "%s: answered in %.3f s%s", name, time.monotonic() - begun, _by(response)
                    )
                    self._overload_budget.success()
                    self._neighbour_budget.success()
                    return response
        finally:
            self._slots.release()

    async def _try(
        self, method: str, message: Any, task: str | None, timeout: float, deadline: float
    ) -> Any:
        opened = self._open()
        opened.calls += 1
        left = max(0.0, deadline - time.monotonic())
        if method == "ModelInfer":
            message.parameters["timeout"].int64_param = _wire.queue_timeout(left)
        try:
            with self.telemetry.attempt(method, message) as metadata:
                call = opened.methods[method]
                return await call(message, timeout=left, metadata=metadata)
        except grpc.RpcError as failure:
            error = self._error(failure, task, timeout)
            error.request_id = message.id if method == "ModelInfer" else None
            if is_stopping(error):
                self._leave(opened)
            raise error from failure
        finally:
            opened.calls -= 1
            if opened in self._left and not opened.calls:
                self._left.discard(opened)
                await opened.channel.close()

    def _leave(self, opened: _Open) -> None:
        """Make the next attempt open a new channel, which resolves the name again.

        A server that is shutting down rejects requests at once, but keeps its connections open
        until it exits: gRPC would go on sending it its share.
        """
        if opened is self._current and time.monotonic() - opened.since >= _MIN_CHANNEL_AGE:
            self._left.add(opened)
            self._current = None

    async def _take_slot(self, timeout: float, deadline: float, task: str | None) -> None:
        if not self._slots.locked():
            await self._slots.acquire()
            return
        try:
            with self.telemetry.waiting():
                await asyncio.wait_for(self._slots.acquire(), deadline - time.monotonic())
        except asyncio.TimeoutError:
            raise DeadlineExceeded(
                f"waited {timeout:g} s for one of this client's {self.settings.concurrency} "
                "slots for requests in flight",
                task=task,
            ) from None

    def _error(self, failure: grpc.RpcError, task: str | None, timeout: float) -> VitClientError:
        if self.closed:
            return self.closed_meanwhile(task)
        settings = self.settings
        return from_grpc(failure, url=settings.target, task=task, timeout=timeout, tls=settings.tls)

    def closed_meanwhile(self, task: str | None) -> ClientClosed:
        """The error for a call that close() cancelled."""
        return ClientClosed("the client was closed during the call", task=task)

    def _pause(
        self, error: VitClientError, tries: _Tries, left: int, deadline: float
    ) -> float | None:
        """Seconds before the next attempt, of `left` that count; None for no further attempt."""
        unseen = is_not_begun(error) or isinstance(error, ModelChanged)
        if (unseen or (is_stopping(error) and left)) and tries.turned_away < _MOST_TURNED_AWAY:
            tries.turned_away += 1
            return random.uniform(0, 0.05)
        if is_neighbours(error) and left:
            # Not counted: a client that keeps sending malformed requests can fail most attempts.
            return self._paced(error, tries.counted, deadline)
        tries.counted += 1
        return self._paced(error, tries.counted - 1, deadline) if tries.counted <= left else None

    def _paced(self, error: VitClientError, attempt: int, deadline: float) -> float | None:
        if not error.retryable:
            return None
        # Unavailable has no budget: retries cannot harm a server that is gone, and one of several
        # that shuts down fails so many requests at once that a budget would delay them for long.
        budget = None
        pause = backoff(attempt)
        if isinstance(error, Overloaded):
            budget = self._overload_budget
            if error.retry_after is not None:
                if error.retry_after < 0:
                    return None
                pause += error.retry_after  # plus, so that not all of them come back at once
        elif is_neighbours(error):
            budget = self._neighbour_budget
            pause = random.uniform(0, _BESIDE_PAUSE)
        if budget is not None:
            pause = max(pause, budget.reserve())
        if time.monotonic() + pause >= deadline:
            if budget is not None:
                budget.give_back()
            return None
        return pause

    async def model(self, timeout: float, version: str = "") -> Model:
        """The model of this version, by default that of the last response. Each is requested once,
        for all concurrent callers.

        Raises:
            ModelChanged: The server does not have this version.
        """
        deadline = time.monotonic() + timeout
        while (wanted := version or self._answered) not in self._models:
            left = deadline - time.monotonic()
            try:
                await asyncio.wait_for(asyncio.shield(self._ask(wanted, left)), left)
            except asyncio.CancelledError:
                if self.closed:
                    raise self.closed_meanwhile(None) from None
                raise
            except (asyncio.TimeoutError, DeadlineExceeded):
                # The deadline may have been that of another caller, which sent the request.
                if time.monotonic() + 0.01 >= deadline:
                    raise DeadlineExceeded(
                        f"no answer from {self.settings.target} within {timeout:.3g} s"
                    ) from None
            except VitClientError as error:
                if version or not isinstance(error, ModelChanged):
                    # A copy, because each waiting caller sets its own request id on the error.
                    raise copy.copy(error) from error.__cause__
                self.forget()  # the model of the last response is gone
        return self._models[wanted]

    def answered(self, version: str) -> None:
        """Record the model version of a response, as the default of `model`."""
        self._answered = version

    def forget(self) -> None:
        """Drop the cached default of `model`, which is outdated."""
        self._models.pop(self._answered, None)
        self._answered = ""

    def _ask(self, version: str, timeout: float) -> asyncio.Task[None]:
        if version not in self._asking:
            asking = asyncio.ensure_future(self._ask_model(version, timeout))
            self._asking[version] = asking
            asking.add_done_callback(lambda _: self._asking.pop(version))
        return self._asking[version]

    async def _ask_model(self, version: str, timeout: float) -> None:
        request = pb.ModelConfigRequest(name=_wire.MODEL, version=version)
        config = (await self.call("ModelConfig", request, timeout=timeout)).config
        model = _wire.model(config, version)
        if problem := _wire.misfit(model.builder_version):
            log.warning("%s", problem)
        self._models[model.version] = model
        if not version and not self._answered:
            self._answered = model.version


def _by(response: Any) -> str:
    version = getattr(response, "model_version", "")
    return f", by model version {version}" if version else ""


def forked(pid: int) -> str:
    """The error message for a client that was used before a fork."""
    return (
        f"a client was used in process {pid} before process {os.getpid()} was forked from it, and "
        "gRPC does not survive a fork: start processes with the 'spawn' method, or use no client "
        "before the fork"
    )

"""Runs an AsyncClient on an event loop in a thread of its own, for `Client`."""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import weakref
from collections.abc import AsyncGenerator, Coroutine, Generator
from concurrent.futures import CancelledError, wait
from typing import Any

from ._async import AsyncClient
from ._connection import forked
from ._settings import check_threads
from .errors import ClientClosed
from .types import Item, OnError

_open: weakref.WeakSet[Bridge] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Runs before Python stops daemon threads: a stream closed later would hang on one."""
    for bridge in list(_open):
        bridge.close()


class Bridge:
    """Runs a client's calls in a thread that the first call starts: so a client that was created
    but not used before a fork works in the child."""

    def __init__(self, client: AsyncClient) -> None:
        self.client = client
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._pid = 0
        self._closed = False

    def run(self, call: Coroutine[Any, Any, Any]) -> Any:
        """Wait for `call`; cancel it if the wait is interrupted, for example by Ctrl-C."""
        try:
            loop = self._running_loop()
        except BaseException:
            call.close()  # or Python warns that it was never awaited
            raise
        future = asyncio.run_coroutine_threadsafe(call, loop)
        try:
            # In short waits: the kernel may deliver a signal to another thread, and Python runs the
            # handler only when the main thread wakes up.
            while not future.done():
                wait([future], timeout=0.2)
            return future.result()
        except BaseException as error:
            future.cancel()
            if self._closed and isinstance(error, CancelledError):
                raise ClientClosed("the client was closed during the call") from None
            raise

    def stream(
        self, batches: AsyncGenerator[list[Item[Any]], None], on_error: OnError
    ) -> Generator[Item[Any], None, None]:
        """Iterate over `batches`, switching threads once per chunk rather than per item."""
        source = _Source(batches)
        try:
            while (batch := self.run(source.next())) is not None:
                for item in batch:
                    if item.error is not None and on_error == "raise":
                        raise item.error
                    yield item
        finally:
            if not self._closed and self._pid in (0, os.getpid()):
                self.run(source.close())

    def close(self) -> None:
        """Close the client and end the thread."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            loop, thread = self._loop, self._thread
        if loop is None or thread is None or self._pid != os.getpid():
            return
        asyncio.run_coroutine_threadsafe(self._shut_down(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

    async def _shut_down(self) -> None:
        await self.client.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._closed:
                raise ClientClosed("this client is closed")
            check_threads()  # they may have been patched since the client was created
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._loop.set_exception_handler(_report)
                self._pid = os.getpid()
                self._thread = threading.Thread(
                    target=self._loop.run_forever, name="vit-client", daemon=True
                )
                self._thread.start()
                _open.add(self)
            elif self._pid != os.getpid():
                raise ClientClosed(forked(self._pid))
            elif threading.current_thread() is self._thread:
                raise ClientClosed("a Client cannot wait for itself: use AsyncClient in callbacks")
            return self._loop


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # In a process with several event loops, some versions of gRPC wake all of them for each event.
    # All but one find nothing to read, which is harmless.
    if not isinstance(context.get("exception"), BlockingIOError):
        loop.default_exception_handler(context)


class _Source:
    """Batches, with a close() that waits for a cancelled next(): a running generator cannot be
    closed."""

    def __init__(self, batches: AsyncGenerator[list[Item[Any]], None]) -> None:
        self._batches = batches
        self._turn = asyncio.Lock()

    async def next(self) -> list[Item[Any]] | None:
        async with self._turn:
            return await anext(self._batches, None)

    async def close(self) -> None:
        async with self._turn:
            await self._batches.aclose()

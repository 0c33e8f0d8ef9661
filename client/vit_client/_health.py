"""The health check."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from . import _protocol as pb
from . import _wire
from ._question import question
from .errors import VitClientError
from .types import Health

if TYPE_CHECKING:
    from ._connection import Connection

_ONE_PIXEL = b"P6 1 1 255\n\x80\x80\x80"


async def check(connection: Connection, timeout: float) -> Health:
    """Ask for the server's status, then send an image: the server may report that it is ready while
    one of its models has died and every request fails."""
    live = ready = False
    server = problem = ""
    latency = None
    deadline = time.monotonic() + timeout

    async def ask(method: str, message: Any, task: str | None = None) -> Any:
        left = max(0.001, deadline - time.monotonic())
        return await connection.call(method, message, timeout=left, task=task, retries=0)

    try:
        live = (await ask("ServerLive", pb.ServerLiveRequest())).live
        about = await ask("ServerMetadata", pb.ServerMetadataRequest())
        server = f"{about.name} {about.version}"
        ready = (await ask("ServerReady", pb.ServerReadyRequest())).ready
        started = time.monotonic()
        asked = question("embed")
        message = _wire.request(asked, [_ONE_PIXEL])
        _wire.rows(asked, await ask("ModelInfer", message, asked.task))
        latency = time.monotonic() - started
    except VitClientError as error:
        problem = error.message
    return Health(
        live=live,
        ready=ready,
        answering=latency is not None,
        latency=latency,
        server=server,
        problem=problem,
    )

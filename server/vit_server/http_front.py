"""HTTP reverse proxy in front of tritonserver, which limits the size of requests.

Any client can crash Triton's own HTTP server, on any path, including the metrics port:

- A body with the content type of a form, curl's default, is parsed on a thread's stack, at twice
  its size: 4 MiB crash the process (triton-inference-server/server#5840, evhtp_parse_query of
  libevhtp).
- So do some 500,000 chunks of one byte (before Triton 25.09).
- So does JSON nested 100,000 levels deep (before Triton 25.09); and JSON with millions of members
  takes hours of a core.
- Before Triton 26 nothing limits the memory for bodies, or what a few bytes of gzip expand to.
- An idle keep-alive connection delays its shutdown.

So tritonserver listens on loopback, and this proxy on the public address. Health checks have no
body and are answered however many requests are in flight.
"""

import asyncio
import contextlib
import logging
import math
import re
import socket
import threading
from collections.abc import AsyncIterator, Mapping
from functools import partial

import numpy as np
from aiohttp import (
    ClientConnectionError,
    ClientError,
    ClientSession,
    ClientTimeout,
    TCPConnector,
    web,
)
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from .tracing import unwanted

MAX_REQUEST_BYTES = 64 << 20
BODIES = 8  # of the largest size; this much may be in memory at once
BODY_SECONDS = 60  # for a body to arrive
IDLE_SECONDS = 60  # for a connection without a request, or with incomplete headers
MAX_NESTING = 100  # levels of JSON, as in newer versions of Triton
MAX_MEMBERS = 10_000  # in all objects of the JSON together
_STEPS = np.zeros(256, np.int32)  # change of JSON's nesting depth, by byte
_STEPS[list(b"[{")], _STEPS[list(b"]}")] = 1, -1
# Hop-by-hop headers. Content-Length too: a body is forwarded whole, with its own length.
_HOP_BY_HOP = (
    *("Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization", "TE", "Trailer"),
    *("Transfer-Encoding", "Upgrade", "Expect", "Content-Length"),
)
_silent = logging.getLogger(__name__)  # aiohttp logs a stack trace for malformed HTTP
_silent.setLevel(logging.CRITICAL + 1)


class HttpFront:
    """Forwards requests from listening sockets to ports on loopback, in its own thread.

    Args:
        routes: the port on loopback for each listening socket.
        max_request_bytes: the limit for a body, uncompressed.
    """

    def __init__(self, routes: Mapping[socket.socket, int], max_request_bytes: int) -> None:
        self._routes = routes
        self._max = max_request_bytes
        self._held = 0  # bytes of request bodies in memory
        self._idle_since: dict[object, float] = {}  # by connection; inf while it has a request
        self._session: ClientSession
        self._loop = asyncio.new_event_loop()
        self._stopped = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="http-front", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(timeout=5)

    def _run(self) -> None:
        # The default handler prints a stack trace when file descriptors run out; connections then
        # simply wait until others close.
        self._loop.set_exception_handler(lambda *_: None)
        self._loop.run_until_complete(self.serve(self._stopped))

    async def serve(self, stopped: asyncio.Event) -> None:
        """Serve until `stopped` is set."""
        self._session = ClientSession(
            # A connection per request: Triton does not exit while idle connections are open.
            connector=TCPConnector(limit=0, force_close=True),
            timeout=ClientTimeout(total=None),
            auto_decompress=False,
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
        )
        runners = [await self._start(listening, port) for listening, port in self._routes.items()]
        try:
            while not stopped.is_set():
                self._end_idle(runners)
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(stopped.wait(), 1)
        finally:
            for runner in runners:
                await runner.cleanup()
            await self._session.close()

    async def _start(self, listening: socket.socket, port: int) -> web.AppRunner:
        app = web.Application()
        app.router.add_route(
            "*", "/{path:.*}", partial(self._handle, port), expect_handler=self._expect
        )
        # Requests still in flight belong to a tritonserver that has exited.
        runner = web.AppRunner(app, access_log=None, logger=_silent, shutdown_timeout=1)
        await runner.setup()
        await web.SockSite(runner, listening).start()
        return runner

    def _end_idle(self, runners: list[web.AppRunner]) -> None:
        now = asyncio.get_running_loop().time()
        servers = [runner.server for runner in runners if runner.server]
        connections = [connection for server in servers for connection in server.connections]
        self._idle_since = {each: self._idle_since.get(each, now) for each in connections}
        for each in connections:
            if now - self._idle_since[each] > IDLE_SECONDS:
                each.force_close()

    async def _expect(self, request: web.Request) -> web.StreamResponse | None:
        """Answer `Expect: 100-continue`, which curl sends before a large body."""
        if (request.content_length or 0) > self._max:
            return self._too_large()
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # so that aiohttp does not count it as the response
        return None

    async def _handle(self, port: int, request: web.Request) -> web.StreamResponse:
        if (request.content_length or 0) > self._max:
            return self._too_large()
        if not request.raw_path.startswith("/"):  # an absolute URL, as sent to a proxy
            return _error(400, "this server is not a proxy")
        body: list[bytes] = []
        self._idle_since[request.protocol] = math.inf
        try:
            refusal = await asyncio.wait_for(self._receive(request, body), BODY_SECONDS)
            if refusal:
                return refusal
            text = _json(body, request.headers)
            if text.count(b":") > MAX_MEMBERS:
                return _error(400, f"the JSON has more than {MAX_MEMBERS} members")
            if nesting(text) > MAX_NESTING:
                return _error(400, f"the JSON is nested more than {MAX_NESTING} levels deep")
            return await self._pass_on(port, request, body)
        except web.RequestPayloadError as e:
            return _error(400, f"the body cannot be read: {e}")
        except asyncio.TimeoutError:
            return _error(408, f"the body did not arrive within {BODY_SECONDS} s")
        finally:
            self._release(body)
            self._idle_since[request.protocol] = asyncio.get_running_loop().time()

    async def _receive(self, request: web.Request, body: list[bytes]) -> web.StreamResponse | None:
        """Read `body`, uncompressed; return an error response if it is too large."""
        size = 0
        async for part in request.content.iter_any():
            body.append(part)
            size += len(part)
            self._held += len(part)
            if size > self._max:
                self._release(body)
                return self._too_large()
            if self._held > BODIES * self._max:
                self._release(body)  # now, so that it does not cause other requests to be rejected
                return _error(503, "too many large requests are in flight: try again later")
        return None

    def _release(self, body: list[bytes]) -> None:
        self._held -= _size(body)
        body.clear()

    async def _pass_on(
        self, port: int, request: web.Request, body: list[bytes]
    ) -> web.StreamResponse:
        headers = _passing(request.headers)
        if request.headers.get("Content-Encoding", "").lower() in ("gzip", "deflate", "br", "zstd"):
            del headers["Content-Encoding"]  # aiohttp has decompressed it
        if unwanted(headers):
            del headers["traceparent"]
        if "Content-Type" in headers:
            headers["Content-Type"] = "application/octet-stream"  # Triton requires none
        # Triton 2.51 sends a body in response to HEAD, too.
        method = "GET" if request.method == "HEAD" else request.method
        url = URL(f"http://127.0.0.1:{port}{request.raw_path}", encoded=True)
        if request.body_exists:
            headers["Content-Length"] = str(_size(body))
        data = _pieces(body) if body else None
        try:
            async with self._session.request(
                method, url, headers=headers, data=data, allow_redirects=False
            ) as answer:
                content = await answer.read()
        except ClientConnectionError:
            return _error(
                503, "tritonserver does not answer: it is starting, stopping or has failed"
            )
        except ClientError as e:
            return _error(502, f"tritonserver's response cannot be read: {e}")
        headers = _passing(answer.headers)
        headers["Server"] = "vit-server"
        return web.Response(body=content, status=answer.status, headers=headers)

    def _too_large(self) -> web.StreamResponse:
        return _error(413, f"the request is larger than {self._max} bytes (uncompressed)")


def _json(body: list[bytes], headers: CIMultiDictProxy[str]) -> bytes:
    """Return the part that Triton parses: up to the binary tensors, if a header gives a length."""
    ends = headers.getall("Inference-Header-Content-Length", [])
    if ends == ["0"]:
        return b""
    end = int(ends[0]) if len(ends) == 1 and re.fullmatch(r"\d{1,18}", ends[0]) else None
    return b"".join(body)[:end]


def nesting(text: bytes) -> int:
    """Return how deep the arrays and objects of JSON are nested."""
    # Without escapes, each quote begins or ends a string.
    text = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    deepest = depth = quotes = 0
    for start in range(0, len(text), 1 << 20):
        part = np.frombuffer(text[start : start + (1 << 20)], np.uint8)
        before = quotes + np.cumsum(part == ord('"'))
        levels = depth + np.cumsum(_STEPS[part] * (before % 2 == 0))
        deepest = max(deepest, int(levels.max()))
        depth, quotes = int(levels[-1]), int(before[-1])
    return deepest


async def _pieces(body: list[bytes]) -> AsyncIterator[bytes]:
    for part in body:
        yield part


def _size(body: list[bytes]) -> int:
    return sum(map(len, body))


def _passing(headers: Mapping[str, str]) -> CIMultiDict[str]:
    kept = CIMultiDict(headers)
    for name in _HOP_BY_HOP:
        kept.popall(name, None)
    return kept


def _error(status: int, reason: str) -> web.StreamResponse:
    """Return an error in Triton's format; it closes the connection, as body may still arrive."""
    response = web.json_response({"error": reason}, status=status)
    response.headers["Server"] = "vit-server"
    response.force_close()
    return response

"""A gRPC proxy in front of the real server, to inject faults between client and server.

It forwards messages unchanged; it can count, record, delay and reject them as an overloaded server
would, distribute them over several servers, and terminate TLS.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from vit_client import _protocol as pb

UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
FULL = (grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size")  # as Triton rejects
SERVICE = "/inference.GRPCInferenceService/"


@dataclass
class Proxy:
    """A running proxy. Its settings may be changed at any time."""

    url: str = ""
    targets: list[str] = field(default_factory=list)  # the servers, in round-robin order
    calls: list[str] = field(default_factory=list)  # method names, in order of arrival
    headers: dict[str, str] = field(default_factory=dict)  # of the last call
    ids: list[str] = field(default_factory=list)  # of the inference requests
    forwards: tuple[str, ...] = ()  # names of headers to forward
    delay: float = 0.0  # seconds before each call is forwarded
    # (status, message) for the next calls, one each; the first one for all if `forever`
    refusals: list[tuple[grpc.StatusCode, str]] = field(default_factory=list)
    forever: bool = False
    in_flight: int = 0
    held: int = 0  # of these, delayed by `delay`
    most_in_flight: int = 0
    cancelled: int = 0
    sizes: list[int] = field(default_factory=list)  # of the requests, in bytes
    most: int = 1 << 31  # maximum bytes of a request; larger ones are rejected

    @property
    def inferences(self) -> int:
        return self.calls.count("ModelInfer")

    def __post_init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}
        self.pushback = ""  # milliseconds, with each refusal
        self._turn = 0

    def target(self) -> grpc.aio.Channel:
        """The channel to the next server."""
        self._turn += 1
        url = self.targets[self._turn % len(self.targets)]
        if url not in self._channels:
            self._channels[url] = grpc.aio.insecure_channel(url, UNLIMITED)
        return self._channels[url]

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()

    async def handle(self, method: str, request: bytes, context: Any) -> Any:
        self.calls.append(method)
        self.sizes.append(len(request))
        self.headers = dict(context.invocation_metadata())
        if method == "ModelInfer":
            self.ids.append(pb.ModelInferRequest.FromString(request).id)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await self._hold(self.delay)
            if len(request) > self.most:  # with gRPC's message
                words = f"SERVER: Received message larger than max ({len(request)} vs. {self.most})"
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, words)
            if self.refusals and method == "ModelInfer":
                code, words = self.refusals[0] if self.forever else self.refusals.pop(0)
                pushback = [("grpc-retry-pushback-ms", self.pushback)] if self.pushback else []
                await context.abort(code, words, tuple(pushback))
            passed = [(name, self.headers[name]) for name in self.forwards if name in self.headers]
            return await self.target().unary_unary(SERVICE + method)(request, metadata=passed)
        except grpc.aio.AioRpcError as error:
            await context.abort(error.code(), error.details())
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.in_flight -= 1

    async def _hold(self, seconds: float) -> None:
        held = int(seconds > 0)
        self.held += held
        try:
            await asyncio.sleep(seconds)
        finally:
            self.held -= held


class _Handler(grpc.GenericRpcHandler):
    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy

    def service(self, handler_call_details: Any) -> Any:
        method = handler_call_details.method.rpartition("/")[2]

        async def handle(request: bytes, context: Any) -> Any:
            return await self._proxy.handle(method, request, context)

        return grpc.unary_unary_rpc_method_handler(handle)


@contextlib.asynccontextmanager
async def _running(proxy: Proxy, credentials: grpc.ServerCredentials | None) -> AsyncIterator[None]:
    server = grpc.aio.server(options=UNLIMITED)
    server.add_generic_rpc_handlers((_Handler(proxy),))
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    proxy.url = f"127.0.0.1:{port}"
    await server.start()
    try:
        yield
    finally:
        await server.stop(0)
        await proxy.close()


@contextlib.contextmanager
def proxying(target: str, credentials: grpc.ServerCredentials | None = None) -> Iterator[Proxy]:
    """A proxy to `target`, in its own thread and event loop."""
    proxy = Proxy(targets=[target])
    started, stop = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def run() -> None:
        async with _running(proxy, credentials):
            started.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()))
    thread.start()
    try:
        assert started.wait(10)
        yield proxy
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()

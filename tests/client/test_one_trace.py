"""The SDK's and the server's spans in one trace, as an exporter and a collector get them."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path

import otlp
import pytest
from conftest import serving
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from vit_client import AsyncClient, BadImage

from .conftest import encoded
from .proxy import FULL, Proxy, proxying

TRY = "inference.GRPCInferenceService/ModelInfer"
IMAGES = [encoded(0), encoded(1)]


@pytest.fixture(scope="module")
def received() -> Iterator[otlp.Received]:
    with otlp.receiver() as received:
        yield received


@pytest.fixture(scope="module")
def traced(tiny_repository: Path, received: otlp.Received) -> Iterator[Proxy]:
    """A proxy in front of a server that exports its spans."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")  # ms; the default is 5 s
        with (
            serving(tiny_repository, "--otlp", received.url) as server,
            proxying(server.url) as proxy,
        ):
            proxy.forwards = ("traceparent",)
            yield proxy


async def a_list(client: AsyncClient) -> None:
    await client.embed(IMAGES)


async def a_stream(client: AsyncClient) -> None:
    async for _ in client.stream(IMAGES, task="features"):
        pass


async def no_image(client: AsyncClient) -> None:
    with pytest.raises(BadImage):
        await client.classify(b"bad")


@pytest.mark.parametrize(
    ("ask", "task", "codes", "steps"),
    [
        (a_list, "embed", [14, 0], {"preprocess", "vit"}),
        (a_stream, "features", [14, 0], {"preprocess", "vit"}),
        (no_image, "classify", [14, 3], {"preprocess"}),  # rejected there
    ],
)
def test_one_trace(
    traced: Proxy,
    received: otlp.Received,
    monkeypatch: pytest.MonkeyPatch,
    ask: Callable[[AsyncClient], Awaitable[None]],
    task: str,
    codes: list[int],
    steps: set[str],
) -> None:
    """Program, call, attempt, request, ensemble, model: each the parent of the next. The first
    attempt is rejected by the proxy."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)

    async def run() -> None:
        async with AsyncClient(traced.url) as client:
            await ask(client)

    def of_one_trace() -> list[otlp.Span]:
        """The server's spans. Triton 2.51 loses a few traces in a hundred, each completely."""
        for _ in range(20):
            exporter.clear()
            traced.refusals = [FULL]
            with provider.get_tracer("the program").start_as_current_span("job") as job:
                asyncio.run(run())
            trace_id = f"{job.get_span_context().trace_id:032x}"
            with contextlib.suppress(AssertionError):
                # The span of a request is exported after its children.
                come = received.wait(partial(has_request, trace_id), seconds=10)
                return [span for span in come if span.trace_id == trace_id]
        raise AssertionError("20 traces without the server's spans")

    theirs = of_one_trace()
    known = {span.span_id: (span.name, span.parent_id) for span in theirs}
    attempts = []
    for span in exporter.get_finished_spans():
        assert span.context is not None
        parent = f"{span.parent.span_id:016x}" if span.parent else ""
        known[f"{span.context.span_id:016x}"] = (span.name, parent)
        if span.name == TRY:
            attempts.append(span)
    above = ("job", f"vit_client.{task}", TRY, "InferRequest", task)
    ways = {way(span.span_id, known) for span in theirs if span.name != "compute"}
    assert ways == {above[:4], above, *((*above, step) for step in steps)}
    assert [(span.attributes or {})["rpc.grpc.status_code"] for span in attempts] == codes
    last = attempts[-1].context
    assert last is not None
    assert [span.parent_id for span in theirs if span.name == "InferRequest"] == [
        f"{last.span_id:016x}"
    ]


def has_request(trace_id: str, spans: list[otlp.Span]) -> bool:
    return any(span.trace_id == trace_id and span.name == "InferRequest" for span in spans)


def way(span_id: str, known: dict[str, tuple[str, str]]) -> tuple[str, ...]:
    """Names of the spans from the root of the trace to this one."""
    names = []
    while span_id:
        name, span_id = known[span_id]
        names.append(name)
    return tuple(reversed(names))

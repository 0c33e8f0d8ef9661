"""OpenTelemetry: spans and the histogram of calls."""

import asyncio
import subprocess
import sys

import pytest
from opentelemetry import metrics, propagate, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from vit_client import AsyncClient, BadImage, Client, Overloaded

from .conftest import encoded
from .proxy import FULL, Proxy

IMAGE = encoded(0)
TRY = "inference.GRPCInferenceService/ModelInfer"


@pytest.fixture(autouse=True)
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """The spans that end from now on. Patched, because a provider once set cannot be unset."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    return exporter


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> InMemoryMetricReader:
    """The metrics recorded from now on."""
    reader = InMemoryMetricReader()
    monkeypatch.setattr(metrics, "get_meter", MeterProvider([reader]).get_meter)
    return reader


def ended(spans: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    """Spans of this name, in the order in which they ended."""
    return [span for span in spans.get_finished_spans() if span.name == name]


def below(span: ReadableSpan, other: trace.SpanContext | None) -> bool:
    return other is not None and span.parent is not None and span.parent.span_id == other.span_id


def test_a_call_and_its_try(proxy: Proxy, spans: InMemorySpanExporter) -> None:
    with Client(proxy.url, token="s3cret") as client:
        version = client.model().version
        with trace.get_tracer("the program").start_as_current_span("request") as own:
            client.embed([IMAGE, encoded(1)], request_id="mine")
    (call,), (attempt,) = ended(spans, "vit_client.embed"), ended(spans, TRY)
    assert below(call, own.get_span_context())
    assert dict(call.attributes or {}) == {
        "vit.request_id": "mine",
        "vit.model_version": version,
        "vit.images": 2,
    }
    assert below(attempt, call.context)
    assert attempt.kind is trace.SpanKind.CLIENT
    host, port = proxy.url.split(":")
    assert dict(attempt.attributes or {}) == {
        "rpc.system": "grpc",
        "rpc.service": "inference.GRPCInferenceService",
        "rpc.method": "ModelInfer",
        "rpc.grpc.status_code": 0,
        "server.address": host,
        "server.port": int(port),
        "vit.request_id": "mine",
        "vit.images": 2,
        "vit.bytes": proxy.sizes[-1],
    }
    context = attempt.context
    assert context is not None
    # The server gets this attempt's span as parent; flags: sampled, random trace id.
    assert proxy.headers["traceparent"] == f"00-{context.trace_id:032x}-{context.span_id:016x}-03"
    assert "s3cret" not in "".join(span.to_json() for span in spans.get_finished_spans())


def test_a_retry_is_an_event_and_another_try(proxy: Proxy, spans: InMemorySpanExporter) -> None:
    proxy.refusals = [FULL]
    with Client(proxy.url) as client:
        client.embed(IMAGE)
    (call,), attempts = ended(spans, "vit_client.embed"), ended(spans, TRY)
    assert [span.attributes["rpc.grpc.status_code"] for span in attempts if span.attributes] == [
        14,
        0,
    ]
    assert all(below(span, call.context) for span in attempts)
    assert not attempts[0].status.is_ok
    assert attempts[0].status.description == FULL[1]
    assert (attempts[0].attributes or {})["error.type"] == "UNAVAILABLE"
    assert call.status.is_ok
    (event,) = call.events
    assert event.name == "retry"
    assert event.attributes is not None
    assert event.attributes["error.type"] == "Overloaded"
    assert event.attributes["vit.try"] == 1


def test_what_fails(proxy: Proxy, spans: InMemorySpanExporter) -> None:
    with Client(proxy.url, retries=0) as client:
        with pytest.raises(BadImage):
            client.embed(b"bad")
        proxy.refusals = [FULL]
        with pytest.raises(Overloaded):
            client.classify(IMAGE)
    for name, kind in (("embed", "BadImage"), ("classify", "Overloaded")):
        (call,) = ended(spans, f"vit_client.{name}")
        assert call.status.status_code is trace.StatusCode.ERROR
        assert (call.attributes or {})["error.type"] == kind


def test_waiting_for_a_slot(proxy: Proxy, spans: InMemorySpanExporter) -> None:
    async def run() -> None:
        async with AsyncClient(proxy.url, concurrency=1) as client:
            await client.model()
            await asyncio.gather(*(client.embed(IMAGE) for _ in range(3)))

    asyncio.run(run())
    calls, waits = ended(spans, "vit_client.embed"), ended(spans, "vit_client.wait_for_slot")
    assert len(waits) == 2
    assert {span.parent.span_id for span in waits if span.parent} < {
        span.context.span_id for span in calls if span.context
    }


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_stream_is_one_span(
    proxy: Proxy, spans: InMemorySpanExporter, asynchronous: bool
) -> None:
    """And the program's spans between two items are not its children."""
    tracer = trace.get_tracer("the program")
    images = [encoded(seed) for seed in range(40)]

    def work() -> None:
        with tracer.start_as_current_span("work"):
            pass

    async def run() -> None:
        async with AsyncClient(proxy.url) as client:
            async for _ in client.stream(images, request_id="bulk"):
                work()

    with tracer.start_as_current_span("job") as job:
        if asynchronous:
            asyncio.run(run())
        else:
            with Client(proxy.url) as client:
                for _ in client.stream(images, request_id="bulk"):
                    work()
    (call,) = ended(spans, "vit_client.embed")
    assert below(call, job.get_span_context())
    assert (call.attributes or {})["vit.images"] == 40
    attempts = ended(spans, TRY)
    assert len(attempts) == 3
    assert all(below(span, call.context) for span in attempts)
    works = ended(spans, "work")
    assert len(works) == 40
    assert all(below(span, job.get_span_context()) for span in works)


def test_a_stream_that_is_left(proxy: Proxy, spans: InMemorySpanExporter) -> None:
    with Client(proxy.url) as client:
        stream = client.stream([encoded(seed) for seed in range(100)])
        next(stream)
        stream.close()
    (call,) = ended(spans, "vit_client.embed")
    assert call.status.is_ok


def test_the_callers_own_traceparent_stays(proxy: Proxy) -> None:
    own = f"00-{'1' * 32}-{'2' * 16}-01"
    with Client(proxy.url, headers={"traceparent": own}) as client:
        client.embed(IMAGE)
    assert proxy.headers["traceparent"] == own


def test_headers_of_any_propagator(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """gRPC accepts only lower-case names and ASCII values; others are left out."""

    def inject(carrier: dict[str, str]) -> None:
        carrier |= {"X-Amzn-Trace-Id": "Root=1", "x-more": "ü", "x-bytes-bin": "a", "x y": "b"}

    monkeypatch.setattr(propagate, "inject", inject)
    with Client(proxy.url) as client:
        client.embed(IMAGE)
    assert proxy.headers["x-amzn-trace-id"] == "Root=1"
    assert not {"x-more", "x-bytes-bin", "x y"} & proxy.headers.keys()


def test_a_trace_that_is_not_kept_ends_here(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise Triton would export its spans."""
    monkeypatch.setattr(trace, "get_tracer", TracerProvider(sampler=ALWAYS_OFF).get_tracer)
    with Client(proxy.url) as client:
        client.embed(IMAGE)
    assert "traceparent" not in proxy.headers


def test_the_histogram(proxy: Proxy, reader: InMemoryMetricReader) -> None:
    with Client(proxy.url, retries=0) as client:
        client.embed(IMAGE)
        client.embed([IMAGE] * 40)
        client.classify(IMAGE)
        with pytest.raises(BadImage):
            client.embed(b"bad")
    data = reader.get_metrics_data()
    assert data is not None
    (metric,) = data.resource_metrics[0].scope_metrics[0].metrics
    assert (metric.name, metric.unit) == ("vit_client.call.duration", "s")
    found = {}
    for point in metric.data.data_points:
        assert point.explicit_bounds[0] == 0.005
        found[point.attributes["vit.task"], point.attributes["vit.outcome"]] = point.count
    assert found == {
        ("embed", "ok"): 2,
        ("classify", "ok"): 1,
        ("embed", "BadImage"): 1,
    }


@pytest.mark.parametrize("without", ["the package", "a provider"])
def test_without(proxy: Proxy, without: str) -> None:
    block = "sys.modules['opentelemetry'] = None" if without == "the package" else ""
    code = f"""
import sys
{block}
from vit_client import Client
with Client({proxy.url!r}) as client:
    print(client.embed({IMAGE!r}).shape)
    print([item.result.shape for item in client.stream([{IMAGE!r}])])
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (ran.stdout, ran.stderr) == ("(64,)\n[(64,)]\n", "")
    assert "traceparent" not in proxy.headers

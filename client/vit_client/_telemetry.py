"""Log lines; and OpenTelemetry spans and a histogram, if its API is installed.

The API alone does nothing. In a program that sets a tracer provider, the spans of this client are
children of the program's, and the server's, through `traceparent`, are children of the client's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from typing import Any, TypeVar

import grpc

from ._question import Question
from ._settings import Settings, host_and_port, is_header
from .errors import VitClientError, shortened

try:
    from opentelemetry import metrics, propagate, trace
except ImportError:  # the extra "opentelemetry" is not installed
    _installed = False
else:
    _installed = True

log = logging.getLogger("vit_client")
log.addHandler(logging.NullHandler())

_SERVICE = "inference.GRPCInferenceService"
# Seconds; OpenTelemetry's defaults are for milliseconds.
_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

T = TypeVar("T")
Metadata = tuple[tuple[str, str], ...]


class Telemetry:
    """Telemetry of one client. Without the API or a provider it costs next to nothing."""

    def __init__(self, settings: Settings) -> None:
        self._metadata: Metadata = settings.metadata
        self._server = dict(
            zip(("server.address", "server.port"), host_and_port(settings.target), strict=False)
        )
        if _installed:
            self._tracer = trace.get_tracer("vit_client")
            self._durations = metrics.get_meter("vit_client").create_histogram(
                "vit_client.call.duration",
                unit="s",
                description="Duration of calls, by task and outcome; without streams",
                explicit_bucket_boundaries_advisory=_BOUNDS,
            )

    @contextlib.contextmanager
    def call(self, asked: Question) -> Iterator[None]:
        """Record a public call: a span, and its duration in the histogram."""
        begun, outcome = time.monotonic(), "ok"
        try:
            with self._span(*_named(asked)), _naming(asked):
                yield
        except (Exception, asyncio.CancelledError) as error:
            outcome = type(error).__name__
            raise
        finally:
            if _installed:
                labels = {"vit.task": asked.task, "vit.outcome": outcome}
                self._durations.record(time.monotonic() - begun, labels)

    async def stream(
        self, asked: Question, source: AsyncGenerator[list[T], None]
    ) -> AsyncGenerator[list[T], None]:
        """What `source` yields, in one span. It is current only while `source` runs, so that the
        caller's own spans are not its children."""
        images = 0
        with self._span(*_named(asked), current=False) as span, _naming(asked):
            try:
                while True:
                    with _under(span):
                        batch = await anext(source, None)
                    if batch is None:
                        break
                    images += len(batch)
                    yield batch
            finally:
                if span is not None:
                    span.set_attribute("vit.images", images)
                await source.aclose()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A span for the wait for one of the client's slots."""
        with self._span("vit_client.wait_for_slot", {}):
            yield

    @contextlib.contextmanager
    def attempt(self, method: str, message: Any) -> Iterator[Metadata]:
        """Record one attempt of a request: a span; yields the metadata to send."""
        called = {"rpc.system": "grpc", "rpc.service": _SERVICE, "rpc.method": method}
        with self._span(f"{_SERVICE}/{method}", called | self._server, sends=True) as span:
            if span is None:
                yield self._metadata
                return
            if span.is_recording() and method == "ModelInfer":
                span.set_attribute("vit.request_id", message.id)
                span.set_attribute("vit.images", message.inputs[0].shape[0])
                span.set_attribute("vit.bytes", message.ByteSize())
            carrier: dict[str, str] = {}
            # Triton would export its spans even for a trace that is not sampled.
            if span.get_span_context().trace_flags.sampled:
                propagate.inject(carrier)
            own = dict(self._metadata)
            added = {
                name.lower(): value  # gRPC accepts only lower case
                for name, value in carrier.items()
                if is_header(name.lower(), value)
            }
            code = 0
            try:
                yield tuple({**added, **own}.items())
            except grpc.RpcError as failure:
                code = failure.code().value[0]
                raise
            except asyncio.CancelledError:
                code = grpc.StatusCode.CANCELLED.value[0]
                raise
            finally:
                span.set_attribute("rpc.grpc.status_code", code)

    @contextlib.contextmanager
    def _span(
        self, name: str, attributes: Mapping[str, Any], *, current: bool = True, sends: bool = False
    ) -> Iterator[Any]:
        """A span that records the error that ends it; None without the API or a provider."""
        if not _installed:
            yield None
            return
        kind = trace.SpanKind.CLIENT if sends else trace.SpanKind.INTERNAL
        span = self._tracer.start_span(name, kind=kind, attributes=attributes)
        if not span.get_span_context().is_valid:  # no provider, and no trace to propagate
            yield None
            return
        try:
            with _under(span if current else None):
                yield span
        except grpc.RpcError as error:
            span.set_attribute("error.type", error.code().name)
            span.set_status(trace.StatusCode.ERROR, error.details())
            raise
        except asyncio.CancelledError:  # by the caller: not a failure
            span.set_attribute("error.type", "CancelledError")
            raise
        except Exception as error:
            span.set_attribute("error.type", type(error).__name__)
            span.set_status(trace.StatusCode.ERROR, str(error))
            raise
        finally:
            span.end()


def annotate(**attributes: Any) -> None:
    """Set attributes of the current span: `images=3` sets vit.images."""
    if _installed:
        span = trace.get_current_span()
        for name, value in attributes.items():
            span.set_attribute(f"vit.{name}", value)


def retrying(name: str, error: VitClientError, number: int, pause: float) -> None:
    """Log that the request of this name is retried after attempt `number`."""
    why = shortened(error.message, 1000)
    log.info("%s: try %d failed, again in %.3f s: %s", name, number, pause, why)
    if _installed:
        event: dict[str, str | float] = {
            "error.type": type(error).__name__,
            "error.message": error.message,
            "vit.try": number,
            "vit.pause": pause,
        }
        trace.get_current_span().add_event("retry", event)


def _named(asked: Question) -> tuple[str, Mapping[str, Any]]:
    return f"vit_client.{asked.task}", {"vit.request_id": asked.request_id}


@contextlib.contextmanager
def _naming(asked: Question) -> Iterator[None]:
    """Give errors raised before there is a request the id of the call."""
    try:
        yield
    except VitClientError as error:
        error.request_id = error.request_id or asked.request_id
        raise


def _under(span: Any) -> contextlib.AbstractContextManager[Any]:
    if span is None:
        return contextlib.nullcontext()
    return trace.use_span(span, record_exception=False, set_status_on_exception=False)

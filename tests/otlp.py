"""A real receiver of OpenTelemetry traces (OTLP over HTTP) that keeps the spans."""

import base64
import contextlib
import gzip
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from google.protobuf import json_format
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

PATH = "/v1/traces"
_IDS = ("traceId", "trace_id", "spanId", "span_id", "parentSpanId", "parent_span_id")
_STATUS = ("unset", "ok", "error")


@dataclass(frozen=True)
class Event:
    """One event of a span."""

    name: str
    time: int  # nanoseconds since 1970
    attributes: dict[str, Any]


@dataclass(frozen=True)
class Span:
    """One span; ids are hexadecimal."""

    name: str
    kind: str  # server, client, internal, …
    trace_id: str
    span_id: str
    parent_id: str  # empty for the root of a trace
    start: int  # nanoseconds since 1970
    end: int
    attributes: dict[str, Any]
    events: list[Event]
    status: str  # unset, ok or error
    status_message: str
    resource: dict[str, Any]


class Received:
    """The spans received so far."""

    def __init__(self, url: str) -> None:
        self.url = url  # to POST to
        self.headers: list[dict[str, str]] = []  # of each request, with lower-case names
        self._spans: list[Span] = []
        self._changed = threading.Condition()

    @property
    def spans(self) -> list[Span]:
        with self._changed:
            return list(self._spans)

    def wait(self, enough: Callable[[list[Span]], Any], seconds: float = 120) -> list[Span]:
        """All spans, once they are `enough`; AssertionError after `seconds`."""
        with self._changed:
            come = self._changed.wait_for(lambda: enough(list(self._spans)), seconds)
            assert come, f"not enough spans in {seconds} s: {self._spans}"
            return list(self._spans)

    def _add(self, headers: dict[str, str], spans: list[Span]) -> None:
        with self._changed:
            self.headers.append(headers)
            self._spans += spans
            self._changed.notify_all()


@contextlib.contextmanager
def receiver(port: int = 0) -> Iterator[Received]:
    """Listen on 127.0.0.1, on a free port by default."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # exporters keep their connections open

        def do_POST(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            body = self.rfile.read(int(headers["content-length"]))
            if headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            kind = headers["content-type"].partition(";")[0]
            if self.path != PATH or kind not in ("application/json", "application/x-protobuf"):
                self.send_error(404 if self.path != PATH else 415)
                return
            received._add(headers, _spans(_request(body, kind)))
            answer = ExportTraceServiceResponse()
            in_json = kind == "application/json"
            content = b"{}" if in_json else answer.SerializeToString()
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        received = Received(f"http://127.0.0.1:{server.server_port}{PATH}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield received
        finally:
            server.shutdown()
            thread.join()


def _request(body: bytes, kind: str) -> ExportTraceServiceRequest:
    request = ExportTraceServiceRequest()
    if kind == "application/json":
        # OTLP's JSON has ids in hexadecimal, protobuf's in base64.
        content = json.loads(body, object_hook=_with_base64)
        json_format.ParseDict(content, request, ignore_unknown_fields=True)
    else:
        request.ParseFromString(body)
    return request


def _with_base64(member: dict[str, Any]) -> dict[str, Any]:
    for name in _IDS:
        if name in member:
            member[name] = base64.b64encode(bytes.fromhex(member[name])).decode()
    return member


def _spans(request: ExportTraceServiceRequest) -> list[Span]:
    return [
        Span(
            name=span.name,
            kind=span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_").lower(),
            trace_id=span.trace_id.hex(),
            span_id=span.span_id.hex(),
            parent_id=span.parent_span_id.hex(),
            start=span.start_time_unix_nano,
            end=span.end_time_unix_nano,
            attributes=_attributes(span.attributes),
            events=[
                Event(event.name, event.time_unix_nano, _attributes(event.attributes))
                for event in span.events
            ],
            status=_STATUS[span.status.code],
            status_message=span.status.message,
            resource=_attributes(of_resource.resource.attributes),
        )
        for of_resource in request.resource_spans
        for of_scope in of_resource.scope_spans
        for span in of_scope.spans
    ]


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    if kind == "kvlist_value":
        return _attributes(value.kvlist_value.values)
    return getattr(value, kind) if kind else None

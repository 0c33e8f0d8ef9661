"""A caller's trace goes on in the server: its own spans, as a collector gets them.

Over gRPC Triton overlooks some `traceparent`: it reads on behind the value's end, up to the next
zero (GrpcServerCarrier in its infer_handler.h). So several requests are sent, of which one will do.
"""

import contextlib
import secrets
import socket
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import otlp
import pytest
from conftest import BIN, PHOTOS, Server, serving, start_and_fail
from otlp import Received, Span
from processes import started
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException
from vit_server import options, tracing

from bench.edge import edge
from bench.ports import free_ports

STEPS = {"classify": {"preprocess", "vit", "postprocess"}, "embed": {"preprocess", "vit"}}
PHOTO = (PHOTOS / "coffee.jpg").read_bytes()


@pytest.fixture(scope="module")
def received() -> Iterator[Received]:
    with otlp.receiver() as received:
        yield received


@pytest.fixture(scope="module")
def traced(tiny_repository: Path, received: Received) -> Iterator[Server]:
    """Sends what callers trace, and nothing else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")  # ms; 5 s unless said
        patch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=testing")
        with serving(tiny_repository, "--otlp", received.url.removesuffix(tracing.PATH)) as server:
            yield server


class Caller:
    """Has a span of its own, below which the server's are to be."""

    def __init__(self, *, sampled: bool = True) -> None:
        self.trace_id, self.span_id = secrets.token_hex(16), secrets.token_hex(8)
        flags = "01" if sampled else "00"
        self.headers = {"traceparent": f"00-{self.trace_id}-{self.span_id}-{flags}"}

    def own(self, spans: list[Span]) -> list[Span]:
        return [span for span in spans if span.trace_id == self.trace_id]


Send = Callable[[Server, str, bytes, dict[str, str]], None]


def by_grpc(server: Server, model: str, image: bytes, headers: dict[str, str]) -> None:
    rows = np.array([[image]], np.object_)
    tensor = InferInput("image", rows.shape, "BYTES")
    tensor.set_data_from_numpy(rows)
    with InferenceServerClient(server.url) as client:
        client.infer(model, [tensor], headers=headers, client_timeout=120)


def by_http(server: Server, model: str, image: bytes, headers: dict[str, str]) -> None:
    headers = {"Inference-Header-Content-Length": "0", **headers}
    url = f"{server.http_url}/v2/models/{model}/infer"
    with urllib.request.urlopen(urllib.request.Request(url, image, headers), timeout=60):
        pass


def ask(
    server: Server, received: Received, send: Send, model: str, image: bytes = PHOTO
) -> tuple[Caller, dict[str, Span]]:
    """A caller, and the server's spans of its trace by name, those of `compute` as `vit.compute`.

    An answer that is an error is as good as another one.
    """
    callers = [Caller() for _ in range(12 if send is by_grpc else 1)]
    for caller in callers:
        with contextlib.suppress(InferenceServerException, urllib.error.HTTPError):
            send(server, model, image, caller.headers)

    def seen(spans: list[Span]) -> list[Caller]:
        return [each for each in callers if any(map(is_first, each.own(spans)))]

    # The first to begin ends last, and they are sent in the order of their ends.
    spans = received.wait(seen)
    caller = seen(spans)[0]
    own = caller.own(spans)
    by_id = {span.span_id: span for span in own}
    named = {
        span.name if span.name != "compute" else f"{by_id[span.parent_id].name}.compute": span
        for span in own
    }
    assert len(named) == len(own)
    return caller, named


def is_first(span: Span) -> bool:
    return span.name == "InferRequest"


@pytest.mark.parametrize("send", [by_grpc, by_http])
@pytest.mark.parametrize("model", STEPS)
def test_spans_hang_below_the_callers(
    traced: Server, received: Received, send: Send, model: str
) -> None:
    caller, spans = ask(traced, received, send, model)
    steps = STEPS[model]
    assert spans.keys() == {"InferRequest", model, *steps, *(f"{step}.compute" for step in steps)}
    assert spans["InferRequest"].parent_id == caller.span_id
    assert spans[model].parent_id == spans["InferRequest"].span_id
    for step in steps:
        assert spans[step].parent_id == spans[model].span_id
        assert spans[step].attributes["triton.model_name"] == step
        assert spans[step].start <= spans[f"{step}.compute"].start
        assert spans[f"{step}.compute"].end <= spans[step].end
    assert {span.kind for span in spans.values()} == {"server"}
    assert {span.resource["service.name"] for span in spans.values()} == {"vit-server"}
    names = {span.resource["deployment.environment.name"] for span in spans.values()}
    assert names == {"testing"}


def test_a_trace_goes_through_the_edge(traced: Server, received: Received, tmp_path: Path) -> None:
    """Over HTTP; over gRPC Triton loses some, with an edge or without."""
    with edge.running(tmp_path, {"vit-http": [traced.http_url.removeprefix("http://")]}) as door:
        context = ssl.create_default_context(cafile=door.certificates.ca_file)

        def through(_: Server, model: str, image: bytes, headers: dict[str, str]) -> None:
            token = f"Bearer {door.tenants.token()}"
            said = {"Inference-Header-Content-Length": "0", "authorization": token, **headers}
            url = f"{door.http_url}/v2/models/{model}/infer"
            asked = urllib.request.Request(url, image, said)
            with urllib.request.urlopen(asked, timeout=60, context=context):
                pass

        caller, spans = ask(traced, received, through, "embed")
    assert spans["InferRequest"].parent_id == caller.span_id


@pytest.mark.parametrize("send", [by_grpc, by_http])
def test_a_refused_image_is_seen(traced: Server, received: Received, send: Send) -> None:
    """Its trace ends where it was refused. (Triton gives its spans no status.)"""
    _, spans = ask(traced, received, send, "classify", b"not an image")
    assert spans.keys() == {"InferRequest", "classify", "preprocess", "preprocess.compute"}


def test_who_brings_no_trace_starts_none(traced: Server, received: Received) -> None:
    by_http(traced, "embed", PHOTO, {})
    ask(traced, received, by_http, "embed")  # so all that came before have come, too
    assert not [span for span in received.spans if is_first(span) and not span.parent_id]


def test_a_trace_that_is_not_kept_ends_at_the_front(traced: Server, received: Received) -> None:
    """Over HTTP. Over gRPC Triton itself gets it, and sends its spans."""
    unsampled = Caller(sampled=False)
    by_http(traced, "embed", PHOTO, unsampled.headers)
    ask(traced, received, by_http, "embed")
    assert not unsampled.own(received.spans)


@pytest.mark.parametrize(
    ("header", "unwanted"),
    [
        ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00", True),
        ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", False),
        ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-03", False),
        ("01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-02-later", True),
        ("hello", False),
        ("", False),
    ],
)
def test_what_a_caller_does_not_keep(header: str, unwanted: bool) -> None:
    assert tracing.unwanted({"traceparent": header}) is unwanted


def test_every_request_and_a_name_of_ones_own(
    tiny_repository: Path, received: Received, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=birds%20of%20ours")
    with serving(tiny_repository, "--otlp", received.url, "--trace-rate", "1") as server:
        by_grpc(server, "embed", PHOTO, {})
    # What waits is sent before the server ends.
    received.wait(lambda spans: any(map(roots_of_ours, spans)))


def roots_of_ours(span: Span) -> bool:
    return (
        is_first(span) and not span.parent_id and span.resource["service.name"] == "birds of ours"
    )


def stopped(server: Server) -> str:
    """What it has said on standard error, to its end."""
    server.process.terminate()
    assert server.process.stderr is not None
    return server.process.stderr.read()


def test_collector_that_is_away_and_comes_back(
    tiny_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests are answered, later ones are traced, and the server ends as it should."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    (port,) = free_ports(1)
    with serving(tiny_repository, "--otlp", f"http://127.0.0.1:{port}", errors=True) as server:
        for _ in range(20):
            by_http(server, "embed", PHOTO, Caller().headers)
        with otlp.receiver(port) as received:
            ask(server, received, by_http, "embed")
        by_http(server, "embed", PHOTO, Caller().headers)
        said = stopped(server)
    assert server.process.returncode == 0
    # Once a minute at most, and not in Triton's words.
    assert "vit-server: traces cannot be sent: connection failed. Failed to connect" in said
    assert "OTLP HTTP Client" not in said


def test_collector_that_never_answers(
    tiny_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More spans than wait are dropped, and requests are answered."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "16")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "8")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with serving(tiny_repository, "--otlp", url, errors=True) as server:
            for _ in range(30):
                by_http(server, "embed", PHOTO, Caller().headers)
            said = stopped(server)
    assert server.process.returncode == 0
    assert "vit-server: traces cannot be sent: queue is full - dropping span" in said
    assert "BatchSpanProcessor" not in said


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--trace-rate", "10"), "--trace-rate needs --otlp"),
        (("--otlp", "http://localhost:4318", "--trace-rate", "-1"), "-1 is not a whole number"),
        (("--otlp", "http://localhost:4318", "--trace-rate", "0.1"), "0.1 is not a whole number"),
        (("--otlp", "a:b@localhost:4318"), "--otlp: localhost:4318 is not the URL of a collector"),
        (("--otlp", "grpc://localhost:4317"), "is not the URL of a collector"),
        (("--otlp", "http://"), "is not the URL of a collector"),
        (("--otlp", "http://localhost:99999"), "is not the URL of a collector"),
        (("--otlp", "http://a:b@localhost:99999"), "--otlp: http://localhost:99999 is not the URL"),
        (("--otlp", "http://local host:4318"), "is not the URL of a collector"),
    ],
)
def test_options_that_make_no_sense(arguments: tuple[str, ...], error: str) -> None:
    command = [BIN / "vit-server", "--model-repository", ".", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert error in done.stderr


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://localhost:4318", "http://localhost:4318/v1/traces"),
        ("http://localhost:4318/", "http://localhost:4318/v1/traces"),
        ("https://[::1]:4318?token=1", "https://[::1]:4318/v1/traces?token=1"),
        ("https://collector/of/ours", "https://collector/of/ours"),
    ],
)
def test_urls_are_completed(given: str, url: str) -> None:
    assert tracing.endpoint(given) == url


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://user:pa55@localhost:4318/v1/traces", "http://localhost:4318/v1/traces"),
        ("https://user:p@55@[::1]/of/ours?token=pa55", "https://[::1]/of/ours"),
        ("http://localhost:4318/v1/traces", "http://localhost:4318/v1/traces"),
    ],
)
def test_passwords_are_not_told(url: str, told: str) -> None:
    assert tracing.told(url) == told


def test_password_is_in_no_log(tiny_repository: Path) -> None:
    free = ["--grpc-port=0", "--http-port=0", "--metrics-port=0", "--verbose"]
    url = f"http://user:pa55@127.0.0.1:{free_ports(1)[0]}"
    command = [BIN / "vit-server", "--model-repository", tiny_repository, *free, "--otlp", url]
    with started(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        log = ""
        for line in process.stdout or ():
            log += line
            if line.startswith("Ready:"):
                process.terminate()
    assert process.returncode == 0
    assert "traces   to http://127.0.0.1:" in log
    assert "pa55" not in log


@pytest.mark.parametrize("rate", ["", "0", "1"])
def test_empty_collector_turns_traces_off(rate: str) -> None:
    """Whatever the rate: in Compose each is a variable of its own."""
    args, _ = options.read(["--model-repository", ".", "--otlp", "", f"--trace-rate={rate}"])
    assert not args.otlp


def test_flags_that_would_change_them_are_refused(tiny_repository: Path) -> None:
    arguments = ["--otlp", "http://localhost:4318", "--", "--trace-config=mode=triton"]
    error = start_and_fail(tiny_repository, *arguments)
    assert error.endswith(
        "--trace-config cannot be passed to tritonserver: vit-server sets --trace-config"
    )


def test_triton_s_own_traces_are_passed_on(tiny_repository: Path, tmp_path: Path) -> None:
    """Without --otlp; an empty one is none."""
    file = tmp_path / "trace.json"
    flags = ["mode=triton", f"triton,file={file}", "rate=1", "level=TIMESTAMPS"]
    passed_on = [f"--trace-config={flag}" for flag in flags]
    with serving(tiny_repository, "--otlp", "", "--", *passed_on) as server:
        by_grpc(server, "embed", PHOTO, {})
    assert '"model_name":"embed"' in file.read_text()

"""No request body crashes the server, whatever its size, kind and pace: it is rejected, and other
requests are served."""

import contextlib
import gzip
import http.client
import itertools
import json
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from conftest import PHOTOS, Server, serving
from tritonclient.grpc import service_pb2

MIB = 1 << 20
PHOTO = (PHOTOS / "coffee.jpg").read_bytes()
INFER = "/v2/models/embed/infer"
RAW = {"Inference-Header-Content-Length": "0"}
# curl's default for a body. Triton's HTTP library then parses it on the stack.
FORM = {**RAW, "Content-Type": "application/x-www-form-urlencoded"}
# It compares the beginning only.
NEARLY = [
    f"Application/x-www-form-urlencoded{end}" for end in ("X", " foo", ",", "/x", '"', ";a=b")
]
Body = bytes | Iterator[bytes]


@pytest.fixture(scope="module")
def server(tiny_repository: Path) -> Iterator[Server]:
    """A separate server, because it may crash."""
    with serving(tiny_repository) as server:
        yield server
        assert server.process.poll() is None


def ask(
    server: Server, path: str = INFER, body: Body = b"", headers: dict[str, str] = RAW
) -> tuple[int, bytes]:
    """Status and body of the response to a POST; an iterator is sent in chunks."""
    url = server.metrics_url if path == "/metrics" else server.http_url
    host = url.removeprefix("http://").partition("/")[0]
    connection = http.client.HTTPConnection(host, timeout=120)
    try:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request("POST", path, body, headers)  # or rejected before all is sent
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def connected(server: Server) -> socket.socket:
    """A raw connection, to send what no HTTP library would."""
    host, _, port = server.http_url.removeprefix("http://").rpartition(":")
    return socket.create_connection((host, int(port)), timeout=150)


def answers(server: Server) -> None:
    status, body = ask(server, body=PHOTO, headers=FORM)
    assert status == 200
    expected = server.infer("embed", "image", [PHOTO])["embedding"][0]
    np.testing.assert_array_equal(np.frombuffer(body[-expected.nbytes :], "<f4"), expected)


@pytest.mark.parametrize("kind", NEARLY)
def test_what_nearly_is_a_form(server: Server, kind: str) -> None:
    assert ask(server, body=bytes(20 * MIB), headers=RAW | {"Content-Type": kind})[0] == 400
    answers(server)


def zeros(mib: int) -> Iterator[bytes]:
    return itertools.repeat(bytes(MIB), mib)


@pytest.mark.parametrize("headers", [FORM, RAW], ids=["form", "raw"])
@pytest.mark.parametrize("mib", [4, 20, 63])
def test_what_is_within_the_bound_is_looked_at(
    server: Server, mib: int, headers: dict[str, str]
) -> None:
    status, body = ask(server, body=bytes(mib * MIB), headers=headers)
    assert status == 400
    assert f"{mib * MIB} bytes that are not an image" in body.decode()
    answers(server)


@pytest.mark.parametrize("path", ["/metrics", "/v2/health/live", "/v2/models/none/infer", "/none"])
def test_at_any_path(server: Server, path: str) -> None:
    assert 400 <= ask(server, path, bytes(20 * MIB), FORM)[0] < 500
    answers(server)


@pytest.mark.parametrize("mib", [65, 2000])
def test_what_is_larger_is_refused(server: Server, mib: int) -> None:
    length = {"Content-Length": str(mib * MIB)}
    for headers in (FORM | length, FORM):  # known in advance, or found while receiving
        status, body = ask(server, body=zeros(mib), headers=headers)
        assert status == 413
        assert "67108864 bytes" in body.decode()
    answers(server)


def test_json(server: Server) -> None:
    tensor = {"name": "image", "shape": [1, 1], "datatype": "BYTES", "data": ["a" * 20 * MIB]}
    status, body = ask(server, body=json.dumps({"inputs": [tensor]}).encode(), headers={})
    assert status == 400
    assert f"{20 * MIB} bytes that are not an image" in body.decode()
    for start in (b"[", b'{"a":', b'["]",', b'["\\\\]\\"]",'):
        status, body = ask(server, body=start * 9_000, headers={})
        assert status == 400
        assert "nested" in body.decode()
    members = ",".join(f'"{i}":1' for i in range(1_000_000))  # each is looked up among all others
    status, body = ask(server, body=f'{{"parameters":{{{members}}}}}'.encode(), headers={})
    assert status == 400
    assert "members" in body.decode()
    length = RAW | {"Inference-Header-Content-Length": "9" * 5000}
    assert ask(server, body=b"{}", headers=length)[0] in (400, 500)
    answers(server)


def test_gzip_counts_as_what_it_becomes(server: Server) -> None:
    packed = RAW | {"Content-Encoding": "gzip"}
    assert ask(server, body=gzip.compress(PHOTO), headers=packed)[0] == 200
    assert ask(server, body=gzip.compress(bytes(20 * MIB)), headers=packed)[0] == 400
    assert ask(server, body=gzip.compress(bytes(500 * MIB)), headers=packed)[0] == 413
    assert ask(server, body=b"no gzip", headers=packed)[0] == 400
    answers(server)


def test_chunks_of_a_byte(server: Server) -> None:
    """Triton 2.51 keeps an address on the stack for each chunk."""
    head = f"POST {INFER} HTTP/1.1\r\nHost: a\r\nInference-Header-Content-Length: 0\r\n"
    with connected(server) as connection:
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        connection.sendall(b"1\r\na\r\n" * 700_000 + b"0\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 400 ")
    answers(server)


@pytest.mark.parametrize("head", ["GET /{} HTTP/1.1", "GET / HTTP/1.1\r\nX: {}", "{}"])
def test_heads(server: Server, head: str) -> None:
    with (
        connected(server) as connection,
        contextlib.suppress(BrokenPipeError, ConnectionResetError),
    ):
        connection.sendall(head.format("a" * 20 * MIB).encode() + b"\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.0 400 ")
    answers(server)


@pytest.mark.parametrize("start", ["GET http://192.0.2.1/", "OPTIONS *", "CONNECT 192.0.2.1:80"])
def test_it_is_no_proxy(server: Server, start: str) -> None:
    with connected(server) as connection:
        connection.sendall(f"{start} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 4")
    answers(server)


def test_many_at_a_time(server: Server) -> None:
    """Those for which there is room are processed; the others get status 503."""
    with ThreadPoolExecutor(24) as pool:
        large = [pool.submit(ask, server, INFER, bytes(63 * MIB), FORM) for _ in range(24)]
        statuses = {future.result()[0] for future in large}
    assert statuses <= {400, 503}
    assert 400 in statuses  # the rejected ones do not affect the others
    answers(server)


def test_slow_senders_hold_up_nobody(server: Server) -> None:
    head = f"POST {INFER} HTTP/1.1\r\nHost: a\r\nContent-Length: 60000000\r\n\r\nbody"
    slow = [connected(server) for _ in range(200)]
    try:
        for connection in slow:
            connection.sendall(head.encode())
        answers(server)
    finally:
        for connection in slow:
            connection.close()


def test_connections_that_say_nothing(tiny_repository: Path) -> None:
    """More than there are file descriptors: they block HTTP while open, but not gRPC."""
    files = ["prlimit", "--nofile=1024:1024"]
    with serving(tiny_repository, under=files) as server:
        silent = [connected(server) for _ in range(1100)]
        time.sleep(2)  # vit-server checks its processes
        assert server.infer("embed", "image", [PHOTO])["embedding"].shape == (1, 64)
        for connection in silent:
            connection.close()
        answers(server)
        server.process.terminate()
        assert server.process.wait(60) == 0


def test_connections_end_that_go_on_saying_nothing(server: Server) -> None:
    with connected(server) as connection:
        connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost:")
        assert connection.recv(1) == b""


def test_they_do_not_hold_up_its_end(tiny_repository: Path) -> None:
    with serving(tiny_repository) as server, connected(server) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 60000000\r\n\r\nbody")
        server.process.terminate()
        assert server.process.wait(60) == 0


def test_the_largest_message_of_grpc(server: Server) -> None:
    """Triton accepts any size that gRPC can carry; preprocess rejects it without decoding."""
    size = 2_000_000_000
    message = service_pb2.ModelInferRequest(model_name="embed")
    message.inputs.add(name="image", datatype="BYTES", shape=[1, 1])
    message.raw_input_contents.append(struct.pack("<I", size) + bytes(size))
    packed = message.SerializeToString()
    del message
    options = [("grpc.max_send_message_length", -1)]
    with (
        grpc.insecure_channel(server.url, options=options) as channel,
        pytest.raises(grpc.RpcError) as refused,
    ):
        channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(packed, timeout=300)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert f"{size} bytes are over the limit of 67108864" in refused.value.details()
    answers(server)

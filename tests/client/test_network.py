"""Effects of the network, and of proxies in front of the server, on a call."""

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest
from vit_client import (
    AccessDenied,
    Client,
    InvalidRequest,
    ModelNotServed,
    Overloaded,
    ServerError,
    Unavailable,
    VitClientError,
    errors,
)

from .conftest import encoded
from .http2 import dropping_packets, end_connection, http_status, peering

IMAGE = encoded(0)


# -- no connection -----------------------------------------------------------------------------


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
def test_dropped_packets_are_no_matter_of_access(tls: bool) -> None:
    """Whatever gRPC reports: its message depends on what happens first."""
    with dropping_packets() as url, Client(url, tls=tls, retries=1, timeout=60) as client:
        for _ in range(3):
            with pytest.raises(Unavailable, match="no server at") as caught:
                client.model()
            assert caught.value.retryable


def test_dropped_packets_are_retried(url: str) -> None:
    """Until the deadline, or until there is another server."""
    with dropping_packets() as nobody, Client(f"ipv4:{nobody},{url}") as client:
        assert client.embed(IMAGE).shape == (64,)


@contextlib.contextmanager
def listening(answer: bytes | None) -> Iterator[str]:
    """Not a gRPC server: it reads, answers, and closes each connection."""

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(answer or b"")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)


def test_a_tls_handshake_that_ends_may_be_a_server_that_starts() -> None:
    with (
        listening(None) as url,
        Client(url, tls=True, retries=0) as client,
        pytest.raises(Unavailable, match=r"TLS handshake failed.*plain text"),
    ):
        client.model()


# -- connections that end ----------------------------------------------------------------------


@pytest.mark.parametrize("retries", [0, 4])
def test_a_call_that_no_server_began_is_sent_again(url: str, retries: int) -> None:
    """gRPC itself retries once. Connections reach a maximum age, and the next may be closed too."""
    with (
        peering(url, *[end_connection(last_stream=0)] * 6) as peer,
        Client(peer.url, retries=retries) as client,
    ):
        assert client.embed(IMAGE).shape == (64,)
        assert peer.calls == 6


def test_a_call_that_may_have_been_begun_is_a_retry(url: str) -> None:
    with (
        peering(url, *[end_connection(last_stream=1)] * 2) as peer,
        Client(peer.url, retries=0) as client,
    ):
        with pytest.raises(Unavailable):
            client.model()
        assert peer.calls == 1
    with (
        peering(url, *[end_connection(last_stream=1)] * 2) as peer,
        Client(peer.url, retries=2) as client,
    ):
        assert client.embed(IMAGE).shape == (64,)


def test_a_server_that_begins_nothing_is_given_up(url: str) -> None:
    with (
        peering(url, *[end_connection(last_stream=0)] * 100) as peer,
        Client(peer.url, retries=0) as client,
        pytest.raises(Unavailable, match="GOAWAY"),
    ):
        client.model()


# -- proxies -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (302, AccessDenied, "redirects us: does it require a login"),
        (308, AccessDenied, "grpcs://"),
        (400, InvalidRequest, "rejects the request"),
        (401, AccessDenied, "rejects the token or login"),
        (403, AccessDenied, "denies access"),
        (404, ModelNotServed, "has no gRPC server at this address"),
        (405, ModelNotServed, "has no gRPC server at this address"),
        (407, AccessDenied, "login of its own"),
        (408, Unavailable, "whole request in time"),
        (410, ModelNotServed, "has no gRPC server at this address"),
        (411, InvalidRequest, "rejects the request"),
        (413, InvalidRequest, "does not allow requests this large"),
        (414, InvalidRequest, "rejects the request"),
        (418, InvalidRequest, "rejects the request"),
        (421, ModelNotServed, "does not serve this host name"),
        (429, Overloaded, "allows no more requests at the moment"),
        (431, InvalidRequest, "does not allow headers, or a token, this long"),
        (500, ServerError, "failed"),
        (501, ServerError, "failed"),
        (502, Unavailable, "cannot reach the server"),
        (503, Overloaded, "is overloaded, or has no server"),
        (504, Unavailable, "got no response from the server in time"),
        (520, Unavailable, "cannot reach the server"),
        (524, Unavailable, "got no response from the server in time"),
    ],
)
def test_what_a_proxy_answers(status: int, kind: type[VitClientError], words: str) -> None:
    with peering("", http_status(status)) as peer, Client(peer.url, retries=0) as client:
        with pytest.raises(VitClientError) as caught:
            client.model()
        assert type(caught.value) is kind
        text = str(caught.value)
        assert text.startswith(f"a proxy in front of {peer.url} {words}") or words in text
        assert str(status) in text
        assert "UNKNOWN" not in text


def test_a_page_that_comes_instead_of_an_answer() -> None:
    """For example a login page, with a success status."""
    with (
        peering("", http_status(200)) as peer,
        Client(peer.url, retries=0) as client,
        pytest.raises(ModelNotServed, match="does not speak gRPC: is it a login page"),
    ):
        client.model()


def test_every_status_has_a_meaning() -> None:
    for status in range(300, 600):
        kind, words = errors._http_meaning(status)
        assert issubclass(kind, VitClientError)
        assert words


@pytest.mark.parametrize(
    ("status", "kind"), [(403, AccessDenied), (407, AccessDenied), (502, Unavailable)]
)
def test_what_the_proxy_of_the_environment_answers(
    monkeypatch: pytest.MonkeyPatch, status: int, kind: type[VitClientError]
) -> None:
    """gRPC asks it for a tunnel (CONNECT), in HTTP/1.1."""
    with listening(b"HTTP/1.1 %d No\r\nContent-Length: 0\r\n\r\n" % status) as url:
        monkeypatch.setenv("grpc_proxy", f"http://{url}")
        with (
            Client("vit.example:8001", retries=0) as client,
            pytest.raises(kind, match=f"the outgoing proxy .*{status}"),
        ):
            client.model()

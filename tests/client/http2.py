"""Low-level network peers: one with hand-written HTTP/2 frames, and one that accepts no
connection."""

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS, PING, GOAWAY = 0, 1, 4, 6, 7
END_STREAM, END_HEADERS, ACK = 1, 4, 1


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


@dataclass
class Peer:
    """A server or proxy that answers each call with given frames."""

    url: str = ""
    calls: int = 0  # calls answered here
    headers: bytes = b""  # of the last call, still HPACK; gRPC sends new ones as plain text
    # The answer to the first call of each connection; further connections are forwarded.
    plan: list[Callable[[socket.socket, int], None]] = field(default_factory=list)


def end_connection(last_stream: int) -> Callable[[socket.socket, int], None]:
    """GOAWAY without an error, as at a connection's maximum age: streams up to `last_stream` were
    started. Then the connection is closed, and with it the calls in flight."""

    def answer(connection: socket.socket, stream: int) -> None:
        connection.sendall(frame(GOAWAY, payload=struct.pack(">II", last_stream, 0)))
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass

    return answer


def http_status(status: int) -> Callable[[socket.socket, int], None]:
    """A proxy's own response, with an HTML page."""

    def answer(connection: socket.socket, stream: int) -> None:
        # HPACK literals: entry 8 of the static table is :status.
        block = b"\x08\x03%d\x00\x0ccontent-type\x09text/html" % status
        connection.sendall(frame(HEADERS, END_HEADERS, stream, block))
        connection.sendall(frame(DATA, END_STREAM, stream, b"<h1>No</h1>"))

    return answer


def _read(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            raise ConnectionError
        data += more
    return data


def _speak(
    peer: Peer, connection: socket.socket, answer: Callable[[socket.socket, int], None]
) -> None:
    assert _read(connection, len(PREFACE)) == PREFACE
    connection.sendall(frame(SETTINGS))
    while True:
        head = _read(connection, 9)
        (length,) = struct.unpack(">I", b"\0" + head[:3])
        kind, flags, stream = struct.unpack(">BBI", head[3:])
        payload = _read(connection, length)
        if kind in (SETTINGS, PING) and not flags & ACK:
            connection.sendall(frame(kind, ACK, 0, payload if kind == PING else b""))
        elif kind == HEADERS:
            peer.calls += 1
            peer.headers = payload
            answer(connection, stream)


def _pass_on(connection: socket.socket, target: str) -> None:
    host, _, port = target.rpartition(":")

    def copy(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    with socket.create_connection((host, int(port))) as server:
        back = threading.Thread(target=copy, args=(server, connection))
        back.start()
        copy(connection, server)
        back.join()


@contextlib.contextmanager
def peering(target: str, *plan: Callable[[socket.socket, int], None]) -> Iterator[Peer]:
    """A peer in front of the server at `target`."""
    peer = Peer(plan=list(plan))
    connections: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            if peer.plan:
                _speak(peer, connection, peer.plan.pop(0))
            else:
                _pass_on(connection, target)

    def listen() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                connections.append(connection)
                threads.append(threading.Thread(target=serve, args=(connection,)))
                threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer.url = f"127.0.0.1:{listener.getsockname()[1]}"
        listening = threading.Thread(target=listen)
        listening.start()
        try:
            yield peer
        finally:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listening.join(10)
            for connection in connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(10)


@contextlib.contextmanager
def dropping_packets() -> Iterator[str]:
    """An address whose packets are dropped, as by a dead node: Linux drops connections to a
    listener with a full backlog."""
    with contextlib.ExitStack() as held:
        listener = held.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(10):
            waiting = held.enter_context(socket.socket())
            waiting.settimeout(1)
            try:
                waiting.connect(listener.getsockname())
            except TimeoutError:
                break
        else:
            raise AssertionError("the backlog is never full")
        yield f"127.0.0.1:{listener.getsockname()[1]}"

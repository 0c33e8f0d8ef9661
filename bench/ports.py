"""Free ports for servers that need a fixed one."""

import socket

_RESERVED: list[socket.socket] = []


def free_ports(count: int) -> list[int]:
    """Distinct ports of 127.0.0.1, which no other process is given while this one runs.

    They are bound, not listened on: a server that sets SO_REUSEADDR can listen there.
    """
    for _ in range(count):
        reserved = socket.socket()
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        _RESERVED.append(reserved)
    return [reserved.getsockname()[1] for reserved in _RESERVED[-count:]]

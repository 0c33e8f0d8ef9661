"""Free ports for servers that need a fixed one, and waiting until they respond."""

import contextlib
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


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


def wait_for(url: str, process: subprocess.Popen[Any], seconds: float = 120) -> None:
    """Return when `url` responds with success."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.1)
    pytest.fail(f"no answer from {url}; exit code: {process.poll()}")

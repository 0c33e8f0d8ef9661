"""Waiting until a server responds."""

import contextlib
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def wait_for(url: str, process: subprocess.Popen[Any], seconds: float = 120) -> None:
    """Return when `url` responds with success."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.1)
    pytest.fail(f"no answer from {url}; exit code: {process.poll()}")

"""A container of the tests: started as docker/README.md says, and gone at the end."""

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench.ports import free_ports

from .engine import TOKEN, Engine

# docker/README.md's, but for the repository and the ports.
FLAGS = ("--read-only", "--tmpfs", "/tmp:exec", "--shm-size", "1g", "--stop-timeout", "45")


@dataclass(frozen=True)
class Container:
    """A container that was started; its ports are published on loopback."""

    docker: Engine
    name: str
    url: str  # gRPC
    http_url: str

    @property
    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = self.docker.inspect(self.name)["State"]
        return found

    def log(self) -> str:
        """What it has said so far, with its errors."""
        done = self.docker("logs", self.name)
        return done.stdout + done.stderr

    def wait_until_ready(self, times: int = 1, seconds: float = 120) -> None:
        """Until it has said so, so many times: again after a restart."""
        deadline = time.monotonic() + seconds
        while self.log().count("Ready: every model has answered") < times:
            if time.monotonic() > deadline or (times == 1 and not self.state["Running"]):
                pytest.fail(f"not ready: {self.state}\n{self.log()}")
            time.sleep(0.2)

    def wait_until_ended(self, seconds: float = 120) -> int:
        """Its exit code."""
        return int(self.docker("wait", self.name, seconds=seconds).stdout)

    def python(self, code: str) -> str:
        """What a script prints inside."""
        return self.docker("exec", self.name, "python3", "-c", code).stdout.strip()

    def kill(self, word: str) -> None:
        """SIGKILL to a process whose command line has this word."""
        code = f"""
import os, pathlib, signal
for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    if {word!r} in path.read_text() and int(path.parent.name) != os.getpid():
        os.kill(int(path.parent.name), signal.SIGKILL)
        print("killed")
        break
"""
        assert self.python(code) == "killed"


@contextlib.contextmanager
def container(
    docker: Engine,
    network: str,
    image: str,
    repository: Path | None,
    *flags: str,
    hardening: tuple[str, ...] = FLAGS,
) -> Iterator[Container]:
    """Start it; it may fail. `flags` are added to README's, of which a later one counts."""
    grpc, http = free_ports(2)
    volume = [f"--volume={repository}:/models:ro"] if repository else []
    ports = [f"--publish=127.0.0.1:{grpc}:8001", f"--publish=127.0.0.1:{http}:8000"]
    words = ["run", "--detach", f"--label={TOKEN}=1", f"--network={network}"]
    name = docker(*words, *hardening, *volume, *ports, *flags, image).stdout.strip()
    try:
        yield Container(docker, name, f"127.0.0.1:{grpc}", f"http://127.0.0.1:{http}")
    finally:
        docker("rm", "--force", "--volumes", name)


def wait_until_healthy(containers: list[Container], seconds: float = 180) -> None:
    """By the engine's own HEALTHCHECK, every 30 s."""
    deadline = time.monotonic() + seconds
    for one in containers:
        while (health := one.state["Health"])["Status"] != "healthy":
            if time.monotonic() > deadline:
                pytest.fail(f"{json.dumps(health)}\n{one.log()}")
            time.sleep(1)

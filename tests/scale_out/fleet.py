"""Several embedded servers, each at an address of its own, behind one DNS name."""

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from tritonclient.grpc import InferenceServerClient

from . import dns


class Replica:
    """One vit-server."""

    def __init__(self, command: list[str], address: str, cores: set[int]) -> None:
        self.address = address
        # One thread a process: several servers share this machine.
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [*command, "--host", address]
        self._process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
        os.sched_setaffinity(self._process.pid, cores)  # before it starts anything itself
        for line in self._process.stdout or ():
            if line.startswith("gRPC"):
                self.url = line.split()[1]
            if line.startswith("Ready"):
                return
        with self._process:
            raise RuntimeError(f"vit-server ended with exit code {self._process.wait()}")

    def answered(self) -> int:
        """Requests to `embed` that this server has answered, by its own statistics."""
        with InferenceServerClient(self.url) as client:
            (stats,) = client.get_inference_statistics("embed", client_timeout=30).model_stats
        return int(stats.inference_stats.success.count)

    def stop(self) -> int:
        """As Kubernetes stops a pod; its exit code."""
        self._process.terminate()
        with self._process:
            return self._process.wait(60)

    def kill(self) -> None:
        """As a machine dies: all of its processes at once, without a word."""
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        with self._process:
            self._process.wait(60)
        for segment in Path("/dev/shm").glob(f"vit_server_{self._process.pid}_*"):
            segment.unlink(missing_ok=True)

    def cpu_seconds(self) -> float:
        """Of all its processes, so far."""
        times = [process.cpu_times() for process in self._processes()]
        return sum(time.user + time.system for time in times)

    def _processes(self) -> list[psutil.Process]:
        server = psutil.Process(self._process.pid)
        return [server, *server.children(recursive=True)]


class Fleet:
    """Replicas of one server, on one port of many loopback addresses.

    A new one gets a new address, as a pod does, and is given out by the DNS when it is ready.
    """

    def __init__(self, repository: Path, names: dns.Dns, connection_age: int) -> None:
        port = _free_port()
        self.url = f"dns://{names.authority}/{dns.NAME}:{port}"
        self.replicas: list[Replica] = []
        self._names = names
        vit_server = str(Path(sys.executable).parent / "vit-server")
        self._command = [vit_server, "--model-repository", str(repository)]
        self._command += ["--grpc-port", str(port), "--http-port", "0", "--metrics-port", "0"]
        self._command += ["--grpc-max-connection-age", str(connection_age)]
        self._numbers = itertools.count(2)

    def add(self, cores: set[int] | None = None) -> Replica:
        """Start one more, and publish it when it is ready.

        Args:
            cores: those that it may use; all if not given.
        """
        address = f"127.0.0.{next(self._numbers)}"
        self.replicas.append(Replica(self._command, address, cores or os.sched_getaffinity(0)))
        self.publish()
        return self.replicas[-1]

    def scale(self, count: int) -> None:
        """Have this many, all of them published."""
        while len(self.replicas) < count:
            self.add()
        while len(self.replicas) > count:
            self.remove(self.replicas[-1])

    def publish(self, count: int | None = None) -> None:
        """Give out the addresses of all by the DNS, or of the first few."""
        self._names.publish(replica.address for replica in self.replicas[:count])

    def remove(self, replica: Replica, pause: float = 0) -> None:
        """As Kubernetes does it: out of the DNS, a pause (preStop), then SIGTERM."""
        self.replicas.remove(replica)
        self.publish()
        time.sleep(pause)
        replica.stop()

    def kill(self, replica: Replica) -> None:
        """The DNS still gives it out."""
        replica.kill()
        self.replicas.remove(replica)


@contextlib.contextmanager
def running(repository: Path, connection_age: int) -> Iterator[Fleet]:
    """No replica yet; all are stopped at the end."""
    with dns.serving() as names:
        fleet = Fleet(repository, names, connection_age)
        try:
            yield fleet
        finally:
            fleet.scale(0)


def _free_port() -> int:
    """A port that is free at every address."""
    with socket.socket() as probe:
        probe.bind(("0.0.0.0", 0))
        return int(probe.getsockname()[1])

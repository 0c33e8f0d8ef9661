"""The server to measure: its address, what it serves, and its statistics."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritonclient.grpc import InferenceServerClient, InferenceServerException

STEPS = ("preprocess", "vit", "postprocess")


class ServerError(Exception):
    """The server did not start or does not answer; the message is for the user."""


@dataclass(frozen=True)
class Address:
    """Where a server listens for gRPC, and the TLS files for it."""

    host: str  # host:port
    tls: bool = False
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None

    def arguments(self) -> list[str]:
        """Return the corresponding arguments for perf_analyzer."""
        files = {
            "--ssl-grpc-root-certifications-file": self.ca_file,
            "--ssl-grpc-certificate-chain-file": self.cert_file,
            "--ssl-grpc-private-key-file": self.key_file,
        }
        given = [part for name, file in files.items() if file for part in (name, file)]
        return ["-u", self.host, *(["--ssl-grpc-use-ssl"] if self.tls else []), *given]


@dataclass(frozen=True)
class Counters:
    """Triton's counters of one model since it started."""

    requests: int
    images: int
    executions: int
    queue_ns: int
    compute_ns: int
    total_ns: int  # for an ensemble, until all its responses are there

    def since(self, earlier: "Counters") -> "Counters":
        """Return the difference to earlier counters."""
        return Counters(
            self.requests - earlier.requests,
            self.images - earlier.images,
            self.executions - earlier.executions,
            self.queue_ns - earlier.queue_ns,
            self.compute_ns - earlier.compute_ns,
            self.total_ns - earlier.total_ns,
        )


class Triton:
    """Queries to the server besides the load."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._client = InferenceServerClient(
            address.host,
            ssl=address.tls,
            root_certificates=address.ca_file,
            certificate_chain=address.cert_file,
            private_key=address.key_file,
        )

    def facts(self) -> dict[str, Any]:
        """Return versions, and what the builder recorded about the network.

        Raises:
            ServerError: it does not answer, or serves other models.
        """
        try:
            server = self._client.get_server_metadata(client_timeout=10)
            config = self._client.get_model_config("vit", client_timeout=10).config
        except InferenceServerException as e:
            raise ServerError(f"{self.address.host}: {e.message()}") from e
        names = ("model_name", "weights", "precision")
        return {
            "triton": server.version,
            **{name: config.parameters[name].string_value for name in names},
            "max_batch_size": config.max_batch_size,
            "pixels": list(config.input[0].dims),
        }

    def counters(self) -> dict[str, Counters]:
        """Return the counters of each model, including ensembles."""
        try:
            all_stats = self._client.get_inference_statistics(client_timeout=10).model_stats
        except InferenceServerException as e:
            raise ServerError(f"{self.address.host}: {e.message()}") from e
        return {model.name: _counters(model) for model in all_stats}


def _counters(model: Any) -> Counters:
    stats = model.inference_stats
    compute = (stats.compute_input, stats.compute_infer, stats.compute_output)
    return Counters(
        requests=stats.success.count,
        images=model.inference_count,
        executions=model.execution_count,
        queue_ns=stats.queue.ns,
        compute_ns=sum(part.ns for part in compute),
        total_ns=stats.success.ns,
    )


@contextlib.contextmanager
def local_server(repository: Path) -> Iterator[Address]:
    """Run vit-server on free ports of this machine, as a context manager.

    Raises:
        ServerError: it does not start; it reported the reason on standard error.
    """
    ports = ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"]
    vit_server = str(Path(sys.executable).parent / "vit-server")
    command = [vit_server, "--model-repository", str(repository), *ports]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            host = ""
            for line in process.stdout or ():
                if line.startswith("gRPC"):
                    host = line.split()[1]
                if line.startswith("Ready"):
                    break
            else:
                raise ServerError(f"vit-server exited with code {process.wait()}")
            yield Address(host)
        finally:
            process.terminate()
            process.wait()


def machine() -> str:
    """Return a description of this machine."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    name = next((line for line in cpuinfo.splitlines() if line.startswith("model name")), ": ?")
    return f"{len(os.sched_getaffinity(0))} cores of {name.partition(': ')[2]}"

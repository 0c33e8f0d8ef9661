"""tritonserver's command line."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LOOPBACK = "127.0.0.1"
SEGMENT = 64 << 20  # initial bytes of /dev/shm for the process of a Python model
# Flags not passed but reserved: vit-server relies on their defaults, or sets them by another name.
_KEPT = (
    "--model-store",
    "--strict-readiness",
    "--allow-http",
    "--allow-grpc",
    "--allow-metrics",
    "--grpc-use-ssl",
    "--grpc-use-ssl-mutual",
)
# For the restricted calls: shared memory, model repository, trace, logging.
KEY_HEADER = "vit-admin-key"


class ServerError(Exception):
    """The server cannot start or has failed; the message is for the user."""


@dataclass(frozen=True)
class Ports:
    """Where tritonserver listens: for gRPC on the IP address `host`, otherwise on loopback."""

    host: str
    grpc: int
    http: int
    metrics: int
    routes: dict[socket.socket, int]  # public sockets, and the port (http or metrics) behind each


@dataclass(frozen=True)
class Tls:
    """PEM files for gRPC."""

    certificate: Path
    key: Path
    client_ca: Path | None  # if set, clients need a certificate signed by it


def serving(backends: Path, models: Path, key: str) -> list[str]:
    """Return the flags for what is served; `key` allows the restricted calls."""
    # Triton cannot disable these calls, only restrict them by a key. Shared memory would let a
    # client read or write any file in /dev/shm.
    closed = f"shared-memory,model-repository,trace,logging:{KEY_HEADER}={key}"
    return [
        f"--model-repository={models}",
        f"--backend-directory={backends}",
        "--disable-auto-complete-config",  # the builder writes complete configs
        # Lets vit-server unload models by removing their folders, and clients cannot.
        "--model-control-mode=poll",
        "--repository-poll-secs=1",
        f"--grpc-restricted-protocol={closed}",
        f"--http-restricted-api={closed}",
    ]


def listening(ports: Ports, tls: Tls | None, connection_age: int) -> list[str]:
    """Return the flags for where it listens; `connection_age` is in seconds."""
    return [
        f"--grpc-address={f'[{ports.host}]' if ':' in ports.host else ports.host}",
        f"--grpc-port={ports.grpc}",
        f"--grpc-max-connection-age={connection_age * 1000}",
        *_tls_options(tls),
        f"--http-address={LOOPBACK}",
        f"--http-port={ports.http}",
        f"--metrics-address={LOOPBACK}",
        f"--metrics-port={ports.metrics}",
    ]


def command(
    binary: Path, ours: Sequence[str], shm_prefix: str, further: Sequence[str]
) -> list[str]:
    """Return tritonserver's command line.

    Raises:
        ServerError: `further` has a flag that vit-server sets itself.
    """
    settings = [  # flags that `further` may repeat or override
        # For tensors between server and stubs. The default of 1 MB grows in steps under load.
        f"--backend-config=python,shm-default-byte-size={SEGMENT}",
        f"--backend-config=python,shm-growth-byte-size={SEGMENT}",
        f"--backend-config=python,shm-region-prefix-name={shm_prefix}",
        # Quantiles of the latency over the last minute: 0.1 ms of CPU time per request.
        "--metrics-config=summary_latencies=true",
        "--metrics-config=summary_quantiles=0.5:0.05,0.99:0.001",
    ]
    taken = [*(flag.partition("=")[0] for flag in ours), *_KEPT]
    for name in (flag.partition("=")[0] for flag in further):
        # getopt accepts a prefix of a flag.
        if full := [flag for flag in taken if flag.startswith(name) and len(name) > len("--")]:
            raise ServerError(
                f"{name} cannot be passed to tritonserver: vit-server sets {min(full, key=len)}"
            )
    return [str(binary), *ours, *settings, *further]


def log_flags(verbose: bool) -> list[str]:
    """Return the logging flags: errors only, unless verbose; most warnings are about no GPU."""
    return [f"--log-{level}={str(verbose).lower()}" for level in ("info", "warning")]


def _tls_options(tls: Tls | None) -> list[str]:
    if tls is None:
        return []
    options = [
        "--grpc-use-ssl=true",
        f"--grpc-server-cert={tls.certificate}",
        f"--grpc-server-key={tls.key}",
    ]
    if tls.client_ca:
        options += ["--grpc-use-ssl-mutual=true", f"--grpc-root-cert={tls.client_ca}"]
    return options


def bracketed(host: str, port: int) -> str:
    """Return host:port, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

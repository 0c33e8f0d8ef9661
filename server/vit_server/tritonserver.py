"""tritonserver's command line."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LOOPBACK = "127.0.0.1"
SEGMENT = 64 << 20  # bytes of /dev/shm that the process of a Python model begins with
# Not given, since their defaults are what vit-server relies on, or there is another name for them.
_KEPT = (
    "--model-store",
    "--strict-readiness",
    "--allow-http",
    "--allow-grpc",
    "--allow-metrics",
    "--grpc-use-ssl",
    "--grpc-use-ssl-mutual",
)
# Of the calls for administrators: shared memory, model repository, trace, logging.
KEY_HEADER = "vit-admin-key"


class ServerError(Exception):
    """The server cannot start or has failed; the message is for the person who started it."""


@dataclass(frozen=True)
class Ports:
    """Where tritonserver listens: for gRPC at `host`, an address, and else on loopback."""

    host: str
    grpc: int
    http: int
    metrics: int
    routes: dict[socket.socket, int]  # what callers connect to, and which of these two is behind


@dataclass(frozen=True)
class Tls:
    """PEM files for gRPC."""

    certificate: Path
    key: Path
    client_ca: Path | None  # clients must have a certificate that it signed


def serving(backends: Path, models: Path, key: str) -> list[str]:
    """What is served; whoever sends `key` may call what is for administrators."""
    # Triton has no switch to turn these calls off: a key does it. Shared memory would let a client
    # name a file of /dev/shm to read or write.
    closed = f"shared-memory,model-repository,trace,logging:{KEY_HEADER}={key}"
    return [
        f"--model-repository={models}",
        f"--backend-directory={backends}",
        "--disable-auto-complete-config",  # the builder writes all of it
        # Lets vit-server unload models, by their folders, and nobody else.
        "--model-control-mode=poll",
        "--repository-poll-secs=1",
        f"--grpc-restricted-protocol={closed}",
        f"--http-restricted-api={closed}",
    ]


def listening(ports: Ports, tls: Tls | None, connection_age: int) -> list[str]:
    """Where it listens, and for how many seconds clients keep a connection."""
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
    """tritonserver with its arguments.

    Raises:
        ServerError: `further` has a flag that is among `ours`.
    """
    settings = [  # of which there may be more than one, or the last one counts
        # Tensors between server and stubs. The default of 1 MB grows in steps under load.
        f"--backend-config=python,shm-default-byte-size={SEGMENT}",
        f"--backend-config=python,shm-growth-byte-size={SEGMENT}",
        f"--backend-config=python,shm-region-prefix-name={shm_prefix}",
        # How long requests took in the last minute, as quantiles: 0.1 ms of a core for each.
        "--metrics-config=summary_latencies=true",
        "--metrics-config=summary_quantiles=0.5:0.05,0.99:0.001",
    ]
    taken = [*(flag.partition("=")[0] for flag in ours), *_KEPT]
    for name in (flag.partition("=")[0] for flag in further):
        # getopt takes what a flag begins with for that flag.
        if full := [flag for flag in taken if flag.startswith(name) and len(name) > len("--")]:
            raise ServerError(
                f"{name} cannot be passed to tritonserver: vit-server sets {min(full, key=len)}"
            )
    return [str(binary), *ours, *settings, *further]


def log_flags(verbose: bool) -> list[str]:
    """Errors are always told; warnings are mostly a page about the GPU that is not there."""
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
    """host:port, where an IPv6 address has brackets for its own colons."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

"""vit-server's command line."""

import argparse
import ipaddress
import re
from pathlib import Path

from . import __version__, tracing


def read(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """`words` as options, and the flags for tritonserver after `--`.

    Exits, with a message, where they are wrong or ask for help.
    """
    cut = words.index("--") if "--" in words else len(words)
    flags = words[cut + 1 :]
    options = _parser(serves="--help" not in flags)
    # Their options have no defaults, which help would show.
    unsaid = argparse.Namespace(tritonserver=None, otlp=None, trace_rate=None)
    args = options.parse_args(words[:cut], unsaid)
    if bool(args.tls_certificate) != bool(args.tls_key) or (
        args.tls_client_ca and not args.tls_key
    ):
        options.error("TLS needs both --tls-certificate and --tls-key")
    # An empty --otlp turns traces off, whatever is said of them beside it.
    if args.trace_rate is not None and args.otlp is None:
        options.error("--trace-rate needs --otlp, which says where the traces go")
    return args, flags


def _parser(*, serves: bool = True) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="vit-server",
        usage="%(prog)s --model-repository DIR [options] [-- --triton-flag …]",
        description="Serve a model repository with the real tritonserver, in the foreground, until "
        "Ctrl-C or SIGTERM, which let what was accepted be answered (a second one does not). Takes "
        "the GPU where there is one. Exit codes: 0 stopped as asked; 1 it could not start, a "
        "model's process has ended, or not all was answered; 130 stopped at once; else "
        "tritonserver's.",
        epilog="What follows -- goes to tritonserver as it is (vit-server -- --help lists its "
        "flags). In the environment: OMP_NUM_THREADS, the cores to use, else all that this "
        "process may use (how many processes decode images follows from them); VIT_ADMIN_KEY, "
        "which opens the calls that are closed (shared memory, model repository, trace, logging) "
        "to those who send it as the header vit-admin-key over HTTP, or "
        "triton-grpc-protocol-vit-admin-key over gRPC.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = options.add_argument
    add("--version", action="version", version=f"vit-server {__version__}")
    add(
        "--model-repository",
        type=Path,
        required=serves,
        metavar="DIR",
        help="what vit-builder wrote",
        default=argparse.SUPPRESS,
    )
    add(
        "--tritonserver",
        type=Path,
        metavar="DIR",
        help="take the tritonserver in there, with its backends python and pytorch; without this "
        "NVIDIA's, in /opt/tritonserver, or the one of the extra vit-server[embedded]",
        default=argparse.SUPPRESS,
    )
    add(
        "--host",
        type=_address,
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on. Without TLS there is no encryption and no login: keep it on "
        "loopback",
    )
    add(
        "--grpc-port",
        type=_port,
        default=8001,
        metavar="PORT",
        help="what vit-client talks to; 0 takes a free one, for each of the three",
    )
    add("--http-port", type=_port, default=8000, metavar="PORT", help="the same calls over HTTP")
    add(
        "--metrics-port",
        type=_port,
        default=8002,
        metavar="PORT",
        help="for Prometheus, at --host and always without encryption",
    )
    add(
        "--grpc-max-connection-age",
        type=_seconds,
        default=30,
        metavar="SECONDS",
        help="then a client is asked to connect anew, which costs it no request. It looks its name "
        "up again, and so finds servers that were added",
    )
    tls = options.add_argument_group(
        "TLS for gRPC (HTTP has none, and then stays on loopback; metrics do not)"
    )
    tls.add_argument("--tls-certificate", type=Path, metavar="FILE", help="the server's, as PEM")
    tls.add_argument("--tls-key", type=Path, metavar="FILE", help="its private key, as PEM")
    tls.add_argument(
        "--tls-client-ca",
        type=Path,
        metavar="FILE",
        help="mutual TLS: clients must have a certificate that one of these has signed",
    )
    traces = options.add_argument_group(
        "traces, by OpenTelemetry",
        "A caller's trace, which it sends as `traceparent`, goes on in the server: a span of the "
        "request, and below it one of each model (docker/README.md has what Triton gets wrong). "
        "OTEL_SERVICE_NAME names the service, OTEL_RESOURCE_ATTRIBUTES tells more about it, and "
        "OTEL_EXPORTER_OTLP_HEADERS is sent to the collector.",
    )
    traces.add_argument(
        "--otlp",
        type=_collector,
        metavar="URL",
        help="send them there, over HTTP: a collector's address, such as http://localhost:4318 "
        "(/v1/traces is added). Without it, or if it is empty, nothing is traced. A collector that "
        "is away costs traces, and no requests",
        default=argparse.SUPPRESS,
    )
    traces.add_argument(
        "--trace-rate",
        type=_rate,
        metavar="N",
        help="of the requests that bring no trace, start one for one in N; 1 traces them all. "
        "Without it, or with 0, none of them",
        default=argparse.SUPPRESS,
    )
    add("--verbose", action="store_true", help="show tritonserver's own log, also while it starts")
    return options


def _address(text: str) -> str:
    if text == "localhost":
        return "127.0.0.1"
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not an IP address") from None


def _port(text: str) -> int:
    number = int(text) if text.isdecimal() else -1
    if not 0 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port (0 to 65535)")
    return number


def _seconds(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if not 1 <= number <= 86400:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of seconds, 1 to 86400")
    return number


def _collector(text: str) -> str:
    try:
        return tracing.endpoint(text) if text else ""
    except ValueError:
        told = re.sub(r"^(\w+://)?.*@", r"\1", text)  # without a password
        raise argparse.ArgumentTypeError(
            f"{told} is not the URL of a collector, such as http://localhost:4318"
        ) from None


def _rate(text: str) -> int | None:
    if not text:
        return None
    number = int(text) if text.isdecimal() else -1
    if not 0 <= number < 2**31:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number, 0 or more")
    return number

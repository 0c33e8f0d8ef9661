"""vit-server's command line."""

import argparse
import ipaddress
import re
from pathlib import Path

from . import __version__, tracing


def read(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse `words`; return the options, and the flags for tritonserver after `--`.

    Exits with a message if they are wrong or ask for help.
    """
    cut = words.index("--") if "--" in words else len(words)
    flags = words[cut + 1 :]
    options = _parser(serves="--help" not in flags)
    args = options.parse_args(words[:cut])
    if bool(args.tls_certificate) != bool(args.tls_key) or (
        args.tls_client_ca and not args.tls_key
    ):
        options.error("TLS needs both --tls-certificate and --tls-key")
    # An empty --otlp turns traces off, whatever the rate.
    if args.trace_rate is not None and args.otlp is None:
        options.error("--trace-rate needs --otlp, the address to send traces to")
    return args, flags


_DESCRIPTION = """\
Serve a model repository with the real tritonserver, in the foreground.

A repository that was built for a GPU is served on GPUs only. Prints "Ready" when every model has
answered a request. Ctrl-C or SIGTERM starts a graceful shutdown: requests that were
accepted are completed first. A second one stops the server at once.
"""
_EPILOG = """\
examples:
  vit-server --model-repository models                     # on loopback, default ports
  vit-server --model-repository models --host 0.0.0.0 \\
      --tls-certificate server.pem --tls-key server.key    # for other machines, with TLS
  vit-server --model-repository models --grpc-port 0 --http-port 0 --metrics-port 0
  vit-server --model-repository models --otlp http://localhost:4318 --trace-rate 100
  vit-server --model-repository models -- --log-verbose=1  # a flag of tritonserver's
  vit-server -- --help                                     # lists tritonserver's flags; paths
                                                           # in them must be absolute

environment:
  OMP_NUM_THREADS  number of cores to use (default: all that this process may use); the
                   number of processes that decode images follows from it
  VIT_ADMIN_KEY    opens the restricted calls (shared memory, model repository, trace,
                   logging) to clients that send this key: over HTTP in the header
                   vit-admin-key, over gRPC in triton-grpc-protocol-vit-admin-key
  OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_EXPORTER_OTLP_HEADERS
                   see "traces" above

exit codes:
  0    stopped as requested, and every accepted request was completed
  1    could not start, a model's process exited, or not every accepted request was
       completed in time
  2    wrong arguments
  130  stopped at once, by a second signal
  Any other code is tritonserver's own.
"""


def _parser(*, serves: bool = True) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="vit-server",
        usage="%(prog)s --model-repository DIR [options] [-- --triton-flag …]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = options.add_argument
    add("--version", action="version", version=f"vit-server {__version__}")
    add(
        "--model-repository",
        type=Path,
        required=serves,
        metavar="DIR",
        help="the model repository to serve, written by vit-builder (required)",
    )
    add(
        "--tritonserver",
        type=Path,
        metavar="DIR",
        help="use the tritonserver installed in this folder, which must have the backends python "
        "and pytorch (default: NVIDIA's in /opt/tritonserver, else the one that "
        "vit-server[embedded] installs)",
    )
    add(
        "--host",
        type=_address,
        default="127.0.0.1",
        metavar="ADDRESS",
        help="IP address to listen on; 0.0.0.0 for all interfaces. Without TLS nothing is "
        "encrypted, and there is no login: stay on loopback (default: %(default)s)",
    )
    add(
        "--grpc-port",
        type=_port,
        default=8001,
        metavar="PORT",
        help="port for gRPC, which vit-client uses; 0 picks a free one, as for the next two "
        "(default: %(default)s)",
    )
    add(
        "--http-port",
        type=_port,
        default=8000,
        metavar="PORT",
        help="port for the same calls over HTTP (default: %(default)s)",
    )
    add(
        "--metrics-port",
        type=_port,
        default=8002,
        metavar="PORT",
        help="port for Prometheus metrics, on --host and never encrypted (default: %(default)s)",
    )
    add(
        "--grpc-max-connection-age",
        type=_seconds,
        default=30,
        metavar="SECONDS",
        help="ask clients to reconnect after this time. They resolve the server's name again, and "
        "so find servers that were added; no request is lost (default: %(default)s)",
    )
    add("--verbose", action="store_true", help="show tritonserver's own log, also during startup")
    tls = options.add_argument_group(
        "TLS for gRPC",
        "HTTP has no TLS: with these options it listens on loopback only. Metrics stay on --host.",
    )
    tls.add_argument(
        "--tls-certificate", type=Path, metavar="FILE", help="the server's certificate (PEM)"
    )
    tls.add_argument("--tls-key", type=Path, metavar="FILE", help="its private key (PEM)")
    tls.add_argument(
        "--tls-client-ca",
        type=Path,
        metavar="FILE",
        help="mutual TLS: accept only clients with a certificate signed by one of these CAs (PEM)",
    )
    traces = options.add_argument_group(
        "traces (OpenTelemetry)",
        "If a client sends its trace as `traceparent`, the server adds a span for the\n"
        "request, and below it one for each model. OTEL_SERVICE_NAME sets the service's name,\n"
        "OTEL_RESOURCE_ATTRIBUTES further attributes, and OTEL_EXPORTER_OTLP_HEADERS headers\n"
        "for the collector. docker/README.md lists known problems of Triton's tracing.",
    )
    traces.add_argument(
        "--otlp",
        type=_collector,
        metavar="URL",
        help="send traces to this collector, over HTTP, such as http://localhost:4318 (/v1/traces "
        "is appended). If it is down, traces are lost but no requests (default, or if empty: "
        "no tracing)",
    )
    traces.add_argument(
        "--trace-rate",
        type=_rate,
        metavar="N",
        help="also trace one in N of the requests that have no trace; 1 traces them all (default, "
        "or 0: none)",
    )
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

"""vit-server: the real tritonserver on this machine, in the foreground."""

import argparse
import contextlib
import ipaddress
import os
import re
import secrets
import signal
import socket
import ssl
import sys
from pathlib import Path

from . import gpu, installation, memory, probe, repository, tritonserver
from .http_front import HttpFront
from .process import STOPS, Crashed, TritonProcess, allow_all_files, say
from .tritonserver import LOOPBACK, Ports, ServerError, Tls, bracketed
from .workspace import workspace


def main() -> None:
    """Entry point of the command."""
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    flags = words[cut + 1 :]
    serves = "--help" not in flags
    parser = _parser(serves=serves)
    args = parser.parse_args(words[:cut])
    if bool(args.tls_certificate) != bool(args.tls_key) or (
        args.tls_client_ca and not args.tls_key
    ):
        parser.error("TLS needs both --tls-certificate and --tls-key")
    try:
        if not serves:
            found = installation.find(getattr(args, "tritonserver", None))
            print(installation.help_text(found), end="")
            return
        sys.exit(_serve_or_tell(args, flags))
    except ServerError as e:
        sys.exit(f"vit-server: {e}{memory.told()}")


def _serve_or_tell(args: argparse.Namespace, flags: list[str]) -> int:
    """`serve`, again where that may help, or may tell why it does not."""
    tries_left = 2
    while True:
        try:
            return serve(args, flags)
        except probe.Stalled as e:
            if not tries_left or memory.told():
                raise
            say(f"vit-server: {e}; starting it again")
            tries_left -= 1
        except Crashed as e:
            if memory.told():
                raise
            # A warm-up that fails ends Triton without a reason (139, or 134), most of the time.
            say(f"vit-server: {e}; trying it without warm-up, to learn more")
            serve(args, flags, warm_up=False)
            raise


def serve(args: argparse.Namespace, flags: list[str], *, warm_up: bool = True) -> int:
    """Run tritonserver, with further flags of its own, until it ends; the exit code.

    Without `warm_up` it only tries whether the models answer.

    Raises:
        ServerError: it cannot start, or a model's process has ended.
    """
    for number in STOPS:
        signal.signal(number, _leave)  # until there is a tritonserver to stop
    allow_all_files()  # here, where HTTP comes in, and in tritonserver
    repository.check(args.model_repository)
    tls = _tls(args)
    key = _admin_key() or secrets.token_hex(16)
    found = installation.find(getattr(args, "tritonserver", None))
    with (
        workspace() as own,
        contextlib.ExitStack() as opened,
        repository.told_as(args.model_repository, models := own.folder / "models"),
    ):
        ports = reserve_ports(args, opened)
        backends = installation.prepare(found, own.folder)
        repository.snapshot(args.model_repository.resolve(), models)
        env = installation.environment(found)
        repository.fit(models, installation.threads(env))
        largest = 0 if warm_up else repository.without_warm_up(models)
        if repository.for_gpu(models):
            flags = [*gpu.flags(installation.help_text(found)), *flags]
            env["VIT_DEVICE"] = "cuda"  # nowhere else, whatever torch says
        opened.enter_context(HttpFront(ports.routes, repository.max_request_bytes(models)))
        flags = [*tritonserver.log_flags(args.verbose), *flags]
        age = args.grpc_max_connection_age
        command = tritonserver.command(
            found.binary, backends, models, own.shm_prefix, ports, tls, age, key, flags
        )
        # preprocess looks there how much waits for vit.
        env["VIT_METRICS"] = f"{LOOPBACK}:{ports.metrics}"
        python_models = {name: repository.processes(models, name) for name in found.python_models}
        process = TritonProcess(command, env, python_models, args.verbose)
        try:
            say("Starting tritonserver …")
            probe.wait_until_answering(process, ports, key)
            if largest and not process.stopping:
                probe.try_largest_batch(ports, largest)
            if largest or process.stopping:
                return process.stop()
            process.ready()
            _tell(ports, tls)
            code = _run(process, ports, models)
        finally:
            opened.close()  # its connections take the files that the rest needs
            process.close()
    if not process.stopping:
        say(f"vit-server: tritonserver has ended, exit code {code}{memory.told()}")
    return code


def _run(process: TritonProcess, ports: Ports, models: Path) -> int:
    """Until it has ended, or was told to and has answered what it had; the exit code."""
    process.watch(models)
    if not process.stopping:
        return process.stop()
    say("Stopping: what was accepted is answered first. Ctrl-C again ends it at once.")
    drained = probe.drain(process, ports, models)
    if not drained and not process.hurried:
        say(f"vit-server: not all was answered within {probe.DRAIN_SECONDS} s")
    return process.stop() or int(not drained)


def _admin_key() -> str:
    """What opens the closed calls, without the newline that files and Secrets end in."""
    key = os.environ.get("VIT_ADMIN_KEY", "").strip()
    if not re.fullmatch(r"[!-~]*", key):  # what a header may have; it is told to nobody
        raise ServerError("VIT_ADMIN_KEY must be of visible ASCII characters, without spaces")
    return key


def _leave(*_: object) -> None:
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)  # not again while files are removed
    sys.exit(0)


def _tell(ports: Ports, tls: Tls | None) -> None:
    http, metrics = (bracketed(*listening.getsockname()[:2]) for listening in ports.routes)
    lines = [
        f"gRPC     {'grpcs://' if tls else ''}{bracketed(ports.host, ports.grpc)}",
        f"HTTP     http://{http}",
        f"metrics  http://{metrics}/metrics",
        "Ready: every model has answered. Ctrl-C stops.",
    ]
    say("\n".join(lines), sys.stdout)


def _tls(args: argparse.Namespace) -> Tls | None:
    """The files for TLS, seen to be good: Triton would start, and refuse every client."""
    if not args.tls_certificate:
        return None
    tls = Tls(args.tls_certificate, args.tls_key, args.tls_client_ca)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # With an empty password: it must not ask for one.
        context.load_cert_chain(tls.certificate, tls.key, password="")
    except (OSError, ValueError) as e:
        raise ServerError(f"--tls-certificate {tls.certificate}, --tls-key {tls.key}: {e}") from e
    try:
        context.load_verify_locations(tls.client_ca) if tls.client_ca else None
    except (OSError, ValueError) as e:
        raise ServerError(f"--tls-client-ca {tls.client_ca}: {e}") from e
    return tls


def reserve_ports(args: argparse.Namespace, opened: contextlib.ExitStack) -> Ports:
    """Sockets that listen for HTTP and metrics, which `opened` closes, and ports for tritonserver.

    The one for gRPC is seen to be free: Triton's own message does not name a taken one.

    Raises:
        ServerError: a port is taken, or the address is not this machine's.
    """
    chosen = [port for port in (args.grpc_port, args.http_port, args.metrics_port) if port]
    if len(set(chosen)) < len(chosen):
        raise ServerError("--grpc-port, --http-port and --metrics-port must differ")
    loopback = "::1" if ":" in args.host else LOOPBACK
    # Triton has TLS for gRPC only: what must be encrypted must not leave this machine by HTTP.
    http_host = loopback if args.tls_certificate else args.host
    with contextlib.ExitStack() as held:  # held together, so that no two are the same
        grpc = held.enter_context(_listen(args.host, "grpc", args.grpc_port))
        http = opened.enter_context(_listen(http_host, "http", args.http_port))
        metrics = opened.enter_context(_listen(args.host, "metrics", args.metrics_port))
        behind = [held.enter_context(_listen(LOOPBACK, name, 0)) for name in ("http", "metrics")]
        http_port, metrics_port = (listening.getsockname()[1] for listening in behind)
        routes = {http: http_port, metrics: metrics_port}
        return Ports(args.host, grpc.getsockname()[1], http_port, metrics_port, routes)


def _listen(host: str, name: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(128)
    except OSError as e:
        listening.close()
        reason = f"cannot listen on {host} port {port}: {e.strerror}"
        raise ServerError(f"{reason}; choose with --host and --{name}-port") from e
    return listening


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


def _parser(*, serves: bool = True) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
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
    add = parser.add_argument
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
    tls = parser.add_argument_group(
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
    add("--verbose", action="store_true", help="show tritonserver's own log, also while it starts")
    return parser

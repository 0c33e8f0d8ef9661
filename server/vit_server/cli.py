"""vit-server: the real tritonserver on this machine, in the foreground."""

import argparse
import contextlib
import os
import re
import secrets
import signal
import socket
import ssl
import sys
from pathlib import Path

from . import gpu, installation, memory, options, probe, repository, tracing, tritonserver
from .http_front import HttpFront
from .installation import Installation
from .process import STOPS, Crashed, TritonProcess, allow_all_files, say
from .tritonserver import LOOPBACK, Ports, ServerError, Tls, bracketed
from .workspace import workspace


def main() -> None:
    """Run the command."""
    args, flags = options.read(sys.argv[1:])
    try:
        found = installation.find(args.tritonserver)
        if "--help" in flags:
            print(installation.help_text(found), end="")
            return
        sys.exit(_serve_or_tell(found, args, flags))
    except ServerError as e:
        sys.exit(f"vit-server: {e}{memory.told()}")


def _serve_or_tell(found: Installation, args: argparse.Namespace, flags: list[str]) -> int:
    """Call `serve`; retry it after a failure if that may help or reveal the reason."""
    tries_left = 2
    while True:
        try:
            return serve(found, args, flags)
        except probe.Stalled as e:
            if not tries_left or memory.told():
                raise
            say(f"vit-server: {e}; starting again")
            tries_left -= 1
        except Crashed as e:
            if memory.told():
                raise
            # Triton exits without a reason (139, or 134) where a warm-up fails; and where a process
            # gets no CPU for ten seconds while it starts, which a second try may not meet.
            say(f"vit-server: {e}; starting it once more without warm-up, to find the reason")
            serve(found, args, flags, warm_up=False)
            if not tries_left:
                raise
            say("vit-server: without warm-up every model answers; starting again")
            tries_left -= 1


def serve(
    found: Installation, args: argparse.Namespace, flags: list[str], *, warm_up: bool = True
) -> int:
    """Run tritonserver, with additional flags for it, until it exits; return the exit code.

    Without `warm_up`, only check that the models answer, then stop.

    Raises:
        ServerError: it cannot start, or a model's process has exited.
    """
    for number in STOPS:
        signal.signal(number, _leave)  # until there is a tritonserver to stop
    allow_all_files()  # for this process, which accepts HTTP, and for tritonserver
    repository.check(args.model_repository)
    tls = _tls(args)
    key = _admin_key() or secrets.token_hex(16)
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
            env["VIT_DEVICE"] = "cuda"  # no fallback to the CPU if torch sees no GPU
        opened.enter_context(HttpFront(ports.routes, repository.max_request_bytes(models)))
        flags = [*tritonserver.log_flags(args.verbose), *flags]
        ours = [
            *tritonserver.serving(backends, models, key),
            *tritonserver.listening(ports, tls, args.grpc_max_connection_age),
            *(tracing.flags(args.otlp, args.trace_rate or 0) if args.otlp else []),
        ]
        command = tritonserver.command(found.binary, ours, own.shm_prefix, flags)
        # preprocess reads there how many requests are pending for vit.
        env["VIT_METRICS"] = f"{LOOPBACK}:{ports.metrics}"
        python_models = {name: repository.processes(models, name) for name in found.python_models}
        process = TritonProcess(command, env, own.folder, python_models, args.verbose)
        try:
            say("Starting tritonserver …")
            if args.otlp and found.backends is None:
                say(f"vit-server: --otlp: {tracing.CRASH}")
            probe.wait_until_answering(process, ports, key)
            if largest and not process.stopping:
                probe.try_largest_batch(ports, largest)
            if process.stopping:
                sys.exit(process.stop())
            if largest:
                return process.stop()
            process.ready()
            _tell(ports, tls, args)
            code = _run(process, ports, models)
        finally:
            opened.close()  # frees file descriptors, which the cleanup below needs
            process.close()
    if not process.stopping:
        say(f"vit-server: tritonserver exited with code {code}{memory.told()}")
    return code


def _run(process: TritonProcess, ports: Ports, models: Path) -> int:
    """Wait until it exits, or drain and stop it on a signal; return the exit code."""
    process.watch(models)
    if not process.stopping:
        return process.stop()
    say("Stopping: completing accepted requests first. Ctrl-C again stops at once.")
    drained = probe.drain(process, ports, models)
    if not drained and not process.hurried:
        say(f"vit-server: some requests were not completed within {probe.DRAIN_SECONDS} s")
    return process.stop() or int(not drained)


def _admin_key() -> str:
    """Return the key for the restricted calls, without the newline that files and Secrets have."""
    key = os.environ.get("VIT_ADMIN_KEY", "").strip()
    if not re.fullmatch(r"[!-~]*", key):  # valid in a header; never printed
        raise ServerError("VIT_ADMIN_KEY must consist of visible ASCII characters, without spaces")
    return key


def _leave(*_: object) -> None:
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)  # let the cleanup finish
    sys.exit(0)


def _tell(ports: Ports, tls: Tls | None, args: argparse.Namespace) -> None:
    http, metrics = (bracketed(*listening.getsockname()[:2]) for listening in ports.routes)
    lines = [
        f"gRPC     {'grpcs://' if tls else ''}{bracketed(ports.host, ports.grpc)}",
        f"HTTP     http://{http}",
        f"metrics  http://{metrics}/metrics",
        *([_traced(args.otlp, args.trace_rate)] if args.otlp else []),
        "Ready: every model has answered. Ctrl-C stops.",
    ]
    say("\n".join(lines), sys.stdout)


def _traced(url: str, rate: int | None) -> str:
    others = {0: "no others", 1: "all others"}.get(rate or 0, f"1 in {rate} of the others")
    who = f"requests that come with a trace, and {others}"
    return f"traces   to {tracing.told(url)}: {who}"


def _tls(args: argparse.Namespace) -> Tls | None:
    """Return the checked TLS files: with bad ones Triton would start, and reject every client."""
    if not args.tls_certificate:
        return None
    # Absolute, as tritonserver runs in another folder.
    client_ca = args.tls_client_ca and args.tls_client_ca.absolute()
    tls = Tls(args.tls_certificate.absolute(), args.tls_key.absolute(), client_ca)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # An empty password, so that OpenSSL does not prompt for one.
        context.load_cert_chain(tls.certificate, tls.key, password="")
    except (OSError, ValueError) as e:
        raise ServerError(f"--tls-certificate {tls.certificate}, --tls-key {tls.key}: {e}") from e
    try:
        context.load_verify_locations(tls.client_ca) if tls.client_ca else None
    except (OSError, ValueError) as e:
        raise ServerError(f"--tls-client-ca {tls.client_ca}: {e}") from e
    return tls


def reserve_ports(args: argparse.Namespace, opened: contextlib.ExitStack) -> Ports:
    """Open listening sockets for HTTP and metrics, and reserve ports for tritonserver.

    A reserved port is bound but not listened on: tritonserver, which sets SO_REUSEADDR as Linux
    wants it for that, can listen there, and no other process is given the port meanwhile.
    `opened` closes all sockets.

    Raises:
        ServerError: a port is in use, or the address is not one of this machine's.
    """
    chosen = [port for port in (args.grpc_port, args.http_port, args.metrics_port) if port]
    if len(set(chosen)) < len(chosen):
        raise ServerError("--grpc-port, --http-port and --metrics-port must differ")
    loopback = "::1" if ":" in args.host else LOOPBACK
    # Triton has TLS for gRPC only: with TLS, unencrypted HTTP must stay on this machine.
    http_host = loopback if args.tls_certificate else args.host
    # Checked here: Triton's own error does not name a port that is in use.
    grpc = opened.enter_context(_bind(args.host, "grpc", args.grpc_port))
    http = opened.enter_context(_bind(http_host, "http", args.http_port, listen=True))
    metrics = opened.enter_context(_bind(args.host, "metrics", args.metrics_port, listen=True))
    behind = [opened.enter_context(_bind(LOOPBACK, name, 0)) for name in ("http", "metrics")]
    http_port, metrics_port = (reserved.getsockname()[1] for reserved in behind)
    routes = {http: http_port, metrics: metrics_port}
    return Ports(args.host, grpc.getsockname()[1], http_port, metrics_port, routes)


def _bind(host: str, name: str, port: int, *, listen: bool = False) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        if listen:
            bound.listen(128)
    except OSError as e:
        bound.close()
        reason = f"cannot listen on {host} port {port}: {e.strerror}"
        raise ServerError(f"{reason}; choose another with --host or --{name}-port") from e
    return bound

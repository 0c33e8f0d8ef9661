"""vit-server: the real tritonserver on this machine, in the foreground."""

import argparse
import contextlib
import ipaddress
import os
import socket
import struct
import sys
import time
from pathlib import Path

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from . import tritonserver
from .process import TritonProcess
from .tritonserver import Ports, ServerError

# The ensembles cover all models; each output is a batch of numbers except the labels.
ENSEMBLES = {"classify": "scores", "probabilities": "probabilities", "embed": "embedding"}
ENSEMBLES["features"] = "neck"
MODELS = ("preprocess", "vit", "postprocess", *ENSEMBLES)
GRAY_PIXEL = b"P6 1 1 255\n\x80\x80\x80"  # a whole image, in PPM
START_SECONDS = 600


def main() -> None:
    """Entry point of the command."""
    args = _parser().parse_args()
    try:
        check_repository(args.model_repository)
        ports = reserve_ports(args)
        age = args.grpc_max_connection_age
        sys.exit(serve(args.model_repository, ports, age, args.verbose))
    except ServerError as e:
        sys.exit(f"vit-server: {e}")


def serve(repository: Path, ports: Ports, connection_age: int, verbose: bool) -> int:
    """Run tritonserver until it ends; its exit code. Raises ServerError where it cannot start."""
    installation = tritonserver.find()
    shm_prefix = f"vit_server_{os.getpid()}_"
    with tritonserver.workspace() as folder:
        tritonserver.prepare(installation, repository.resolve(), folder)
        command = tritonserver.command(
            installation, folder, ports, connection_age, shm_prefix, verbose
        )
        env = tritonserver.environment(installation)
        process = TritonProcess(command, env, shm_prefix, verbose)
        try:
            print("Starting tritonserver …", file=sys.stderr, flush=True)
            wait_until_answering(process, ports)
            if not process.stopping:
                process.ready()
                host = tritonserver.bracketed(ports.host)
                print(f"gRPC     {host}:{ports.grpc}")
                print(f"HTTP     http://{host}:{ports.http}")
                print(f"metrics  http://{host}:{ports.metrics}/metrics")
                print("Ready: every model has answered. Ctrl-C stops.", flush=True)
            return process.wait()
        finally:
            process.close()


def wait_until_answering(process: TritonProcess, ports: Ports) -> None:
    """Return when every model has answered a real request, or the process was told to stop.

    READY alone proves little: a model can be ready and fail on every request.
    """
    deadline = time.monotonic() + START_SECONDS
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(ports.host, ports.host)
    target = f"{tritonserver.bracketed(host)}:{ports.grpc}"
    # A proxy from the environment must not come between two processes of one machine.
    with grpc.insecure_channel(target, [("grpc.enable_http_proxy", 0)]) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        while not _is_ready(stub):
            if process.exited():
                if process.stopping:
                    return
                raise process.failure()
            if time.monotonic() > deadline:
                raise ServerError(f"tritonserver was not ready after {START_SECONDS} s")
            time.sleep(0.1)
        for ensemble, output in ENSEMBLES.items():
            if process.stopping:
                return
            _probe(stub, ensemble, output)


def _is_ready(stub: service_pb2_grpc.GRPCInferenceServiceStub) -> bool:
    try:
        return bool(stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=1).ready)
    except grpc.RpcError:
        return False


def _probe(stub: service_pb2_grpc.GRPCInferenceServiceStub, ensemble: str, output: str) -> None:
    request = service_pb2.ModelInferRequest(
        model_name=ensemble,
        inputs=[{"name": "image", "datatype": "BYTES", "shape": [1, 1]}],
        outputs=[{"name": output}],
        raw_input_contents=[struct.pack("<I", len(GRAY_PIXEL)) + GRAY_PIXEL],
    )
    try:
        response = stub.ModelInfer(request, timeout=120)
    except grpc.RpcError as e:
        raise ServerError(f"{ensemble} is loaded but does not answer: {e.details()}") from e
    if not np.isfinite(np.frombuffer(response.raw_output_contents[0], np.float32)).all():
        raise ServerError(f"{ensemble} answers with numbers that are not finite")


def check_repository(repository: Path) -> None:
    """Raise ServerError unless `repository` has all our models and the builder's files."""
    built = ("vit/1/model.pt", "postprocess/1/labels.txt")
    wanted = (*built, *(f"{model}/config.pbtxt" for model in MODELS))
    if not repository.is_dir():
        raise ServerError(f"no such model repository: {repository} (vit-builder writes one)")
    missing = [name for name in wanted if not (repository / name).is_file()]
    # An ensemble's version folder is empty, and is lost where a tool drops empty folders.
    missing += [f"{model}/1" for model in MODELS if not (repository / model / "1").is_dir()]
    if missing:
        hint = "; vit-builder fills it in" if missing[0] in built else ""
        raise ServerError(f"{repository} is not a complete model repository: no {missing[0]}{hint}")


def reserve_ports(args: argparse.Namespace) -> Ports:
    """The ports to listen on, seen to be free: Triton's own message does not name a taken one.

    Raises:
        ServerError: a port is taken, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    numbers = []
    with contextlib.ExitStack() as held:  # held together, so that two cannot be the same
        for name in ("grpc", "http", "metrics"):
            wanted = getattr(args, f"{name}_port")
            probe = held.enter_context(socket.socket(family, socket.SOCK_STREAM))
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((args.host, wanted))
            except OSError as e:
                reason = f"cannot listen on {args.host} port {wanted}: {e.strerror}"
                raise ServerError(f"{reason}; choose with --host and --{name}-port") from e
            numbers.append(probe.getsockname()[1])
    if len(set(numbers)) < len(numbers):
        raise ServerError("--grpc-port, --http-port and --metrics-port must differ")
    return Ports(args.host, *numbers)


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vit-server",
        description="Serve a model repository with the real tritonserver, in the foreground, until "
        "Ctrl-C or SIGTERM. Takes the GPU where there is one. The exit code is tritonserver's.",
        epilog="Threads: OMP_NUM_THREADS in the environment, or all cores this process may use.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--model-repository",
        type=Path,
        required=True,
        metavar="DIR",
        help="what vit-builder wrote",
        default=argparse.SUPPRESS,
    )
    add(
        "--host",
        type=_address,
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on. There is no encryption and no login: keep it on loopback",
    )
    add(
        "--grpc-port",
        type=_port,
        default=8001,
        metavar="PORT",
        help="what vit-client talks to; 0 takes a free one, for each of the three",
    )
    add("--http-port", type=_port, default=8000, metavar="PORT", help="the same calls over HTTP")
    add("--metrics-port", type=_port, default=8002, metavar="PORT", help="for Prometheus")
    add(
        "--grpc-max-connection-age",
        type=_seconds,
        default=300,
        metavar="SECONDS",
        help="then a client is asked to connect anew, which costs it no request. It looks its name "
        "up again, and so finds servers that were added",
    )
    add("--verbose", action="store_true", help="show tritonserver's own log, also while it starts")
    return parser

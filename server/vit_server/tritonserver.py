"""Where tritonserver is, and the command line and environment it is started with."""

import ctypes
import fcntl
import math
import os
import re
import secrets
import shutil
import socket
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

OUR_BACKENDS = Path(__file__).parent / "backends"
# A pid follows each of them.
_WORKSPACE = "vit-server-"  # in /tmp
SEGMENTS = "vit_server_"  # in /dev/shm
LOOPBACK = "127.0.0.1"
MIB = 1 << 20
KEY_HEADER = "closed"  # of a call that is closed to those without the key


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


@dataclass(frozen=True)
class Installation:
    """The parts of the nvidia-pytriton wheel that are used."""

    binary: Path
    python_backend: Path  # folder with libtriton_python.so
    stub: Path  # the process a Python model runs in, compiled for one Python version
    libraries: Path


def find() -> Installation:
    """Find tritonserver in the installed wheel.

    Raises:
        ServerError: no wheel, no stub for this Python, or no shared libpython.
    """
    spec = find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise ServerError("tritonserver is missing: pip install nvidia-pytriton==0.7.0")
    package = Path(spec.origin).parent
    root = package / "tritonserver"
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    found = Installation(
        binary=root / "bin" / "tritonserver",
        python_backend=root / "backends" / "python",
        stub=root / "python_backend_stubs" / python / "triton_python_backend_stub",
        libraries=package.parent / "nvidia_pytriton.libs",
    )
    for path in (found.binary, found.python_backend, found.stub, found.libraries):
        if not path.exists():
            raise ServerError(
                f"nvidia-pytriton has no {path}: is it 0.7.0, on Python 3.10 to 3.12?"
            )
    if not _has_libpython():
        raise ServerError(
            f"Triton's Python models need the shared library of Python {python}, and "
            f"{sys.executable} has none: on Debian and Ubuntu `apt-get install libpython{python}`"
        )
    return found


@contextmanager
def workspace() -> Iterator[Path]:
    """A folder for `prepare`, named after this process, and removed at the end."""
    temporary = Path(tempfile.gettempdir())
    if not re.fullmatch(r"[\w/.-]+", str(temporary), re.ASCII):
        temporary = Path("/tmp")
    if os.statvfs(temporary).f_flag & os.ST_NOEXEC:
        raise ServerError(
            f"{temporary} is mounted noexec, and Triton's backends are executed from there: set "
            "TMPDIR to another folder, or mount it with exec (docker run --tmpfs /tmp:exec)"
        )
    _clear_after_the_killed(temporary)
    folder = temporary / f"{_WORKSPACE}{os.getpid()}-{secrets.token_hex(4)}"
    try:  # before it is made: a signal may come at any moment
        folder.mkdir(0o700)
        lock = os.open(folder, os.O_RDONLY)
        try:
            # What clears old files from /tmp (systemd-tmpfiles) passes by a locked folder.
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
        finally:
            os.close(lock)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _clear_after_the_killed(temporary: Path) -> None:
    """Remove what servers left that could not do it themselves."""
    ours = str(os.getpid())  # in a container it is always 1
    for left in (*temporary.glob(f"{_WORKSPACE}*"), *Path("/dev/shm").glob(f"{SEGMENTS}*")):
        pid = re.split("[-_]", left.name)[2]
        if pid != ours and Path("/proc", pid).exists():
            continue
        with suppress(OSError):  # another user's, or locked by a server in another container
            if not left.is_dir():
                left.unlink()
                continue
            lock = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
            finally:
                os.close(lock)


def prepare(installation: Installation, folder: Path) -> None:
    """Lay out the `backends` that tritonserver reads: python and pytorch. Raises ServerError.

    They are copies (4 MB): Triton refuses one whose library is a link out of its folder, and looks
    for the stub beside the library, where the wheel does not have it.
    """
    python = folder / "backends" / "python"
    try:
        shutil.copytree(installation.python_backend, python)
        shutil.copy(installation.stub, python)
        shutil.copytree(OUR_BACKENDS / "pytorch", folder / "backends" / "pytorch")
    except OSError as e:
        raise ServerError(
            f"{folder.parent} cannot be written: {reason(e)}; it takes a copy of the model "
            "repository and 4 MB more: set TMPDIR to another folder"
        ) from e


def reason(error: OSError) -> str:
    """Why a file, or one of several, could not be copied."""
    if not isinstance(error, shutil.Error):
        return error.strerror or str(error)
    first = str(error.args[0][0][2])  # its own list, where the text has the names once more
    found = re.match(r"\[Errno \d+\] ([^:]+)", first)
    return found[1] if found else first


def command(
    installation: Installation,
    folder: Path,
    ports: Ports,
    tls: Tls | None,
    connection_age: int,
    key: str,
    shm_prefix: str,
    verbose: bool,
) -> list[str]:
    """tritonserver's arguments, for a folder with `backends` and `models`."""
    # Nobody needs these calls here, and Triton has no switch to turn them off: a key that nobody
    # else knows does it. Shared memory would let a client name a file of /dev/shm to read or write.
    closed = f"shared-memory,model-repository,trace,logging:{KEY_HEADER}={key}"
    return [
        str(installation.binary),
        f"--model-repository={folder / 'models'}",
        f"--backend-directory={folder / 'backends'}",
        f"--grpc-address={f'[{ports.host}]' if ':' in ports.host else ports.host}",
        f"--grpc-port={ports.grpc}",
        f"--grpc-max-connection-age={connection_age * 1000}",
        *_tls_options(tls),
        f"--http-address={LOOPBACK}",
        f"--http-port={ports.http}",
        f"--metrics-address={LOOPBACK}",
        f"--metrics-port={ports.metrics}",
        "--disable-auto-complete-config",  # the builder writes all of it
        # Lets vit-server unload models, by their folders, and nobody else.
        "--model-control-mode=poll",
        "--repository-poll-secs=1",
        f"--grpc-restricted-protocol={closed}",
        f"--http-restricted-api={closed}",
        # Tensors between server and stubs. The default of 1 MB grows in steps under load.
        f"--backend-config=python,shm-default-byte-size={64 * MIB}",
        f"--backend-config=python,shm-growth-byte-size={64 * MIB}",
        f"--backend-config=python,shm-region-prefix-name={shm_prefix}",
        f"--log-info={str(verbose).lower()}",
        f"--log-warning={str(verbose).lower()}",  # else a page about the GPU that is not there
    ]


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


def environment(installation: Installation) -> dict[str, str]:
    """The environment for tritonserver: its libraries, this Python for its stubs, and threads."""
    env = dict(os.environ)
    libpython = sysconfig.get_config_var("LIBDIR") or ""
    paths = [str(installation.libraries), libpython, env.get("LD_LIBRARY_PATH", "")]
    env["LD_LIBRARY_PATH"] = ":".join(path for path in paths if path)
    # The stub embeds an interpreter that ignores PYTHONPATH and takes the virtual environment of
    # the first `python3` on the PATH.
    env["PATH"] = f"{Path(sys.executable).parent}:{env.get('PATH', os.defpath)}"
    env.setdefault("OMP_NUM_THREADS", str(cores()))
    # Without a limit OpenMP's threads spin while they wait, which collapses when `preprocess`
    # takes a core (measured: 100 ms an image became 575 ms; so it is 262 ms).
    env.setdefault("GOMP_SPINCOUNT", "10000")
    return env


def bracketed(host: str, port: int) -> str:
    """host:port, where an IPv6 address has brackets for its own colons."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def cores() -> int:
    """Cores this process may use: its affinity, and its cgroup's CPU quota where it has one."""
    count = len(os.sched_getaffinity(0))
    cgroups = Path("/sys/fs/cgroup")
    files = [[cgroups / "cpu.max"]]  # version 2 of cgroups has both numbers in one file
    files += [[cgroups / "cpu" / f"cpu.cfs_{name}_us" for name in ("quota", "period")]]
    for pair in files:
        if all(file.is_file() for file in pair):
            quota, period = " ".join(file.read_text() for file in pair).split()
            if quota not in ("max", "-1"):  # none
                count = min(count, math.ceil(int(quota) / int(period)))
    return max(1, count)


def _has_libpython() -> bool:
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    folder = Path(sysconfig.get_config_var("LIBDIR") or "/nonexistent")
    if (folder / name).exists():
        return True
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True

"""Finds tritonserver and its backends: NVIDIA's, or those of the nvidia-pytriton wheel."""

import ctypes
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from .tritonserver import ServerError

NVIDIA = Path("/opt/tritonserver")  # NVIDIA's container images
OUR_BACKENDS = Path(__file__).parent / "backends"
STUB = "triton_python_backend_stub"
_LIBTORCH = "libtriton_pytorch.so"


@dataclass(frozen=True)
class Installation:
    """A tritonserver and its parts. NVIDIA's has a folder of backends; the wheel does not."""

    binary: Path
    python_backend: Path  # folder with libtriton_python.so
    backends: Path | None  # all that are needed; None if `prepare` has to create the folder
    stub: Path  # the executable that runs a Python model
    libraries: Path | None  # folder to add to LD_LIBRARY_PATH for the binary

    @property
    def python_models(self) -> set[str]:
        """Names of the models that run in processes of their own."""
        cpp = self.backends and (self.backends / "pytorch" / _LIBTORCH).exists()
        return {"preprocess", "postprocess"} | (set() if cpp else {"vit"})


def find(root: Path | None = None) -> Installation:
    """Return the tritonserver in `root`; by default NVIDIA's if installed, else the wheel's.

    Raises:
        ServerError: there is none, or it is incomplete.
    """
    if root is None and (NVIDIA / "bin" / "tritonserver").exists():
        root = NVIDIA
    return _embedded() if root is None else _nvidia(root.absolute())


def _nvidia(root: Path) -> Installation:
    binary, backends = root / "bin" / "tritonserver", root / "backends"
    for path in (binary, backends / "python", backends / "pytorch"):
        if not path.exists():
            raise ServerError(
                f"{root} has no {path.relative_to(root)}: a tritonserver with the backends "
                "python and pytorch is needed, as in NVIDIA's container images"
            )
    python = backends / "python"
    return Installation(binary, python, backends, python / STUB, libraries=None)


def _embedded() -> Installation:
    spec = find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise ServerError(
            f"no tritonserver found, neither in {NVIDIA} (NVIDIA's container images) nor as a "
            "wheel: install that with `pip install 'vit-server[embedded]'` (Python 3.10 to 3.12), "
            "or name another one with --tritonserver DIR"
        )
    package = Path(spec.origin).parent
    root = package / "tritonserver"
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = root / "python_backend_stubs" / python / STUB
    libraries = package.parent / "nvidia_pytriton.libs"
    binary, python_backend = root / "bin" / "tritonserver", root / "backends" / "python"
    for path in (binary, python_backend, stub, libraries):
        if not path.exists():
            raise ServerError(
                f"nvidia-pytriton has no {path}: version 0.7.0 is needed, on Python 3.10 to 3.12"
            )
    if not _has_libpython():
        raise ServerError(
            f"Triton's Python models need the shared library of Python {python}, and "
            f"{sys.executable} has none: on Debian and Ubuntu `apt-get install libpython{python}`"
        )
    return Installation(binary, python_backend, None, stub, libraries)


def prepare(installation: Installation, folder: Path) -> Path:
    """Return the folder with the backends python and pytorch. Raises ServerError.

    For the wheel they are copied (4 MB) to `folder`: Triton rejects a backend whose library is a
    link out of its folder, and looks for the stub beside the library, where the wheel lacks it.
    """
    if installation.backends:
        return installation.backends
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        raise ServerError(
            f"{folder.parent} is mounted noexec, but Triton's backends must be executable there: "
            "set TMPDIR to another folder, or mount it with exec (docker run --tmpfs /tmp:exec)"
        )
    backends = folder / "backends"
    try:
        shutil.copytree(installation.python_backend, backends / "python")
        shutil.copy(installation.stub, backends / "python")
        shutil.copytree(OUR_BACKENDS / "pytorch", backends / "pytorch")
    except OSError as e:
        raise ServerError(
            f"{folder.parent} cannot be written: {reason(e)}; it needs room for a copy of the "
            "model repository and 4 MB more: set TMPDIR to another folder"
        ) from e
    return backends


def reason(error: OSError) -> str:
    """Return why a file, or the first of several, could not be copied."""
    if not isinstance(error, shutil.Error):
        return error.strerror or str(error)
    first = str(error.args[0][0][2])  # shutil.Error's first (source, destination, reason)
    found = re.match(r"\[Errno \d+\] ([^:]+)", first)
    return found[1] if found else first


def environment(installation: Installation) -> dict[str, str]:
    """Return tritonserver's environment: its libraries, this Python for its stubs, and threads."""
    # Vertex AI's variables would enable its endpoint and disable gRPC and HTTP.
    env = {name: value for name, value in os.environ.items() if not name.startswith("AIP_")}
    if installation.libraries:
        libpython = sysconfig.get_config_var("LIBDIR") or ""
        paths = [str(installation.libraries), libpython, env.get("LD_LIBRARY_PATH", "")]
        env["LD_LIBRARY_PATH"] = ":".join(path for path in paths if path)
    # The stub embeds an interpreter that ignores PYTHONPATH and uses the virtual environment of
    # the first `python3` on the PATH.
    env["PATH"] = f"{Path(sys.executable).parent}:{env.get('PATH', os.defpath)}"
    if not env.get("OMP_NUM_THREADS", "").strip():
        env["OMP_NUM_THREADS"] = str(cores())
    # Without a limit OpenMP threads spin while they wait, and throughput collapses when
    # `preprocess` takes a core (measured: 100 ms per image became 575 ms; with the limit, 262 ms).
    env.setdefault("GOMP_SPINCOUNT", "10000")
    # On Hopper and newer GPUs torch would prefer cuDNN's attention, which builds a new plan for
    # each batch size in each thread: 64 stalls (sdp_utils.cpp and cudnn/MHA.cpp in torch). Not
    # measured yet.
    env.setdefault("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")
    return env


def help_text(installation: Installation) -> str:
    """Return the output of tritonserver --help."""
    # 2.51 writes it to standard error, and exits with code 1.
    done = subprocess.run(
        [str(installation.binary), "--help"],
        env=environment(installation),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.stdout


def threads(env: dict[str, str]) -> int:
    """Return the cores to use in an `environment`: the first number in OMP_NUM_THREADS.

    The others are for nested threads.

    Raises:
        ServerError: OpenMP would not accept the variable.
    """
    text = env["OMP_NUM_THREADS"]
    counts = [count.strip() for count in text.split(",")]
    if not all(count.isdecimal() and 0 < int(count) < 2**16 for count in counts):
        raise ServerError(
            f"OMP_NUM_THREADS={text} is neither a number of threads nor a list of them"
        )
    return int(counts[0])


def cores() -> int:
    """Return the cores this process may use, by its affinity and its cgroup's CPU quota, if any."""
    count = len(os.sched_getaffinity(0))
    cgroups = Path("/sys/fs/cgroup")
    files = [[cgroups / "cpu.max"]]  # cgroups v2 have both numbers in one file
    files += [[cgroups / "cpu" / f"cpu.cfs_{name}_us" for name in ("quota", "period")]]
    for pair in files:
        if all(file.is_file() for file in pair):
            quota, period = " ".join(file.read_text() for file in pair).split()
            if quota not in ("max", "-1"):  # no quota
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

"""Where tritonserver and its backends are: NVIDIA's, or those of the nvidia-pytriton wheel."""

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

NVIDIA = Path("/opt/tritonserver")  # in its container images
OUR_BACKENDS = Path(__file__).parent / "backends"
STUB = "triton_python_backend_stub"
_LIBTORCH = "libtriton_pytorch.so"


@dataclass(frozen=True)
class Installation:
    """A tritonserver. Those of NVIDIA's have their backends beside them; the wheel has parts."""

    binary: Path
    python_backend: Path  # folder with libtriton_python.so
    backends: Path | None  # all that are needed; None where `prepare` is to lay them out
    stub: Path  # the process a Python model runs in
    libraries: Path | None  # that the binary would not find

    @property
    def python_models(self) -> set[str]:
        """The models that run in processes of their own."""
        cpp = self.backends and (self.backends / "pytorch" / _LIBTORCH).exists()
        return {"preprocess", "postprocess"} | (set() if cpp else {"vit"})


def find(root: Path | None = None) -> Installation:
    """The tritonserver in `root`; without it NVIDIA's where that is installed, else the wheel's.

    Raises:
        ServerError: there is none, or it lacks a part.
    """
    if root is None and (NVIDIA / "bin" / "tritonserver").exists():
        root = NVIDIA
    return _embedded() if root is None else _nvidia(root)


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
    """The folder of backends, python and pytorch, for tritonserver. Raises ServerError.

    Those of the wheel are copies (4 MB) in `folder`: Triton refuses one whose library is a link out
    of its folder, and looks for the stub beside the library, where the wheel does not have it.
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
    """Why a file, or one of several, could not be copied."""
    if not isinstance(error, shutil.Error):
        return error.strerror or str(error)
    first = str(error.args[0][0][2])  # its own list, where the text has the names once more
    found = re.match(r"\[Errno \d+\] ([^:]+)", first)
    return found[1] if found else first


def environment(installation: Installation) -> dict[str, str]:
    """The environment for tritonserver: its libraries, this Python for its stubs, and threads."""
    # Vertex AI's variables would turn its endpoint on, and gRPC and HTTP off.
    env = {name: value for name, value in os.environ.items() if not name.startswith("AIP_")}
    if installation.libraries:
        libpython = sysconfig.get_config_var("LIBDIR") or ""
        paths = [str(installation.libraries), libpython, env.get("LD_LIBRARY_PATH", "")]
        env["LD_LIBRARY_PATH"] = ":".join(path for path in paths if path)
    # The stub embeds an interpreter that ignores PYTHONPATH and takes the virtual environment of
    # the first `python3` on the PATH.
    env["PATH"] = f"{Path(sys.executable).parent}:{env.get('PATH', os.defpath)}"
    if not env.get("OMP_NUM_THREADS", "").strip():
        env["OMP_NUM_THREADS"] = str(cores())
    # Without a limit OpenMP's threads spin while they wait, which collapses when `preprocess`
    # takes a core (measured: 100 ms an image became 575 ms; so it is 262 ms).
    env.setdefault("GOMP_SPINCOUNT", "10000")
    # On GPUs from Hopper on torch would take cuDNN's attention, which plans for each batch size
    # anew, in each thread: 64 stalls (sdp_utils.cpp and cudnn/MHA.cpp in torch). Not measured yet.
    env.setdefault("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")
    return env


def help_text(installation: Installation) -> str:
    """tritonserver's own."""
    # 2.51 writes it to standard error, and ends with exit code 1.
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
    """The cores to use in an `environment`: the first of its numbers of threads for OpenMP.

    The others are for nested threads.

    Raises:
        ServerError: OpenMP would not take them.
    """
    text = env["OMP_NUM_THREADS"]
    counts = [count.strip() for count in text.split(",")]
    if not all(count.isdecimal() and 0 < int(count) < 2**16 for count in counts):
        raise ServerError(
            f"OMP_NUM_THREADS={text} is neither a number of threads nor a list of them"
        )
    return int(counts[0])


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

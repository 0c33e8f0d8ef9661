"""All that `python -m bench.gpu` needs, in a folder for a machine with a GPU and without a network.

`python -m bench.gpu.kit FOLDER` writes kit.tar.xz and run.py, for Python 3.12 on x86-64 (Ubuntu
24.04) which has torch with CUDA, llvmlite (Numba brings it) and Pillow.
"""

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement

from .. import say
from ..load import perf_analyzer

ROOT = Path(__file__).parents[2]
PYTHON = "3.12"
SITE = Path("lib") / f"python{PYTHON}" / "site-packages"
OURS = ("builder", "client", "server")
# The machine has these, with their dependencies; hf-xet is for downloads.
LEFT_OUT = {"torch", "llvmlite", "pillow", "hf-xet"}
NUMPY = "numpy==1.26.4"  # Triton's stubs need NumPy 1
PROJECT = ("bench", "photos", "model_repository")
LIMIT = 50 << 20  # bytes


def main() -> int:
    """Run the command; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.kit", description=__doc__)
    parser.add_argument("folder", type=Path, help="where to; it must not be there yet")
    folder: Path = parser.parse_args().folder
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        print(f"bench-gpu-kit: {folder} exists already", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as name:
        environment = Path(name)
        fill(environment)
        say("Packing …")
        file = folder / "kit.tar.xz"
        with tarfile.open(file, "w:xz", preset=9) as tar:
            tar.add(environment, arcname="", filter=_plain)
    shutil.copy(Path(__file__).with_name("kit_run.py"), folder / "run.py")
    size = file.stat().st_size
    print(
        f"Wrote {folder}: {size / 2**20:.1f} MiB. On the GPU machine: python3 run.py --output DIR"
    )
    if size > LIMIT:
        print(f"bench-gpu-kit: that is more than {LIMIT >> 20} MiB", file=sys.stderr)
    return int(size > LIMIT)


def fill(environment: Path) -> None:
    """Fill a folder with the files that run.py puts into a virtual environment."""
    site = environment / SITE
    say("Collecting packages …")
    with tempfile.TemporaryDirectory() as wheels:
        paths = [str(ROOT / name) for name in OURS]
        _pip("wheel", "--no-deps", "--wheel-dir", wheels, *paths)
        built = map(str, Path(wheels).glob("*.whl"))
        what = ["--target", str(site), "--python-version", PYTHON, "--only-binary=:all:"]
        _pip("install", "--no-deps", "--no-compile", *what, *built, *requirements(), NUMPY)
    shutil.rmtree(site / "bin", ignore_errors=True)
    for tests in list((site / "numpy").rglob("tests")):
        shutil.rmtree(tests)
    if shutil.which("strip"):  # symbols are a tenth of the size
        subprocess.run(["strip", *site.glob("**/*.cpython-*.so")], check=True)
    _copy_triton(site)
    requirement, sha256 = perf_analyzer.NEWER
    binary = environment / "perf_analyzer" / requirement / "perf_analyzer"
    binary.parent.mkdir(parents=True)
    perf_analyzer.fetch(requirement, sha256, binary, "manylinux_2_38_x86_64")
    for part in PROJECT:
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / part, environment / "project" / part, ignore=ignored)


def requirements() -> list[str]:
    """Return the transitive requirements of our distributions, in this environment's versions."""
    found: dict[str, str] = {}
    left = [Requirement(f"vit-{name}") for name in OURS]
    while left:
        requirement = left.pop()
        package = distribution(requirement.name)
        for text in package.requires or ():
            needed = Requirement(text)
            wanted = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.3"}
            extras = requirement.extras or {""}
            if needed.marker and not any(
                needed.marker.evaluate({**wanted, "extra": extra}) for extra in extras
            ):
                continue
            name = needed.name.lower()
            if name not in found and name not in LEFT_OUT | {"numpy"}:
                found[name] = f"{needed.name}=={distribution(needed.name).version}"
                left.append(needed)
    return sorted(found.values())


def _copy_triton(site: Path) -> None:
    """Copy from the nvidia-pytriton wheel: tritonserver, Python backend, one stub, libraries."""
    spec = find_spec("pytriton")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    target = site / "pytriton"
    for part in ("bin", "backends/python", f"python_backend_stubs/{PYTHON}"):
        shutil.copytree(package / "tritonserver" / part, target / "tritonserver" / part)
    (target / "__init__.py").touch()
    # The library of Python 3.13 is only for that version's stub.
    ignored = shutil.ignore_patterns("libpython3*")
    libraries = "nvidia_pytriton.libs"
    shutil.copytree(package.parent / libraries, site / libraries, ignore=ignored)


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True)


def _plain(file: tarfile.TarInfo) -> tarfile.TarInfo:
    """Remove the owner from a file's entry."""
    file.uid = file.gid = 0
    file.uname = file.gname = ""
    return file


if __name__ == "__main__":
    sys.exit(main())

"""Measure the network on this machine's GPU: `python3 run.py --output DIR [--device cpu] …`

First unpacks kit.tar.xz, which is beside this file. Needs Python 3.12 with torch with CUDA,
llvmlite and Pillow; nothing is downloaded, and nothing outside this folder is changed.
"""

import os
import sys
import sysconfig
import tarfile
import venv
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENVIRONMENT = HERE / "environment"
SITE = ENVIRONMENT / "lib" / "python3.12" / "site-packages"
DONE = ENVIRONMENT / "unpacked"
KIT = HERE / "kit.tar.xz"
PATHS = ("--output", "--checkpoint")


def main() -> None:
    if sys.version_info[:2] != (3, 12):
        sys.exit(f"run.py: this kit is for Python 3.12, not {sys.version.split()[0]}")
    if missing := [name for name in ("torch", "llvmlite", "PIL") if find_spec(name) is None]:
        sys.exit(f"run.py: {sys.executable} lacks {', '.join(missing)}")
    if not DONE.exists() or DONE.read_text() != this_kit():
        unpack()
    given: list[str] = []
    for word in sys.argv[1:]:
        name, equals, path = word.partition("=")
        if name in PATHS and equals:
            given += [name, str(Path.cwd() / path)]
        else:  # resolve relative paths here
            given.append(str(Path.cwd() / word) if given[-1:] and given[-1] in PATHS else word)
    os.environ["PYTHONWARNINGS"] = "ignore::FutureWarning"
    os.chdir(ENVIRONMENT / "project")
    python = str(ENVIRONMENT / "bin" / "python")
    os.execv(python, [python, "-m", "bench.gpu", *given])


def unpack() -> None:
    print("Unpacking …", file=sys.stderr, flush=True)
    venv.create(ENVIRONMENT, system_site_packages=True, symlinks=True, clear=True)
    with tarfile.open(KIT) as tar:
        tar.extractall(ENVIRONMENT, filter="data")
    # If this Python is in a virtual environment, system_site_packages excludes its packages.
    given = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (SITE / "given.pth").write_text("\n".join(sorted(given)) + "\n")
    for package in distributions(path=[str(SITE)]):
        for script in package.entry_points.select(group="console_scripts"):
            file = ENVIRONMENT / "bin" / script.name
            file.write_text(
                f"#!{ENVIRONMENT}/bin/python\nimport sys\n"
                f"from {script.module} import {script.attr}\nsys.exit({script.attr}())\n"
            )
            file.chmod(0o755)
    DONE.write_text(this_kit())


def this_kit() -> str:
    """Return an id of this kit and its location: if either changes, it is unpacked again."""
    status = KIT.stat()
    return f"{KIT} {status.st_size} {status.st_mtime_ns}"


if __name__ == "__main__":
    main()

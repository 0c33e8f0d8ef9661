"""What the images are built on: the real base where a registry has it, else a stand-in for it.

NVIDIA's is many GB, so it is stood in for unless TRITON_IMAGE names one.
"""

import contextlib
import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .engine import TOKEN, Engine

ROOT = Path(__file__).parents[2]
PYTHON = "python:3.11-slim-bookworm"
PACKAGES = "python3,python3-pip,python3-venv,libpython3.11,ca-certificates"


@dataclass(frozen=True)
class Bases:
    """Base images, as arguments of a build."""

    arguments: list[str]
    stood_in: list[str]  # which of the two


@contextlib.contextmanager
def bases(docker: Engine, folder: Path) -> Iterator[Bases]:
    """While the builds run: packages that lie on this machine are served to them meanwhile."""
    if docker("pull", "--quiet", PYTHON, check=False).returncode == 0:
        python, more, stood_in = PYTHON, [], []
        serving: Any = contextlib.nullcontext()
    else:
        serving = package_server()
        python, stood_in = f"{TOKEN}-python", [PYTHON]
    with serving as server:
        if stood_in:
            _debian(docker, python, folder, server)
            more = ["--build-arg", f"TORCH_INDEX={server}/none/simple"]
        triton = os.environ.get("TRITON_IMAGE")
        if not triton:
            triton, stood_in = f"{TOKEN}-triton", [*stood_in, "nvcr.io/nvidia/tritonserver"]
            _nvidia(docker, triton, python, more)
        yield Bases(
            ["--network=host", *more, f"--build-arg=PYTHON_IMAGE={python}"]
            + [f"--build-arg=TRITON_IMAGE={triton}", f"--label={TOKEN}=1"],
            stood_in,
        )


def _debian(docker: Engine, image: str, folder: Path, server: str) -> None:
    """Bookworm with the Python that python:3.11-slim-bookworm has, under the same names."""
    print(f"Making a stand-in for {PYTHON} …", flush=True)
    tar, names = folder / "base.tar", {"python": "python3"}
    command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={PACKAGES}"]
    command += [f"--customize-hook=ln -s {to} $1/usr/bin/{name}" for name, to in names.items()]
    subprocess.run([*command, "bookworm", str(tar)], check=True, timeout=400)
    docker("import", tar, f"{image}-bare")
    (folder / "pip.conf").write_text(pip_conf(server))
    lines = [f"FROM {image}-bare", "COPY pip.conf /etc/pip.conf"]
    if bundle := os.environ.get("SSL_CERT_FILE"):  # those of a proxy that packages come through
        shutil.copy(bundle, folder / "bundle.crt")
        lines.append("COPY bundle.crt /etc/ssl/certs/ca-certificates.crt")
    docker("build", "-t", image, "-f", "-", folder, input="\n".join(lines), seconds=300)
    tar.unlink()


def _nvidia(docker: Engine, image: str, python: str, more: list[str]) -> None:
    """The wheel's tritonserver where NVIDIA's has its own; `pytorch` in Python, for theirs in C++."""
    print("Making a stand-in for NVIDIA's tritonserver …", flush=True)
    dockerfile = Path(__file__).with_name("nvidia.Dockerfile")
    arguments = ["--network=host", f"--build-arg=PYTHON_IMAGE={python}", *more]
    docker("build", "-t", image, "-f", dockerfile, *arguments, ROOT, seconds=600)


def _local(value: str) -> Path | None:
    """A folder of this machine that pip is told to look into."""
    path = value.removeprefix("file://")
    return Path(path) if path.startswith("/") else None


@functools.cache
def _settings() -> dict[str, list[str]]:
    """pip's own, from its files and the environment; each a list of places."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    lines = subprocess.check_output(command, text=True).splitlines()
    found: dict[str, list[str]] = {}
    for line in lines:
        name, _, value = line.partition("=")
        key = name.rpartition(".")[2]
        if key in ("index-url", "extra-index-url", "find-links"):
            found[key] = value.strip("'").split()
    return found


def pip_conf(server: str) -> str:
    """The same settings for a build, with folders as `server` has them."""
    lines = ["[global]", "trusted-host = 127.0.0.1", "disable-pip-version-check = true"]
    folders = _folders()
    for key, places in _settings().items():
        urls = []
        for place in places:
            if path := _local(place):
                shared = path if key == "find-links" else path.parent
                tail = "" if key == "find-links" else f"{path.name}/"
                urls.append(f"{server}/{folders.index(shared)}/{tail}")
            else:
                urls.append(place)
        lines.append(f"{key} = {' '.join(urls)}")
    return "\n".join(lines) + "\n"


def _folders() -> list[Path]:
    """Those of pip's settings; of an index the one above, where its links lead."""
    found = []
    for key, places in _settings().items():
        paths = [path for path in map(_local, places) if path]
        found += paths if key == "find-links" else [path.parent for path in paths]
    return list(dict.fromkeys(found))


class _Handler(http.server.SimpleHTTPRequestHandler):
    """/0/… is the first folder, and so on; all else is not found."""

    def translate_path(self, path: str) -> str:
        number, _, rest = path.lstrip("/").partition("/")
        folders = _folders()
        if not number.isdecimal() or int(number) >= len(folders):
            return "/nonexistent"
        self.directory = str(folders[int(number)])
        return super().translate_path(f"/{rest}")

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def package_server() -> Iterator[str]:
    """The URL of what serves those folders on loopback."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()

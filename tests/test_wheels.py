"""The three distributions as archives, each installed into an empty environment and tried there."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import vit_builder
import vit_client
import vit_server
from conftest import GOLDENS, PHOTOS, Server, serving

ROOT = Path(__file__).parents[1]
NAMES = ("builder", "client", "server")


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each distribution an sdist, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    for name in NAMES:
        command = [sys.executable, "-m", "build", "--outdir", folder, ROOT / name]
        subprocess.run(command, check=True, capture_output=True)
    return folder


def installed(wheel: str, archives: Path, folder: Path) -> Path:
    """The commands of an environment that has this wheel (with extras, where it says so)."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    bin = folder / "bin"
    name, _, extras = wheel.partition("[")
    (file,) = archives.glob(f"vit_{name}-*.whl")
    what = f"{file}[{extras}" if extras else str(file)
    pip = [bin / "python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", what]
    subprocess.run(pip, check=True)
    return bin


def test_one_version() -> None:
    assert vit_builder.__version__ == vit_client.__version__ == vit_server.__version__


def test_archives_are_complete(archives: Path) -> None:
    files = sorted(map(str, archives.iterdir()))
    assert len(files) == 2 * len(NAMES)
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *files], check=True)
    licence = (ROOT / "LICENSE").read_bytes()
    for name in NAMES:
        stem = f"vit_{name}-{vit_client.__version__}"
        with zipfile.ZipFile(archives / f"{stem}-py3-none-any.whl") as wheel:
            assert wheel.read(f"{stem}.dist-info/licenses/LICENSE") == licence
            assert f"vit_{name}/py.typed" in wheel.namelist()
        with tarfile.open(archives / f"{stem}.tar.gz") as sdist:
            member = sdist.extractfile(f"{stem}/LICENSE")
            assert member is not None
            assert member.read() == licence


def test_client(archives: Path, tiny_server: Server, tmp_path: Path) -> None:
    bin = installed("client", archives, tmp_path / "venv")
    photo = PHOTOS / "coffee.jpg"
    asked = [bin / "vit-client", "classify", photo, "--top-k", "1", "--url", tiny_server.url]
    answer = subprocess.run(asked, check=True, capture_output=True, text=True).stdout
    assert answer.splitlines()[0] == str(photo)
    listed = subprocess.run(
        [bin / "python", "-m", "pip", "list", "--format=freeze"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    needed = {line.partition("==")[0] for line in listed.splitlines()} - {"pip", "setuptools"}
    light = {"grpcio", "numpy", "pillow", "protobuf", "typing_extensions", "vit-client"}
    assert needed == light


def test_builder_and_server(archives: Path, tmp_path: Path) -> None:
    build = installed("builder", archives, tmp_path / "builder")
    command = [build / "vit-builder", "--checkpoint", GOLDENS / "tiny.pt"]
    subprocess.run([*command, "--output", tmp_path / "models"], check=True)
    serve = installed("server[embedded]", archives, tmp_path / "server")
    with (
        serving(tmp_path / "models", bin=serve) as server,
        vit_client.Client(server.url) as client,
    ):
        assert client.model().builder_version == vit_builder.__version__
        assert len(client.embed(PHOTOS / "coffee.jpg")) == 64

"""The client in other environments: Python 3.10 to 3.13, protobuf 4 to 7, numpy 1.26 and 2.

Each gets a virtual environment with the client installed as a user would, and runs the client's
own tests there against this run's server. Versions without an interpreter on this machine are
skipped. The environment of this run is one more combination.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = ["test_answers.py", "test_stream.py"]


def interpreter(version: str) -> str | None:
    """A Python of this version, from the PATH or pyenv."""
    homes = [Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"]
    found = [str(path) for home in homes for path in home.glob(f"{version}.*/bin/python3")]
    return next(iter(found), None) or shutil.which(f"python{version}")


@pytest.mark.parametrize(
    ("version", "pins"),
    [
        # The oldest versions that the client allows.
        (
            "3.10",
            ["grpcio==1.60.0", "protobuf==4.25.0", "numpy==1.26.0", "pillow==10.1.0"],
        ),
        ("3.12", ["protobuf==5.*", "numpy==2.0.*"]),
        ("3.13", ["protobuf==7.*", "numpy==2.*"]),
    ],
    ids=["python 3.10, the oldest", "python 3.12, protobuf 5, numpy 2", "python 3.13, protobuf 7"],
)
def test_the_client_works_with(url: str, tmp_path: Path, version: str, pins: list[str]) -> None:
    python = interpreter(version)
    if python is None:
        pytest.skip(f"no Python {version} on this machine")
    folder = tmp_path / "venv"
    subprocess.run([python, "-m", "venv", folder], check=True)
    packages = [f"{ROOT / 'client'}[progress]", "pytest", *pins]
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", *packages]
    subprocess.run(pip, check=True)
    ran = subprocess.run(
        [
            *(folder / "bin" / "python", "-m", "pytest", "-q", "-c", os.devnull),
            *("--rootdir", ROOT / "tests" / "client", "--confcutdir", ROOT / "tests" / "client"),
            *("-p", "client.server_elsewhere", "-p", "no:cacheprovider"),
            *(ROOT / "tests" / "client" / test for test in TESTS),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests"), "VIT_TEST_URL": url},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-1000:]

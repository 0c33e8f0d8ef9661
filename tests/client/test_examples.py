"""The examples, run as a reader would."""

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

from .conftest import encoded

EXAMPLES = Path(__file__).parents[2] / "client" / "examples"
PHOTOS = Path(__file__).parents[2] / "photos"


def run(url: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "VIT_URL": url},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )


def test_every_example_is_tested() -> None:
    tested = {"walk.py", "duplicates.py", "web_handler.py"}
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix == ".py"} == tested


def test_walk(url: str) -> None:
    ran = run(url, EXAMPLES / "walk.py", PHOTOS)
    assert "3 photos" in ran.stdout
    assert "%" in ran.stdout
    assert "coffee.jpg" in ran.stdout
    assert ran.stderr == ""


def test_duplicates(url: str, tmp_path: Path) -> None:
    for path in PHOTOS.glob("*.jpg"):
        shutil.copy(path, tmp_path)
    shutil.copy(PHOTOS / "coffee.jpg", tmp_path / "again.jpg")
    (tmp_path / "broken.jpg").write_bytes(b"broken")
    ran = run(url, EXAMPLES / "duplicates.py", tmp_path, "0.9999")
    assert ran.stdout.split()[1:] == [str(tmp_path / "again.jpg"), str(tmp_path / "coffee.jpg")]
    assert "skipped" in ran.stderr


def test_web_handler(url: str) -> None:
    def post(address: str, data: bytes) -> tuple[int, object]:
        try:
            with urllib.request.urlopen(address, data) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    command = [sys.executable, str(EXAMPLES / "web_handler.py"), "0"]
    environment = {**os.environ, "VIT_URL": url}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert address.startswith("http://127.0.0.1:")
            status, body = post(address, encoded(0))
            assert status == 200
            assert isinstance(body, list)
            assert len(body) == 3
            assert post(address, b"not an image")[0] == 422
        finally:
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=10)
    assert said == ""
    assert process.returncode == 0

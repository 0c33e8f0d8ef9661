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

import pytest
from vit_client.cli import main

from .conftest import encoded
from .test_cli_shards import sample, shard, tar

EXAMPLES = Path(__file__).parents[2] / "client" / "examples"
PHOTOS = Path(__file__).parents[2] / "photos"


SEARCHES = ("search_faiss", "search_duckdb", "search_qdrant")


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
    tested = {"walk.py", "duplicates.py", "web_handler.py", *(f"{name}.py" for name in SEARCHES)}
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


@pytest.mark.parametrize("name", SEARCHES)
def test_searches(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Of two shards, with an image that is none; and not of another model."""
    pytest.importorskip({"search_qdrant": "qdrant_client"}.get(name, name.partition("_")[2]))
    monkeypatch.setenv("VIT_URL", url)
    monkeypatch.chdir(tmp_path)
    names = [str(shard(Path(f"{n}.tar"), range(10 * n, 10 * n + 6))) for n in range(2)]
    names.append(str(tar(Path("2.tar"), sample(30, b"no image"))))
    assert main(["embed", *names, "-o", "embedded/"]) == 1
    Path("query.png").write_bytes(encoded(12))
    example = EXAMPLES / f"{name}.py"
    first = [] if name == "search_qdrant" else ["embedded/"]
    if not first:
        for _ in range(2):
            run(url, example, "load", "embedded/")
    found = run(url, example, *first, "query.png", 12).stdout.splitlines()
    assert len(found) == 12
    assert found[0] == " 1.0000  1.tar: 000012"
    of_another_model("embedded/")
    if not first:
        shutil.rmtree("qdrant")
        run(url, example, "load", "embedded/")
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run(url, example, *first, "query.png")
    assert "model" in caught.value.stderr
    assert "Traceback" not in caught.value.stderr


def of_another_model(folder: str) -> None:
    """As if another one had written the parts."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for part in Path(folder).glob("*.parquet"):
        stored = pq.read_table(part)
        about = json.loads(stored.schema.metadata[b"model"])
        stored = stored.replace_schema_metadata(
            {b"model": json.dumps({**about, "model_version": "12345"}).encode()}
        )
        column = stored.schema.get_field_index("model_version")
        stored = stored.set_column(column, "model_version", pa.array(["12345"] * len(stored)))
        pq.write_table(stored, part)

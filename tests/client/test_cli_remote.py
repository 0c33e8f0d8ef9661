"""Shards and parts in a bucket: `moto`'s S3 server on loopback, over HTTP."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from vit_client.cli import _parts, main

from .test_cli_shards import content, sample, shard, tar

fsspec = pytest.importorskip("fsspec")
pytest.importorskip("s3fs")
moto_server = pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Its address; credentials are where AWS's own tools look for them."""
    for name, value in {
        "VIT_URL": url,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(_parts, "PART", 10)
    monkeypatch.setattr(_parts, "GROUP", 4)
    fsspec.config.conf.clear()
    files = fsspec.filesystem("s3", skip_instance_cache=True)
    name = f"bucket-{os.urandom(4).hex()}"
    files.mkdir(name)
    return f"s3://{name}"


def test_from_a_bucket_into_a_bucket(bucket: str, tmp_path: Path) -> None:
    names = [
        shard(tmp_path / f"{number:03}.tar", range(10 * number, 10 * number + 15))
        for number in range(3)
    ]
    assert main(["embed", *map(str, names), "--keep", "cls", "-o", f"{tmp_path}/here/"]) == 0
    files = fsspec.filesystem("s3")
    for name in names:
        files.put_file(str(name), f"{bucket}/in/{name.name}")
    out = f"{bucket}/out/"
    assert main(["embed", f"{bucket}/in/{{000..002}}.tar", "--keep", "cls", "-o", out]) == 0
    files.get(out, f"{tmp_path}/there/", recursive=True)
    assert content(tmp_path / "there") == content(tmp_path / "here")
    # A part that is missing is made anew, and the others are kept.
    kept = files.modified(f"{out}000-00000.parquet")
    files.rm_file(f"{out}000-00001.parquet")
    assert main(["embed", f"{bucket}/in/*.tar", "--keep", "cls", "-o", out]) == 0
    assert files.modified(f"{out}000-00000.parquet") == kept
    files.invalidate_cache()
    files.get(out, f"{tmp_path}/again/", recursive=True)
    assert content(tmp_path / "again") == content(tmp_path / "here")


def test_what_is_not_there(bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = f"{tmp_path}/out/"
    for name in (f"{bucket}/none.tar", "s3://no-such-bucket/a.tar"):
        assert main(["embed", name, "-o", out]) == 2
        assert f"{name}: " in capsys.readouterr().err
    made = tar(tmp_path / "a.tar", sample(1))
    assert main(["embed", str(made), "-o", "s3://no-such-bucket/out/"]) == 5
    assert "s3://no-such-bucket/out/.vit-client cannot be written" in capsys.readouterr().err
    assert main(["embed", f"{bucket}/*.tar", "-o", out]) == 2
    assert "no file matches this pattern" in capsys.readouterr().err
    assert main(["embed", "nonsense://a/b.tar", "-o", out]) == 2
    assert "needs fsspec and its package for this kind of address" in capsys.readouterr().err


def test_a_bucket_that_goes_away(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tar(tmp_path / "a.tar", sample(1))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.filesystem("s3").clear_instance_cache()
    assert main(["embed", str(made), "-o", f"{bucket}/out/"]) == 5
    said = capsys.readouterr().err
    assert "127.0.0.1:1" in said
    assert "Traceback" not in said

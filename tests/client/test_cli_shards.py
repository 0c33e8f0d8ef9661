"""`embed SHARDS -o FOLDER/`: what is read of shards, what the parts hold, and how a run resumes."""

import bz2
import fcntl
import gzip
import io
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vit_client import Client
from vit_client.cli import _parts, _shards, main

from .conftest import encoded
from .test_cli import vit_client

pa = pytest.importorskip("pyarrow", exc_type=ImportError)
pq = pytest.importorskip("pyarrow.parquet", exc_type=ImportError)

# Small parts, so that there are many: for a run in a process of its own.
SMALL = (
    "import sys\nfrom vit_client.cli import _parts, main\n"
    "_parts.PART, _parts.GROUP = 10, 4\nsys.exit(main(sys.argv[1:]))"
)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(_parts, "PART", 10)
    monkeypatch.setattr(_parts, "GROUP", 4)
    monkeypatch.setenv("VIT_URL", url)


def tar(path: Path, files: Iterable[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def sample(number: int, image: bytes | None = None) -> list[tuple[str, bytes]]:
    """The files of one sample, as WebDataset writes them."""
    return [
        (f"{number:06}.png", encoded(number) if image is None else image),
        (f"{number:06}.json", json.dumps({"number": number}).encode()),
        (f"{number:06}.cls", b"%d" % (number % 3)),
    ]


def shard(path: Path, numbers: Iterable[int]) -> Path:
    return tar(path, [file for number in numbers for file in sample(number)])


def rows(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for part in sorted(folder.glob("*.parquet")):
        found += pq.read_table(part).to_pylist()
    return found


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# -- tar ---------------------------------------------------------------------------------------


def test_a_tar_shard(tmp_path: Path, client: Client) -> None:
    made = shard(tmp_path / "00000.tar", range(25))
    assert main(["embed", str(made), "--keep", "json,cls", "-o", f"{tmp_path}/out/"]) == 0
    parts = sorted((tmp_path / "out").iterdir())
    assert [part.name for part in parts] == [f"00000-{number:05}.parquet" for number in range(3)]
    assert [pq.read_metadata(part).num_rows for part in parts] == [10, 10, 5]
    found = rows(tmp_path / "out")
    assert [row["key"] for row in found] == [f"{number:06}" for number in range(25)]
    assert {row["shard"] for row in found} == {"00000.tar"}
    assert [json.loads(row["json"]) for row in found] == [{"number": n} for n in range(25)]
    assert [row["cls"] for row in found] == [str(number % 3) for number in range(25)]
    right = client.embed([encoded(number) for number in range(25)])
    np.testing.assert_allclose([row["embedding"] for row in found], right, atol=1e-5)
    assert {row["error"] for row in found} == {None}
    assert {row["model_version"] for row in found} == {client.model().version}
    schema = pq.read_schema(parts[0])
    assert schema.field("embedding").type == pa.list_(pa.float32(), 64)
    assert json.loads(schema.metadata[b"model"])["model_version"] == client.model().version


@pytest.mark.parametrize("suffix", ["tar.gz", "tgz", "tar.xz", "TAR"])
def test_compressed_shards(tmp_path: Path, suffix: str) -> None:
    made = tmp_path / f"a.{suffix}"
    mode = {"tar.gz": "w:gz", "tgz": "w:gz", "tar.xz": "w:xz", "TAR": "w"}[suffix]
    with tarfile.open(made, mode) as archive:
        for name, data in sample(1) + sample(2):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    assert main(["embed", str(made), "-o", f"{tmp_path}/out/"]) == 0
    assert [row["key"] for row in rows(tmp_path / "out")] == ["000001", "000002"]
    assert (tmp_path / "out" / "a-00000.parquet").is_file()


def test_which_files_are_a_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same folder and name up to the first dot of the file, one after the other."""
    files = [
        ("__meta__", b"of the shard"),
        ("._a.png", b"of macOS"),
        ("v1.0/a.txt", b"a cat"),
        ("v1.0/a.left.png", encoded(1)),
        ("v1.0/a.right.png", encoded(2)),
        ("v1.0/b.PNG", encoded(3)),
        ("v2.0/a.png", encoded(4)),
        ("v2.0/c.json", b"{}"),
        ("v2.0/d.png", encoded(5)),
    ]
    made = tar(tmp_path / "a.tar", files)
    assert main(["embed", str(made), "--keep", "txt", "-o", f"{tmp_path}/out/"]) == 1
    found = rows(tmp_path / "out")
    assert [row["key"] for row in found] == ["v1.0/a", "v1.0/b", "v2.0/a", "v2.0/c", "v2.0/d"]
    assert [row["txt"] for row in found] == ["a cat", None, None, None, None]
    assert [bool(row["error"]) for row in found] == [False, False, False, True, False]
    assert "has no image, but json" in found[3]["error"]
    assert "a.tar: v2.0/c: has no image, but json" in capsys.readouterr().err


def test_bad_images_are_rows_with_their_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], client: Client
) -> None:
    files = sample(0) + sample(1, b"no image") + sample(2, b"") + sample(3)
    made = tar(tmp_path / "a.tar", files)
    assert main(["embed", str(made), "-o", f"{tmp_path}/out/"]) == 1
    found = rows(tmp_path / "out")
    assert [bool(row["error"]) for row in found] == [False, True, True, False]
    assert np.isnan(found[1]["embedding"]).all()
    np.testing.assert_allclose(found[3]["embedding"], client.embed(encoded(3)), atol=1e-5)
    said = capsys.readouterr()
    assert "a.tar: 000001: 8 bytes that are not an image" in said.err
    assert "4 rows in" in said.err
    assert "2 without an embedding" in said.err
    assert "1 × N bytes that are not an image" in said.err
    # Said again when there is nothing left to do.
    assert main(["embed", str(made), "-o", f"{tmp_path}/out/"]) == 1
    assert "2 of 4 before" in capsys.readouterr().err


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("where", ["image", "json", "header", "between", "beginning"])
def test_a_shard_that_is_cut_short(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str, *, packed: bool
) -> None:
    """What is whole is embedded; what is not is named."""
    made = shard(tmp_path / "whole.tar", range(6))
    with tarfile.open(made) as archive:
        members = archive.getmembers()
    image, text = members[9], members[10]  # of the fourth sample
    end = {
        "image": image.offset_data + 100,
        "json": text.offset_data + 3,
        "header": image.offset + 200,
        "between": text.offset + 10,
        "beginning": 100,
    }[where]
    cut = tmp_path / ("cut.tar.gz" if packed else "cut.tar")
    data = made.read_bytes()[:end]
    cut.write_bytes(gzip.compress(data) if packed else data)
    assert main(["embed", str(cut), "-o", f"{tmp_path}/out/"]) == 1
    found = rows(tmp_path / "out")
    whole = 0 if where == "beginning" else 3
    assert [row["key"] for row in found if not row["error"]][:whole] == [
        f"{number:06}" for number in range(whole)
    ]
    said = capsys.readouterr().err
    assert "cut short or damaged" in said
    if where == "image":
        assert found[3]["key"] == "000003"
        assert found[3]["error"] == "the shard is cut short or damaged in 000003.png"
    elif where == "beginning":
        assert "at its beginning, or is no tar archive" in said
    else:  # JSON is not kept, and so not missed
        last = "000002" if where == "header" else "000003"
        assert found[-1]["key"] == last
        assert f"{cut}: is cut short or damaged after {last}" in said
    # It is read again, as it may have been mended: the same end, and then a good one.
    before = content(tmp_path / "out")
    assert main(["embed", str(cut), "-o", f"{tmp_path}/out/"]) == 1
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize("hole", ["header", "end", "joined"])
def test_zeros_in_a_shard_are_not_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], hole: str
) -> None:
    """As a download leaves them that was broken off."""
    made = shard(tmp_path / "a.tar", range(6))
    with tarfile.open(made) as archive:
        at = archive.getmembers()[9].offset
    data = bytearray(made.read_bytes())
    if hole == "joined":
        data += bytes(data)
    else:
        data[at : at + (512 if hole == "header" else 1024)] = bytes(
            512 if hole == "header" else 1024
        )
    made.write_bytes(data)
    assert main(["embed", str(made), "-o", f"{tmp_path}/out/"]) == 1
    assert "is cut short or damaged after 00000" in capsys.readouterr().err
    good = [row["key"] for row in rows(tmp_path / "out") if not row["error"]]
    assert good[:3] == ["000000", "000001", "000002"]


@pytest.mark.parametrize("suffix", ["tar.gz", "tar.bz2", "tar.xz"])
def test_several_compressed_streams(tmp_path: Path, suffix: str) -> None:
    """As pigz, pbzip2 and pixz write them."""
    data = shard(tmp_path / "a.tar", range(6)).read_bytes()
    pack = {"tar.gz": gzip.compress, "tar.bz2": bz2.compress, "tar.xz": lzma.compress}[suffix]
    made = tmp_path / f"b.{suffix}"
    made.write_bytes(pack(data[:20_000]) + pack(data[20_000:]))
    assert main(["embed", str(made), "-o", f"{tmp_path}/out/"]) == 0
    assert len(rows(tmp_path / "out")) == 6


def test_checksums_of_gzip(tmp_path: Path) -> None:
    made = tmp_path / "a.tar.gz"
    packed = bytearray(gzip.compress(shard(tmp_path / "a.tar", range(6)).read_bytes()))
    packed[-6] ^= 1
    made.write_bytes(packed)
    assert main(["embed", str(made), "-o", f"{tmp_path}/out/"]) == 1
    assert len(rows(tmp_path / "out")) == 6


def test_links_and_names_that_are_there_twice(tmp_path: Path) -> None:
    made = tmp_path / "a.tar"
    with tarfile.open(made, "w") as archive:
        for name, data in (
            ("a.png", encoded(1)),
            ("b.png", None),
            ("c.png", encoded(2)),
            ("c.png", encoded(3)),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data or b"")
            if data is None:
                member.type, member.linkname = tarfile.LNKTYPE, "a.png"
            archive.addfile(member, io.BytesIO(data) if data else None)
    assert main(["embed", str(made), "-o", f"{tmp_path}/out/"]) == 1
    found = rows(tmp_path / "out")
    assert [row["key"] for row in found] == ["a", "b", "c", "c"]
    assert [row["error"] for row in found] == [None, "is a link, to a.png", None, None]


def test_one_bad_shard_costs_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(shard(tmp_path / f"{number}.tar", [number, number + 10])) for number in range(3)]
    footer = tmp_path / "footer.parquet"
    pq.write_table(table("bytes"), footer)
    data = bytearray(footer.read_bytes())
    data[-300:-8] = bytes(292)
    footer.write_bytes(data)
    (tmp_path / "text.tar").write_text("no archive " * 100)
    (tmp_path / "empty.tar").touch()
    bad = [str(footer), f"{tmp_path}/text.tar", f"{tmp_path}/empty.tar"]
    arguments = ["embed", names[0], *bad, *names[1:], "-o", f"{tmp_path}/out/"]
    for _ in range(2):  # it is said again, and the good ones are kept
        assert main(arguments) == 1
        said = capsys.readouterr().err
        for name in bad:
            assert f"{name}: " in said
        assert len(rows(tmp_path / "out")) == 6
    assert main([*arguments[:-2], "--max-failures", "2", "-o", f"{tmp_path}/other/"]) == 1
    assert "ended by --max-failures: 3 failures" in capsys.readouterr().err
    shard(tmp_path / "text.tar", [1])  # mended
    assert main(arguments) == 1
    assert len(rows(tmp_path / "out")) == 7
    # A column that is missing ends the run, but what is done by then is kept.
    pq.write_table(pa.table({"n": [1]}), tmp_path / "n.parquet")
    assert main(["embed", names[0], f"{tmp_path}/n.parquet", "-o", f"{tmp_path}/kept/"]) == 2
    assert len(rows(tmp_path / "kept")) == 2


def test_gzip_that_is_cut_short(tmp_path: Path) -> None:
    made = shard(tmp_path / "whole.tar", range(6))
    packed = gzip.compress(made.read_bytes())
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(packed[: len(packed) // 2])
    assert main(["embed", str(cut), "-o", f"{tmp_path}/out/"]) == 1
    found = rows(tmp_path / "out")
    assert [row["key"] for row in found if not row["error"]] == ["000000", "000001"] or len(
        found
    ) > 2


# -- tables ------------------------------------------------------------------------------------


def table(form: str) -> Any:
    images: list[Any] = [encoded(number) for number in range(25)]
    if form == "struct":
        images = [{"bytes": data, "path": f"{n}.png"} for n, data in enumerate(images)]
    return pa.table({"image": images, "label": list(range(25)), "text": ["a"] * 25})


@pytest.mark.parametrize("form", ["bytes", "struct"])
@pytest.mark.parametrize("suffix", ["parquet", "arrow", "feather"])
def test_tables(tmp_path: Path, client: Client, form: str, suffix: str) -> None:
    made = tmp_path / f"train.{suffix}"
    data = table(form)
    if suffix == "parquet":
        pq.write_table(data, made, row_group_size=7)
    else:
        with made.open("wb") as file:  # Hugging Face writes .arrow as a stream
            new = pa.ipc.new_stream if suffix == "arrow" else pa.ipc.new_file
            with new(file, data.schema) as writer:
                writer.write_table(data, max_chunksize=7)
    assert main(["embed", str(made), "--keep", "label", "-o", f"{tmp_path}/out/"]) == 0
    found = rows(tmp_path / "out")
    keys = [f"{number}.png" if form == "struct" else str(number) for number in range(25)]
    assert [row["key"] for row in found] == keys
    assert [row["label"] for row in found] == list(range(25))
    assert (
        pq.read_schema(tmp_path / "out" / "train-00000.parquet").field("label").type == pa.int64()
    )
    right = client.embed([encoded(number) for number in range(25)])
    np.testing.assert_allclose([row["embedding"] for row in found], right, atol=1e-5)


def test_which_column_has_the_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tmp_path / "a.parquet"
    pq.write_table(pa.table({"left": [encoded(1)], "right": [encoded(2)], "n": [1]}), made)
    assert main(["embed", str(made), "-o", f"{tmp_path}/out/"]) == 2
    assert "several (left, right) could: choose with --image-column" in capsys.readouterr().err
    out = f"{tmp_path}/out/"
    assert main(["embed", str(made), "--image-column", "wrong", "-o", out]) == 2
    assert "has no column 'wrong', but left, right, n" in capsys.readouterr().err
    assert main(["embed", str(made), "--image-column", "n", "-o", out]) == 2
    assert "column 'n' is of int64, not bytes" in capsys.readouterr().err
    assert main(["embed", str(made), "--image-column", "right", "-o", out]) == 0
    pq.write_table(pa.table({"n": [1]}), tmp_path / "b.parquet")
    assert main(["embed", str(tmp_path / "b.parquet"), "-o", out]) == 2


def test_a_field_that_no_image_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = shard(tmp_path / "a.tar", range(2))
    assert main(["embed", str(made), "--keep", "jsn,cls", "-o", f"{tmp_path}/out/"]) == 0
    assert "warning: no image has a field 'jsn'" in capsys.readouterr().err


def test_bytes_by_dictionary(tmp_path: Path) -> None:
    made = tmp_path / "a.feather"
    images = pa.array([encoded(1), encoded(2), encoded(1)]).dictionary_encode()
    with made.open("wb") as file:
        data = pa.table({"photo": images})
        with pa.ipc.new_file(file, data.schema) as writer:
            writer.write_table(data)
    assert main(["embed", str(made), "-o", f"{tmp_path}/out/"]) == 0
    assert len(rows(tmp_path / "out")) == 3


def test_rows_without_an_image(tmp_path: Path) -> None:
    made = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [encoded(1), None, b"", b"x", encoded(2)]}), made)
    assert main(["embed", str(made), "-o", f"{tmp_path}/out/"]) == 1
    assert [bool(r["error"]) for r in rows(tmp_path / "out")] == [False, True, True, True, False]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_table_that_is_cut_short(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    made = tmp_path / f"a.{suffix}"
    data = table("bytes")
    if suffix == "parquet":
        pq.write_table(data, made)
    else:
        with made.open("wb") as file, pa.ipc.new_stream(file, data.schema) as writer:
            writer.write_table(data, max_chunksize=7)
    made.write_bytes(made.read_bytes()[:-100_000])
    assert main(["embed", str(made), "-o", f"{tmp_path}/out/"]) == 1
    assert "a." in (said := capsys.readouterr().err)
    assert "cut short or damaged after row" in said or "cannot be read" in said
    if suffix == "arrow":  # Parquet has its table of contents at the end
        assert [row["key"] for row in rows(tmp_path / "out")][:7] == list(map(str, range(7)))


# -- which shards ------------------------------------------------------------------------------


def test_names_of_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(12):
        shard(tmp_path / f"{number:03}.tar", [number])
    folder, out = f"{tmp_path}", f"{tmp_path}/out/"
    assert _shards.expand([f"{folder}/{{000..011}}.tar"]) == [
        f"{folder}/{number:03}.tar" for number in range(12)
    ]
    assert _shards.expand([f"{folder}/{{000,003}}.tar", f"{folder}/00[0-4].tar"]) == [
        f"{folder}/{number:03}.tar" for number in (0, 3, 1, 2, 4)
    ]
    assert main(["embed", f"{folder}/{{020..021}}.tar", "-o", out]) == 2
    assert "020.tar: no such file or directory" in capsys.readouterr().err
    assert main(["embed", f"{folder}/x*.tar", "-o", out]) == 2
    assert "no file matches this pattern" in capsys.readouterr().err
    odd = shard(tmp_path / "a[1].tar", [1])
    shard(tmp_path / "a1.tar", [2])
    assert _shards.expand([str(odd)]) == [str(odd)]
    assert main(["embed", f"{folder}/000.tar", str(tmp_path), "-o", out]) == 2
    assert "is no shard" in capsys.readouterr().err
    (tmp_path / "sub").mkdir()
    shard(tmp_path / "sub" / "000.tar", [1])
    assert main(["embed", f"{folder}/000.tar", f"{folder}/sub/000.tar", "-o", out]) == 2
    assert "would have parts of the same name" in capsys.readouterr().err
    assert not list(Path(out).glob("*")) if Path(out).exists() else True


@pytest.mark.parametrize("verb", ["classify", "embed", "features"])
def test_shards_without_a_folder(tmp_path: Path, url: str, verb: str) -> None:
    made = shard(tmp_path / "a.tar", [1])
    ran = vit_client(url, verb, made)
    assert ran.returncode == 2
    assert f"{made} is a shard: vit-client embed {made} -o FOLDER/" in ran.stderr


def test_several_processes_share_the_shards(tmp_path: Path) -> None:
    for number in range(5):
        shard(tmp_path / f"{number}.tar", range(10 * number, 10 * number + 3))
    names = [str(tmp_path / f"{number}.tar") for number in range(5)]
    assert main(["embed", *names, "-o", f"{tmp_path}/all/"]) == 0
    for part in ("1/3", "3/3", "2/3"):
        assert main(["embed", *names, "--part", part, "-o", f"{tmp_path}/shared/"]) == 0
    shared, whole = rows(tmp_path / "shared"), rows(tmp_path / "all")
    assert [row["key"] for row in shared] == [row["key"] for row in whole]
    assert content(tmp_path / "shared").keys() == content(tmp_path / "all").keys()


@pytest.mark.parametrize("wrong", ["0/3", "4/3", "3", "a/b"])
def test_a_part_that_is_none(tmp_path: Path, url: str, wrong: str) -> None:
    ran = vit_client(url, "embed", "a.tar", "--part", wrong, "-o", f"{tmp_path}/out/")
    assert ran.returncode == 2
    assert "must be I/N" in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a.tar", "-o", "out/", "--top-k", 3], "--top-k does not go with shards"),
        (["a.tar", "-o", "out/", "--exclude", "b*"], "--exclude does not go with shards"),
        (["a.png", "-o", "out.npz", "--keep", "json"], "--keep needs shards and -o FOLDER/"),
        (["a.tar", "-o", "out.npz"], "of shards it is a folder: -o out/"),
        (["a.tar", "-o", "out/", "--keep", "json,error"], "has a column 'error' of its own"),
        (["a.tar", "-o", "out/", "--max-failures", "few"], "must be a number or a share (5%)"),
    ],
)
def test_options_that_do_not_fit(url: str, arguments: list[object], said: str) -> None:
    ran = vit_client(url, "embed", *arguments)
    assert ran.returncode == 2
    assert said in ran.stderr


# -- a run that ends early ---------------------------------------------------------------------


@pytest.mark.timeout(600)
def test_the_same_bytes_however_often_it_is_killed(tmp_path: Path) -> None:
    names = []
    for number in range(3):
        files = [file for n in range(45) for file in sample(100 * number + n)]
        files[30:33] = sample(100 * number + 10, b"no image")
        names.append(str(tar(tmp_path / f"{number}.tar", files)))
    arguments = ["embed", *names, "--keep", "cls", "-o"]
    assert main([*arguments, f"{tmp_path}/undisturbed/"]) == 1
    run = [sys.executable, "-c", SMALL, *arguments, f"{tmp_path}/out/"]
    started = time.monotonic()
    subprocess.run(run, capture_output=True, check=False)  # how long it takes
    usual = time.monotonic() - started
    for part in (tmp_path / "out").iterdir():
        part.unlink()
    chance = random.Random(0)
    kills = 0
    while True:
        with subprocess.Popen(run, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
            time.sleep(chance.uniform(0.4, 1) * usual)
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
        whole = list((tmp_path / "out").glob("*.parquet"))
        for path in whole:  # what has its name is complete
            assert pq.read_table(path).num_rows > 0
        if len(whole) == len(content(tmp_path / "undisturbed")):
            break
    assert main([*arguments, f"{tmp_path}/out/"]) == 1
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")
    print(f"killed {kills} times")


def test_files_of_killed_runs_are_removed_and_no_others(tmp_path: Path) -> None:
    made = shard(tmp_path / "a.tar", range(3))
    out = tmp_path / "out"
    out.mkdir()
    left, held = out / ".vit-client-partial-left", out / ".vit-client-partial-held"
    left.touch()
    with held.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main(["embed", str(made), "-o", f"{out}/"]) == 0
        assert {path.name for path in out.iterdir()} == {held.name, "a-00000.parquet"}
    assert main(["embed", str(made), "-o", f"{out}/"]) == 0
    assert content(out).keys() == {"a-00000.parquet"}
    assert (out / "a-00000.parquet").stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    made = shard(tmp_path / "a.tar", range(200))
    run = [sys.executable, "-c", SMALL, "embed", str(made), "-o", f"{tmp_path}/out/"]
    with subprocess.Popen(run, stderr=subprocess.PIPE, text=True) as process:
        while not list((tmp_path / "out").glob("*.parquet")):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    if process.returncode != 0:  # it may have been as fast
        assert process.returncode == 130
        assert "keeps the parts so far: the same command resumes from there" in said
        assert "Traceback" not in said
        assert not list((tmp_path / "out").glob(".vit-client*"))
    assert main(["embed", str(made), "-o", f"{tmp_path}/out/"]) == 0
    assert len(rows(tmp_path / "out")) == 200


def test_what_does_not_fit_to_the_parts_so_far(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = shard(tmp_path / "a.tar", range(3))
    arguments = ["embed", str(made), "-o", f"{tmp_path}/out/"]
    assert main(arguments) == 0
    before = content(tmp_path / "out")
    for option in (["--dtype", "float16"], ["--keep", "cls"], ["--image-column", "b"]):
        assert main([*arguments, *option]) == 2
        assert "a-00000.parquet is of another --keep" in capsys.readouterr().err
    shard(made, range(3, 6))  # of the same size
    assert main(arguments) == 2
    assert "another shard of this name" in capsys.readouterr().err
    assert content(tmp_path / "out") == before


def test_parts_of_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = shard(tmp_path / "a.tar", range(3))
    arguments = ["embed", str(made), "-o", f"{tmp_path}/out/"]
    assert main(arguments) == 0
    (part,) = (tmp_path / "out").iterdir()
    stored = pq.read_table(part)
    model = stored.schema.metadata[b"model"].replace(b'"size": 64', b'"size": 65')
    pq.write_table(
        stored.replace_schema_metadata({**stored.schema.metadata, b"model": model}), part
    )
    assert main(arguments) == 2
    assert "a-00000.parquet is of another model" in capsys.readouterr().err


def test_float16(tmp_path: Path, client: Client) -> None:
    made = shard(tmp_path / "a.tar", range(3))
    assert main(["embed", str(made), "--dtype", "float16", "-o", f"{tmp_path}/out/"]) == 0
    (part,) = (tmp_path / "out").iterdir()
    assert pq.read_schema(part).field("embedding").type == pa.list_(pa.float16(), 64)
    right = client.embed([encoded(number) for number in range(3)])
    found = [row["embedding"] for row in rows(tmp_path / "out")]
    np.testing.assert_allclose(found, right, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("limit", "done"), [("3", 4), ("2%", 100), ("50%", 160), ("99", 160)])
def test_a_run_that_goes_wrong_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], limit: str, done: int
) -> None:
    files = [
        file for n in range(160) for file in sample(n, b"no" if n % 4 == 0 else encoded(n % 9))
    ]
    made = tar(tmp_path / "a.tar", files)
    assert main(["embed", str(made), "--max-failures", limit, "-o", f"{tmp_path}/out/"]) == 1
    said = capsys.readouterr().err
    assert ("ended by --max-failures" in said) == (done < 160)
    assert f"{done if limit != '3' else 13} rows in" in said
    assert not list((tmp_path / "out").glob(".*"))


# -- afterwards --------------------------------------------------------------------------------


def test_similar_reads_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tar(tmp_path / "a.tar", sample(0) + sample(1, b"no image") + sample(2))
    assert main(["embed", str(made), "-o", f"{tmp_path}/out/"]) == 1
    query = tmp_path / "query.png"
    query.write_bytes(encoded(2))
    capsys.readouterr()
    assert main(["similar", str(query), "--to", f"{tmp_path}/out"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == " 1.0000  a.tar: 000002"
    assert second.endswith("a.tar: 000000")


@pytest.mark.parametrize("suffix", ["parquet", "tar"])
def test_memory_does_not_grow_with_the_shard(tmp_path: Path, suffix: str) -> None:
    """Nor with a row group: this one has up to 800 MB."""
    photo = os.urandom(256 << 10)  # not an image: the server says so at once
    # A page of Parquet is read as a whole.
    one_each = {"compression": "none", "use_dictionary": False, "write_batch_size": 1}
    code = SMALL.replace("sys.exit(main(sys.argv[1:]))", "main(sys.argv[1:])")
    code += "; print(open('/proc/self/status').read())"
    peaks = []
    for count in (500, 3000):
        made = tmp_path / f"{count}.{suffix}"
        if suffix == "tar":
            tar(made, [(f"{number}.png", photo) for number in range(count)])
        else:
            data = pa.table({"image": pa.array([photo] * count, pa.binary())})
            pq.write_table(data, made, row_group_size=count, **one_each)
        run = [sys.executable, "-c", code, "embed", str(made), "-o", f"{tmp_path}/out/"]
        done = subprocess.run(run, capture_output=True, text=True, check=True)
        assert f"{count} rows in" in done.stderr
        peaks.append(int(done.stdout.partition("VmHWM:")[2].split()[0]) // 1024)  # MiB
    print(peaks)
    assert peaks[1] < peaks[0] + 300

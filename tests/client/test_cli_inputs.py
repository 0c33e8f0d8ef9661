"""Inputs of the command line: folders with all kinds of contents, lists, and mistakes."""

import ast
import json
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from vit_client.cli._folders import SUFFIXES, images_below, what_was_skipped

from .conftest import encoded, open_to_all
from .test_cli import COMMAND, vit_client

PREPROCESS = Path(__file__).parents[2] / "model_repository" / "preprocess" / "1" / "decode.py"


def fill(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(number))
    return folder


def below(folder: Path, *exclude: str) -> list[str]:
    found = images_below(str(folder), exclude)
    return [str(Path(name).relative_to(folder)) for name in found.images]


def unreadable(folder: Path) -> dict[str, str]:
    found = images_below(str(folder), [])
    return {str(Path(name).relative_to(folder)): why for name, why in found.unreadable}


def test_links_are_followed(tmp_path: Path) -> None:
    fill(tmp_path / "disk", "2023/a.png", "b.png")
    photos = fill(tmp_path / "photos", "c.png")
    (photos / "2023").symlink_to(tmp_path / "disk" / "2023")
    (photos / "b.png").symlink_to("../disk/b.png")
    assert below(photos) == ["2023/a.png", "b.png", "c.png"]


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    photos = fill(tmp_path / "photos", "a.png", "sub/b.png")
    fill(tmp_path, "private.png")
    (photos / "sub" / "self").symlink_to(".")
    (photos / "sub" / "up").symlink_to("..")
    (photos / "out").symlink_to(tmp_path)  # contains this folder, like a wine drive for /
    (tmp_path / "here").symlink_to(photos)
    assert below(photos) == ["a.png", "sub/b.png"]
    assert below(tmp_path / "here") == ["a.png", "sub/b.png"]
    assert unreadable(photos) == {}


def test_a_folder_is_taken_once_and_by_its_own_name(tmp_path: Path) -> None:
    photos = fill(tmp_path / "photos", "sub/a.png")
    (photos / "best").symlink_to("sub")
    fill(tmp_path / "disk", "b.png")
    (photos / "one").symlink_to("../disk")
    (photos / "two").symlink_to("../disk")
    assert below(photos) == ["one/b.png", "sub/a.png"]


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    photos = fill(tmp_path, "good.png")
    for name in ("annex.jpg", "2023", "trip 12.08.2023", "notes.txt", ".hidden.jpg"):
        (photos / name).symlink_to("/not/there")
    (photos / "round.png").symlink_to("round.png")
    os.mkfifo(photos / "pipe.png")
    os.mkfifo(photos / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(photos / "socket.webp"))
    dead = "a broken link (no such file or directory)"
    special = "a pipe, socket or device, not a file"
    assert unreadable(photos) == {
        "2023": dead,
        "annex.jpg": dead,
        "pipe.png": special,
        "round.png": "a link (too many levels of symbolic links)",
        "socket.webp": special,
        "trip 12.08.2023": dead,
    }
    assert below(photos) == ["good.png"]


def test_unreadable_folders_are_told(tmp_path: Path) -> None:
    """Run as a user without permission, because root has it."""
    photos = fill(tmp_path, "a.png", "locked/b.png")
    (photos / "locked").chmod(0)
    open_to_all(photos)
    look = (
        "import os, sys; from vit_client.cli._folders import images_below\n"
        "if os.getuid() == 0: os.setuid(65534)\n"
        "found = images_below(sys.argv[1], []); print(found.images, found.unreadable)\n"
        "found = images_below(sys.argv[1] + '/locked', []); print(found.unreadable)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", look, photos], capture_output=True, text=True, timeout=60
    )
    (photos / "locked").chmod(0o755)
    refused = [(f"{photos}/locked", "permission denied")]
    assert ran.stdout.splitlines() == [f"['{photos}/a.png'] {refused}", f"{refused}"], ran.stderr


def test_litter_and_what_is_excluded(tmp_path: Path) -> None:
    photos = fill(
        tmp_path,
        *("a.png", "@eaDir/a.png/SYNOPHOTO_THUMB_XL.jpg", "sub/@eaDir/thumb.jpg", "._a.png"),
        *("#recycle/gone.png", "$RECYCLE.BIN/gone.png", "__MACOSX/a.png", ".thumbnails/a.png"),
        *("raw/b.png", "sub/raw/c.png", "sub/d_small.png", "sub/e.png"),
    )
    assert below(photos) == ["a.png", "raw/b.png", "sub/d_small.png", "sub/e.png", "sub/raw/c.png"]
    assert below(photos, "raw/", "*_small.*") == ["a.png", "sub/e.png"]
    assert below(photos, "sub/raw") == ["a.png", "raw/b.png", "sub/d_small.png", "sub/e.png"]
    assert below(photos, "sub/*.png", "sub/raw/*") == ["a.png", "raw/b.png"]
    assert below(photos / "@eaDir") == ["a.png/SYNOPHOTO_THUMB_XL.jpg"]  # named explicitly
    found = images_below(str(photos), [])
    assert found.litter == {"@eaDir": 2, "#recycle": 1, "$RECYCLE.BIN": 1, "__MACOSX": 1}
    assert not found.skipped


def test_what_was_skipped_is_one_line(tmp_path: Path) -> None:
    names = ["a.HEIC", "b.heic", "c.dng", "d.jxl", "plain", "e.txt", "f.txt", "g.xmp", "h.png"]
    photos = fill(tmp_path, *names, ".hidden", "@eaDir/x.jpg")
    found = images_below(str(photos), [])
    assert found.skipped == Counter({".heic": 2, ".dng": 1, ".jxl": 1, "": 1, ".txt": 2, ".xmp": 1})
    assert what_was_skipped(found) == (
        "2 .heic, 1 .dng, 1 .jxl (not supported by the server: convert them), "
        "1 without a suffix, 2 .txt, 1 .xmp, 1 @eaDir/"
    )
    fill(tmp_path, *(f"many.{letter}" for letter in "abcdefgh"))
    assert "4 of other kinds" in what_was_skipped(images_below(str(photos), []))


def test_a_folders_images_are_those_that_the_server_reads() -> None:
    tree = ast.parse(PREPROCESS.read_text())
    (formats,) = (
        ast.literal_eval(line.value)
        for line in tree.body
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "FORMATS"
    )
    Image.init()
    assert {Image.EXTENSION[suffix] for suffix in SUFFIXES} == set(formats)


def test_a_folder_with_all_of_it(url: str, tmp_path: Path) -> None:
    photos = fill(tmp_path / "photos", "a.png", "b.heic", "@eaDir/thumb.jpg", "old/c.png")
    (photos / "annex.jpg").symlink_to("/not/there")
    ran = vit_client(url, "embed", photos, "--json", "--exclude", "old")
    assert [json.loads(line)["image"] for line in ran.stdout.splitlines()] == [f"{photos}/a.png"]
    assert ran.stderr.splitlines() == [
        f"vit-client: skipped in {photos}: 1 .heic (not supported by the server: convert them), "
        "1 @eaDir/",
        f"vit-client: {photos}/annex.jpg: a broken link (no such file or directory)",
    ]
    assert ran.returncode == 1
    (photos / "a.png").unlink()
    ran = vit_client("localhost:1", "embed", photos, "--exclude", "old")
    assert "annex.jpg: a broken link" in ran.stderr
    assert ran.returncode == 1
    (photos / "annex.jpg").unlink()
    ran = vit_client("localhost:1", "embed", photos, "--exclude", "old")
    assert ran.stderr.endswith("photos: no images in this folder\n")
    assert ran.returncode == 2


URL = "https://example.com/cat.jpg?size=[3]"
DATA = "data:image/png;base64," + "iVBORw0KGgo" * 2500


@pytest.mark.parametrize(
    ("mistake", "words", "code"),
    [
        (URL, f"{URL}: URLs are not fetched: download it first", 1),
        ("S3://bucket/cat.jpg", "URLs are not fetched", 1),
        ("file:///tmp/cat.jpg", "URLs are not read: pass only the path", 1),
        (DATA, "data: URIs are not read: decode it, and pass the bytes", 1),
        ("x" * 28000, "xxx: file name too long", 1),
        ("x" * 28000 + "*", "no file matches this pattern", 2),
        ("/nowhere/*.png", "/nowhere/*.png: no file matches this pattern", 2),
        ("empty", "empty: no images in this folder", 2),
    ],
    ids=lambda value: str(value)[:12],
)
def test_one_mistake_among_good_files(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str, words: str, code: int
) -> None:
    fill(tmp_path, "a.png", "b.png")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    ran = vit_client(url, "embed", "a.png", mistake, "b.png", "--json")
    assert [json.loads(line)["image"] for line in ran.stdout.splitlines()] == ["a.png", "b.png"]
    assert words in ran.stderr
    assert len(ran.stderr) < 400
    assert ran.stderr.count("\n") == 1
    assert ran.returncode == 1
    ran = vit_client(url, "embed", mistake)  # the only argument
    assert words in ran.stderr
    assert len(ran.stderr) < 400
    assert ran.returncode == code


@pytest.mark.parametrize(
    "arguments",
    [
        ["similar", "x.png", "--to", "x" * 28000 + ".npz"],
        ["embed", "x.png", "-o", "x" * 28000 + ".npz"],
        ["embed", "x.png", "-o", "x" * 28000],
        ["embed", "--files-from", "x" * 28000],
        ["features", "x.png", "-o", "x" * 28000 + "/x.npz"],
        ["features", "x.png", "--picture", "x" * 28000],
        ["x" * 28000],
        ["embed", "x.png", "--" + "x" * 28000],
    ],
    ids=lambda value: " ".join(word[:8] for word in value),
)
def test_messages_are_short(arguments: list[str]) -> None:
    ran = vit_client("localhost:1", *arguments)
    assert len(ran.stderr) < 1000
    assert "…" in ran.stderr
    assert ran.returncode == 2


def test_names_of_control_characters_stay_on_their_line(url: str, tmp_path: Path) -> None:
    ran = vit_client(url, "embed", tmp_path / "a\n\x1bc.png")
    assert ran.stderr == f"vit-client: {tmp_path}/a\\n\\x1bc.png: no such file or directory\n"
    assert ran.returncode == 1


def test_patterns_as_a_shell_has_them(url: str, tmp_path: Path) -> None:
    photos = fill(tmp_path, "a.png", "sub/b.png")
    (photos / "sub" / "self").symlink_to(".")  # Python's ** follows it forty times
    (photos / "dead.png").symlink_to("/not/there")
    ran = vit_client(url, "embed", photos / "**" / "*.png", "--json")
    names = [json.loads(line)["image"] for line in ran.stdout.splitlines()]
    assert names == [f"{photos}/a.png", f"{photos}/sub/b.png"]
    assert ran.stderr == f"vit-client: {photos}/dead.png: no such file or directory\n"
    assert ran.returncode == 1


def names_of(ran: "subprocess.CompletedProcess[str]") -> list[str]:
    return [json.loads(line)["image"] for line in ran.stdout.splitlines()]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ([], b"\xef\xbb\xbfb.png\r\n\r\n  \n[1]*.png\n-o.png\n-\nb.png"),
        (["-0"], b"b.png\0[1]*.png\0-o.png\0-\0"),
        (["--null"], b"b.png\0\0[1]*.png\0-o.png\0-"),
    ],
)
def test_a_list_of_names(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], text: bytes
) -> None:
    """Each is the literal name of a file."""
    fill(tmp_path, "a.png", "b.png", "[1]*.png", "-o.png", "-", "1.png")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_bytes(text)
    expected = ["b.png", "[1]*.png", "-o.png", "./-"]
    ran = vit_client(url, "embed", "--json", "--files-from", "list.txt", *options)
    assert names_of(ran) == expected
    assert ran.returncode == 0
    ran = vit_client(url, "embed", "--json", "a.png", "--files-from", "-", *options, stdin=text)
    assert names_of(ran) == ["a.png", *expected]
    assert ran.returncode == 0


def test_what_is_wrong_with_a_list(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, "a.png", "sub/b.png")
    monkeypatch.chdir(tmp_path)

    def listed(text: bytes, *options: str) -> "subprocess.CompletedProcess[str]":
        return vit_client(url, "embed", "--json", "--files-from", "-", *options, stdin=text)

    ran = listed(b"a.png\nsub\nhttps://example.com/b.png\nno.png\n")
    assert names_of(ran) == ["a.png"]
    assert "sub: is a directory" in ran.stderr
    assert "b.png: URLs are not fetched" in ran.stderr
    assert "no.png: no such file" in ran.stderr
    assert ran.returncode == 1
    for text, options, words in (
        (b"\n", [], "standard input: it contains no names"),
        (b"a.png\0b.png\0", [], "add -0 if they end the names"),
        (b"a.png\nb.png\n", ["-0"], "standard input: it has one name per line: leave out -0"),
        (b"a.png", ["-"], "either an image or a list of names"),
    ):
        ran = listed(text, *options)
        assert words in ran.stderr
        assert ran.returncode == 2
    for arguments, words in (
        (["embed", "--files-from", "no.txt"], "no.txt: no such file or directory"),
        (["embed", "--files-from", "sub"], "sub: is a directory"),
        (["embed", "a.png", "-0"], "-0 needs --files-from"),
        (["embed", "a.png", "--overwrite"], "--overwrite needs -o"),
        (
            ["embed", "--files-from", "/dev/zero"],
            "/dev/zero: more than 256 MiB: is it a list of names?",
        ),
        (["embed", ""], "'': an empty name: is a variable of your shell unset?"),
        (["embed"], "required: IMAGE (or --files-from FILE)"),
    ):
        ran = vit_client(url, *arguments)
        assert words in ran.stderr
        assert ran.returncode == 2


def test_a_file_that_reads_as_an_option(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, "-o.jpg", "a.jpg")
    monkeypatch.chdir(tmp_path)

    def shell(line: str) -> "subprocess.CompletedProcess[str]":
        ran = subprocess.run(
            f"{COMMAND} {line}",
            shell=True,
            env={**os.environ, "VIT_URL": url},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert "Traceback" not in ran.stderr
        return ran

    for line in ("embed *.jpg", "embed a.jpg -o.jpg", "similar -o.jpg --to x.npz"):
        ran = shell(line)
        assert "-o.jpg looks like an option, but is also a file here" in ran.stderr
        assert "./-o.jpg" in ran.stderr
        assert ran.stdout == ""
        assert ran.returncode == 2
    for line in ("embed --json ./*.jpg", "embed --json -- *.jpg", "embed --json a.jpg -- -o.jpg"):
        ran = shell(line)
        assert {Path(name).name for name in names_of(ran)} == {"-o.jpg", "a.jpg"}
        assert ran.returncode == 0

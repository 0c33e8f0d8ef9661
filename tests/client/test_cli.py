"""The command, run as by a user."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from vit_client.cli import _told

from .conftest import encoded

COMMAND = str(Path(sys.executable).parent / "vit-client")


def vit_client(
    url: str, *arguments: object, stdin: bytes = b""
) -> "subprocess.CompletedProcess[str]":
    ran = subprocess.run(
        [COMMAND, *map(str, arguments)],
        env={**os.environ, "VIT_URL": url},
        input=stdin,
        capture_output=True,
        timeout=60,
    )
    assert b"Traceback" not in ran.stderr, ran.stderr.decode()
    return subprocess.CompletedProcess(
        ran.args, ran.returncode, ran.stdout.decode(), ran.stderr.decode()
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images, one in a subfolder and one in a hidden folder, and a text file."""
    for number, name in enumerate(["a.png", "b.JPG", "sub/c.webp", ".hidden/d.png"]):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(number))
    (tmp_path / "notes.txt").write_text("not an image")
    return tmp_path


def test_classify_in_text(url: str, folder: Path) -> None:
    ran = vit_client(url, "classify", folder / "a.png", "-k", 2)
    name, first, second = ran.stdout.splitlines()
    assert name == str(folder / "a.png")
    assert "%" in first
    assert "%" in second
    assert ran.returncode == 0


@pytest.mark.parametrize(
    ("task", "key", "length"),
    [("classify", "predictions", 5), ("probabilities", "probabilities", 12),
     ("embed", "embedding", 64), ("features", "neck", 64)],
)  # fmt: skip
def test_json_has_a_line_for_each_image(
    url: str, folder: Path, task: str, key: str, length: int
) -> None:
    ran = vit_client(url, task, folder, "--json")
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [Path(row["image"]).name for row in rows] == ["a.png", "b.JPG", "c.webp"]
    assert all(len(row[key]) == length for row in rows)


@pytest.mark.parametrize(
    ("task", "columns", "rows"), [("classify", 5, 15), ("probabilities", 13, 3), ("embed", 65, 3)]
)
def test_csv_has_a_header(url: str, folder: Path, task: str, columns: int, rows: int) -> None:
    lines = vit_client(url, task, folder, "--csv").stdout.splitlines()
    assert len(lines) == rows + 1
    assert lines[0].startswith("image,")
    assert lines[0].count(",") == columns - 1


@pytest.mark.parametrize("task", ["classify", "probabilities", "embed", "features", "analyze"])
def test_text_names_the_image(url: str, folder: Path, task: str) -> None:
    ran = vit_client(url, task, folder / "a.png")
    assert ran.stdout.startswith(str(folder / "a.png"))
    assert ran.returncode == 0


def test_analyze_prints_what_classify_and_embed_print(url: str, folder: Path) -> None:
    photo = folder / "a.png"

    def printed(task: str, *options: object) -> str:
        ran = vit_client(url, task, photo, *options)
        assert ran.returncode == 0
        return ran.stdout

    classes, vector = printed("classify", "-k", 2), printed("embed")
    assert printed("analyze", "-k", 2) == classes + vector.removeprefix(str(photo))
    both = json.loads(printed("analyze", "-k", 2, "--json"))
    assert both == {
        **json.loads(printed("classify", "-k", 2, "--json")),
        **json.loads(printed("embed", "--json")),
    }
    assert list(both) == ["image", "predictions", "embedding", "model_version"]
    assert printed("analyze").count("%") == 5


def test_analyze_goes_on_after_a_file_that_fails(url: str, folder: Path) -> None:
    ran = vit_client(url, "analyze", folder / "notes.txt", folder, "--json")
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [Path(row["image"]).name for row in rows] == ["a.png", "b.JPG", "c.webp"]
    assert all((len(row["predictions"]), len(row["embedding"])) == (5, 64) for row in rows)
    assert "notes.txt: " in ran.stderr
    assert ran.returncode == 1


def test_standard_input(url: str) -> None:
    ran = vit_client(url, "embed", "-", "--json", stdin=encoded(0))
    assert json.loads(ran.stdout)["image"] == "-"


def test_patterns(url: str, folder: Path) -> None:
    ran = vit_client(url, "embed", folder / "**" / "*.webp", "--json")
    assert json.loads(ran.stdout)["image"].endswith("c.webp")
    ran = vit_client(url, "embed", folder / "*.nothing")
    assert "no file matches" in ran.stderr
    assert ran.returncode == 2


def test_a_file_that_fails_is_reported_and_the_rest_go_on(url: str, folder: Path) -> None:
    ran = vit_client(url, "embed", folder / "missing.png", folder / "notes.txt", folder, "--json")
    assert len(ran.stdout.splitlines()) == 3
    assert "missing.png: no such file" in ran.stderr
    assert "notes.txt: " in ran.stderr
    assert ran.returncode == 1


def test_an_untrained_model_is_warned_of(url: str, folder: Path) -> None:
    """The tiny model has given weights, so the server reports it as trained."""
    assert "untrained" not in vit_client(url, "classify", folder / "a.png").stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["embed", "x.png", "--url", "localhost:1"], 3, "no server at localhost:1"),
        (["embed", "x.png", "--url", "http://localhost:1"], 2, "HTTP address"),
        (["embed", "x.png", "--timeout", "0"], 2, "timeout must be"),
        (["classify", "x.png", "-k", "13"], 2, "from 1 to 12"),
        (["analyze", "x.png", "-k", "13"], 2, "from 1 to 12"),
        (["analyze", "x.png", "-k", "0"], 2, "must be a whole number of 1 or more"),
        (["analyze", "x.png", "--csv"], 2, "unrecognized arguments: --csv"),
        (["embed", "x.png", "-k", "3"], 2, "--top-k needs -o"),
        (
            ["embed", "x.png", "-k", "3", "--json"],
            2,
            "to print classes and embeddings, use vit-client analyze",
        ),
        (["embed", "x.png", "-k", "0", "-o", "x.npz"], 2, "must be a whole number of 1 or more"),
        (
            ["similar", "x.png", "--to", "x.npz", "-n", "-3"],
            2,
            "must be a whole number of 1 or more",
        ),
        (["analyze", "x.png", "-k", "x"], 2, "must be a whole number of 1 or more, not 'x'"),
        (["embed"], 2, "required: IMAGE"),
        (["nonsense"], 2, "invalid choice"),
    ],
)
def test_mistakes_are_one_clear_line(url: str, arguments: list[str], code: int, words: str) -> None:
    ran = vit_client(url, *arguments)
    assert ran.returncode == code
    assert words in ran.stderr
    assert ran.stdout == ""


def in_shell(url: str, line: str) -> "subprocess.CompletedProcess[str]":
    # Without buffering there would be nothing left to write at exit.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    ran = subprocess.run(
        f"{COMMAND} {line}",
        shell=True,
        env={**env, "VIT_URL": url},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in ran.stderr, ran.stderr
    return ran


@pytest.mark.parametrize("form", ["", "--json", "--csv"])
def test_a_full_disk_under_standard_output(url: str, folder: Path, form: str) -> None:
    ran = in_shell(url, f"classify {folder} {form} > /dev/full")
    skipped, said = ran.stderr.splitlines()
    assert skipped == f"vit-client: skipped in {folder}: 1 .txt"
    assert said == "vit-client: standard output cannot be written (no space left on device)"
    assert ran.returncode == 5


def test_help_on_a_full_disk(url: str) -> None:
    ran = in_shell(url, "--help > /dev/full")
    assert ran.stderr == "vit-client: standard output cannot be written (no space left on device)\n"
    assert ran.returncode == 5


def test_messages_that_nobody_can_have(url: str, folder: Path) -> None:
    ran = in_shell(url, f"classify {folder}/no.png {folder}/a.png --json 2> /dev/full")
    assert json.loads(ran.stdout)["image"] == str(folder / "a.png")
    assert ran.returncode == 1


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (OSError("cannot identify image file"), "cannot identify image file"),
        (OSError(24, "Too many open files"), "too many open files"),
        (BrokenPipeError(32, "Broken pipe"), "broken pipe"),
        (OSError(5, "Input/output error", "x" * 1000), f"{'x' * 100}…{'x' * 100}: input/output"),
    ],
    ids=["Pillow's", "no name", "a pipe", "long name"],
)
def test_only_errors_of_standard_output_are_called_so(
    failure: OSError, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise failure

    assert _told(fail) == 2
    assert capsys.readouterr().err.startswith(f"vit-client: {said}")


@pytest.mark.parametrize("streams", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_like_dev_null(url: str, folder: Path, streams: str) -> None:
    assert in_shell(url, f"classify {folder} --csv {streams}").returncode == 0
    assert in_shell(url, f"classify {folder}/no.png {streams}").returncode == 1
    assert in_shell(url, f"classify - </dev/null {streams}").returncode == 1


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_every_name_can_be_printed(
    url: str, folder: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", f"{encoding}:strict")
    names = [os.fsdecode(b"bad\xff.png"), "größe.png"]
    for name in names:
        (folder / name).write_bytes(encoded(0))
    expected = [str(folder / "bad\\udcff.png"), str(folder / "größe.png")]
    files = [folder / name for name in names]
    rows = vit_client(url, "classify", *files, "--json").stdout.splitlines()
    assert [json.loads(row)["image"] for row in rows] == expected
    for form in ([], ["--csv"]):
        ran = vit_client(url, "embed", *files, *form)
        assert expected[0] in ran.stdout
        assert ran.returncode == 0
    ran = vit_client(url, "embed", folder / os.fsdecode(b"missing\xff.png"))
    assert "missing\\udcff.png: no such file" in ran.stderr
    assert ran.returncode == 1


def test_help_teaches() -> None:
    ran = vit_client("", "--help")
    verbs = ("classify", "probabilities", "embed", "features", "analyze", "similar", "health")
    for word in (*verbs, "VIT_URL", "exit codes"):
        assert word in ran.stdout

"""Files written by the command: atomic, and resumed after an interruption."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from vit_client import Analysis, Client, Prediction
from vit_client.cli import _tables
from vit_client.cli._embed import describe
from vit_client.cli._features import principal_colours

from .conftest import encoded, open_to_all
from .test_cli import COMMAND, vit_client

DUPLICATES = Path(__file__).parents[2] / "client" / "examples" / "duplicates.py"
FORMATS = ["npz", "safetensors", "parquet"]


def need(form: str) -> None:
    if form == "parquet":
        pytest.importorskip("pyarrow", exc_type=ImportError)


def classes_in(output: Path) -> list[list[Prediction]]:
    """The classes of each row, read with the library that defines the format."""
    if output.suffix == ".npz":
        with np.load(output) as arrays:
            columns = [arrays[name].tolist() for name in ("labels", "indices", "scores")]
        return [list(map(Prediction, *row)) for row in zip(*columns, strict=True)]
    parquet = pytest.importorskip("pyarrow.parquet", exc_type=ImportError)
    rows = parquet.read_table(output)["predictions"].to_pylist()
    return [[Prediction(**guess) for guess in row] for row in rows]


def assert_same_classes(got: list[list[Prediction]], expected: list[list[Prediction]]) -> None:
    """Equal except for rounding, which depends on the batch."""
    for one, other in zip(got, expected, strict=True):
        named = [(guess.label, guess.index) for guess in other]
        assert [(guess.label, guess.index) for guess in one] == named
        scores = [guess.score for guess in other]
        np.testing.assert_allclose([guess.score for guess in one], scores, atol=1e-6, rtol=0)


@pytest.mark.parametrize("form", FORMATS)
def test_embeddings_are_found_again(
    url: str, client: Client, photos: Path, tmp_path: Path, form: str
) -> None:
    need(form)
    (photos / "broken.jpg").write_bytes(b"broken")
    output = tmp_path / f"out.{form}"
    ran = vit_client(url, "embed", photos, "-o", output)
    assert ran.stdout == f"{output}: 20 × 64 float32\n"
    assert "broken.jpg: " in ran.stderr
    assert ran.returncode == 1
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [output.name]

    ran = vit_client(url, "similar", photos / "07.png", "--to", output, "-n", "3", "--json")
    matches = [json.loads(line) for line in ran.stdout.splitlines()]
    assert matches[0] == {"image": str(photos / "07.png"), "cosine": pytest.approx(1, abs=1e-5)}
    embeddings = client.embed(sorted(photos.glob("*.png")))
    cosines = embeddings @ embeddings[7]
    cosines /= np.linalg.norm(embeddings, axis=1) * np.linalg.norm(embeddings[7])
    expected = [str(photos / f"{row:02}.png") for row in np.argsort(-cosines)[:3]]
    assert [match["image"] for match in matches] == expected


def test_the_files_are_what_others_read(
    url: str, client: Client, photos: Path, tmp_path: Path
) -> None:
    """Reads each format with the library that defines it."""
    paths = sorted(photos.iterdir())
    expected = client.embed(paths)
    names = [str(path) for path in paths]
    for form in FORMATS:
        need(form)
        vit_client(url, "embed", photos, "-o", tmp_path / f"out.{form}")
    with np.load(tmp_path / "out.npz") as arrays:
        np.testing.assert_allclose(arrays["embeddings"], expected, atol=1e-5)
        assert arrays["images"].tolist() == names
    with safetensors.safe_open(tmp_path / "out.safetensors", "numpy") as file:
        np.testing.assert_allclose(file.get_tensor("embeddings"), expected, atol=1e-5)
        assert json.loads(file.metadata()["images"]) == names
    parquet = pytest.importorskip("pyarrow.parquet", exc_type=ImportError)
    table = parquet.read_table(tmp_path / "out.parquet")
    assert table["image"].to_pylist() == names
    np.testing.assert_allclose(np.stack(table["embedding"].to_numpy()), expected, atol=1e-5)


@pytest.mark.parametrize("form", FORMATS)
def test_a_name_need_not_be_text(url: str, photos: Path, tmp_path: Path, form: str) -> None:
    need(form)
    photo = photos / os.fsdecode(b"07\xff.png")
    (photos / "07.png").rename(photo)
    output = tmp_path / f"out.{form}"
    ran = vit_client(url, "embed", photos, "-o", output)
    assert ran.stdout == f"{output}: 20 × 64 float32\n"
    ran = vit_client(url, "similar", photo, "--to", output, "-n", "1", "--json")
    assert json.loads(ran.stdout)["image"] == str(photos / "07\\udcff.png")
    if form == "safetensors":
        with safetensors.safe_open(output, "numpy") as file:
            assert str(photos / "07\\udcff.png") in json.loads(file.metadata()["images"])
        ran = vit_client(url, "features", photo, "-o", output)
        assert ran.returncode == 0
        with safetensors.safe_open(output, "numpy") as file:
            assert file.metadata()["image"] == str(photos / "07\\udcff.png")


def test_a_name_that_is_not_text_is_resumed(tmp_path: Path) -> None:
    from vit_client.cli._journal import Journal

    photo = tmp_path / os.fsdecode(b"\xff.png")
    photo.write_bytes(encoded(0))
    journal = Journal(tmp_path / "out.npz", "model", 0)
    journal.add(str(photo), Analysis([], np.ones(64, np.float32)))
    journal.close()
    journal = Journal(tmp_path / "out.npz", "model", 0)
    assert journal.done([str(photo), "other.png"]) == {str(photo)}
    assert next(journal.blocks([str(photo)], 1)).embeddings.sum() == 64
    journal.close()


# Limits the size of files, like a full disk.
SMALL_DISK = """
import resource, sys
from vit_client.cli import _journal, main
_journal._COMMIT_SECONDS = 0
size = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
sys.exit(main(sys.argv[2:]))
"""


def on_small_disk(url: str, size: int, *arguments: str) -> "subprocess.CompletedProcess[str]":
    ran = subprocess.run(
        [sys.executable, "-c", SMALL_DISK, str(size), *arguments],
        env={**os.environ, "VIT_URL": url},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in ran.stderr, ran.stderr
    return ran


@pytest.mark.parametrize("size", [0, 16384], ids=["at once", "on the way"])
def test_a_full_disk(url: str, photos: Path, tmp_path: Path, size: int) -> None:
    output = tmp_path / "out.npz"
    arguments = ["embed", str(photos), "-o", str(output)]
    ran = on_small_disk(url, size, *arguments)
    assert f"{output}.partial cannot be written (" in ran.stderr
    assert ran.returncode == 5
    assert not output.exists()
    ran = vit_client(url, *arguments)
    assert ("resuming" in ran.stderr) == (size > 0)
    assert ran.returncode == 0


@pytest.mark.parametrize("name", ["neck.npz", "neck.safetensors", "map.png"])
def test_a_full_disk_under_features(url: str, photos: Path, tmp_path: Path, name: str) -> None:
    option = "--picture" if name == "map.png" else "-o"
    ran = on_small_disk(url, 0, "features", str(photos / "00.png"), option, str(tmp_path / name))
    assert ran.stderr == f"vit-client: {tmp_path / name} cannot be written (file too large)\n"
    assert ran.returncode == 5
    assert list(tmp_path.iterdir()) == [photos]


@pytest.mark.parametrize("form", FORMATS)
def test_an_output_that_cannot_be_replaced(tmp_path: Path, form: str) -> None:
    from vit_client.cli._common import CannotWrite

    need(form)
    (tmp_path / "out").mkdir()
    output = (tmp_path / "out").rename(tmp_path / f"out.{form}")  # a folder is in the way
    block = _tables.Block(np.zeros((1, 4), np.float32), [[]])
    table = _tables.Table(["x"], 4, 0, lambda: [block], "model")
    with pytest.raises(CannotWrite, match=rf"out\.{form} cannot be written \(is a directory\)"):
        _tables.write(output, table)
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("arguments", [["embed", "-o"], ["features", "-o"]])
def test_a_folder_that_cannot_be_written_to(url: str, photos: Path, arguments: list[str]) -> None:
    verb, option = arguments
    ran = vit_client(url, verb, photos / "00.png", option, "/proc/x.npz")
    assert "vit-client: /proc/x.npz" in ran.stderr
    assert "cannot be written (" in ran.stderr
    assert "tmp" not in ran.stderr.replace(str(photos), "")
    assert "another run" not in ran.stderr
    assert ran.returncode == 5


@pytest.mark.parametrize(
    "arguments",
    [["embed", "-o", "x.npz"], ["features", "-o", "x.npz"], ["features", "--picture", "x.png"]],
)
def test_a_folder_of_somebody_else(photos: Path, tmp_path: Path, arguments: list[str]) -> None:
    """Is reported before any work. Run as a user other than root, who can write anywhere."""
    verb, option, name = arguments
    open_to_all(photos)
    as_nobody = (
        "import os, sys; from vit_client.cli import main\n"
        "os.chdir('/'); os.setuid(65534) if os.getuid() == 0 else os.chmod(sys.argv[1], 0o555)\n"
        "sys.exit(main(sys.argv[2:]))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", as_nobody, tmp_path, verb, photos / "00.png", option,
         tmp_path / name, "--url", "localhost:1"],
        capture_output=True,
        text=True,
        timeout=60,
    )  # fmt: skip
    assert ran.stderr == f"vit-client: {tmp_path / name} cannot be written (permission denied)\n"
    assert ran.returncode == 5


# Commits every result at once.
COMMITS_AT_ONCE = """
import sys
from vit_client.cli import _journal, main
_journal._COMMIT_SECONDS = 0
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("form", "top_k"), [("npz", []), ("npz", ["--top-k", "3"]), ("parquet", ["--top-k", "3"])]
)
def test_an_interrupted_run_is_resumed(
    url: str, photos: Path, tmp_path: Path, form: str, top_k: list[str]
) -> None:
    """Ctrl-C while it waits for an image that never arrives, then the same command again."""
    need(form)
    output = tmp_path / f"out.{form}"
    output.write_text("what was there before")
    pipe = photos / "99.png"
    os.mkfifo(pipe)
    arguments = ["embed", str(photos), str(pipe), "-o", str(output), "--overwrite", *top_k]
    partial = output.with_name(f"{output.name}.partial")
    with subprocess.Popen(
        [sys.executable, "-c", COMMITS_AT_ONCE, *arguments],
        env={**os.environ, "VIT_URL": url},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        writer = os.open(pipe, os.O_WRONLY)  # blocks until there is a reader
        try:
            # The server accepts 16 per request: the pipe is in the second one.
            wait_until_done(partial, [photos / f"{seed:02}.png" for seed in range(16)])
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        finally:
            os.close(writer)
            process.kill()
    assert process.returncode == 130
    assert "the same command resumes from there" in said
    assert "Traceback" not in said
    assert output.read_text() == "what was there before"

    pipe.unlink()
    pipe.write_bytes(encoded(99))
    (photos / "00.png").write_bytes(encoded(100))  # changed since: must be processed again
    ran = vit_client(url, *arguments)
    assert "resuming: 15 of 21 images are already done" in ran.stderr
    assert ran.returncode == 0
    assert not partial.exists()
    images, embeddings, _ = _tables.read(output)
    paths = sorted(photos.iterdir())
    assert images == [str(path) for path in paths]
    with Client(url) as client:
        np.testing.assert_allclose(embeddings, client.embed(paths), atol=1e-5)
        if top_k:
            assert_same_classes(classes_in(output), client.classify(paths, top_k=3))


def wait_until_done(partial: Path, photos: list[Path]) -> None:
    """Wait until the journal has all of them."""
    for _ in range(1200):
        held = partial.read_bytes() if partial.exists() else b""
        if all(os.fsencode(photo) in held for photo in photos):
            return
        time.sleep(0.05)
    pytest.fail("nothing more is answered")


@pytest.mark.parametrize("form", FORMATS)
def test_other_images_are_not_replaced(url: str, photos: Path, tmp_path: Path, form: str) -> None:
    need(form)
    output = tmp_path / f"out.{form}"
    some = sorted(photos.iterdir())
    assert vit_client(url, "embed", *some[:3], "-o", output).returncode == 0
    before = output.read_bytes()
    ran = vit_client("localhost:1", "embed", *some[1:4], "-o", output)  # before any request
    lost = f"1 images that this run of 3 does not include, for example {some[0]}"
    assert f"{output} has {lost}" in ran.stderr
    assert "--overwrite" in ran.stderr
    assert "--files-from -" in ran.stderr
    assert ran.returncode == 2
    assert output.read_bytes() == before

    for arguments in ([*some[:3]], [*some[:5]], [some[7], "--overwrite"]):
        ran = vit_client(url, "embed", *arguments, "-o", output)  # the same, more, or others
        assert ran.returncode == 0
    ran = vit_client(url, "embed", "-", "-o", output, "--overwrite", stdin=encoded(0))
    assert ran.returncode == 0
    ran = vit_client(url, "embed", "-", "-o", output, stdin=encoded(1))  # not the same image
    assert "for example -; --overwrite" in ran.stderr
    assert ran.returncode == 2

    output.write_bytes(b"")  # as mktemp leaves it
    assert vit_client(url, "embed", *some[:3], "-o", output).returncode == 0
    output.write_bytes(encoded(0))
    ran = vit_client("localhost:1", "embed", *some[:3], "-o", output)
    assert "is not a file of embeddings" in ran.stderr
    assert "--overwrite replaces it" in ran.stderr
    assert ran.returncode == 2
    assert output.read_bytes() == encoded(0)


def test_images_that_fail_now_are_not_lost(url: str, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.npz"
    some = sorted(photos.iterdir())[:3]
    vit_client(url, "embed", *some, "-o", output)
    some[1].unlink()
    ran = vit_client(url, "embed", *some, "-o", output)
    lost = f"1 images that this run of 2 does not include, for example {some[1]}"
    assert f"{output} has {lost}" in ran.stderr
    assert ran.returncode == 2
    with np.load(output) as arrays:
        assert len(arrays["images"]) == 3
    ran = vit_client(url, "embed", *some, "-o", output, "--overwrite")
    assert "resuming: 2 of 3" in ran.stderr
    assert ran.returncode == 1
    with np.load(output) as arrays:
        assert len(arrays["images"]) == 2


def test_xargs_batches_and_a_list(url: str, photos: Path, tmp_path: Path) -> None:
    """`xargs` runs the command several times: the second must not overwrite the first's output."""
    output = tmp_path / "out.npz"

    def find(line: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            f"find {photos} -type f -print0 | sort -z | {line} -o {output}",
            shell=True,
            env={**os.environ, "VIT_URL": url},
            capture_output=True,
            text=True,
            timeout=60,
        )

    ran = find(f"xargs -0 -n 16 {COMMAND} embed")
    assert ran.returncode == 123
    assert "with --files-from -" in ran.stderr
    with np.load(output) as arrays:
        assert len(arrays["images"]) == 16
    ran = find(f"{COMMAND} embed --files-from - -0")
    assert ran.returncode == 0, ran.stderr
    with np.load(output) as arrays:
        assert arrays["images"].tolist() == [str(path) for path in sorted(photos.iterdir())]


def test_two_runs_do_not_mix(url: str, photos: Path, tmp_path: Path) -> None:
    from vit_client.cli._journal import Journal

    journal = Journal(tmp_path / "out.npz", "model", 0)
    journal.add("x.png", Analysis([], np.zeros(64, np.float32)))
    ran = vit_client(url, "embed", photos, "-o", tmp_path / "out.npz")
    assert "is another run writing it?" in ran.stderr
    assert ran.returncode == 2
    journal.close()


@pytest.mark.parametrize("images", [0, 1])
def test_another_models_partial_result(url: str, photos: Path, tmp_path: Path, images: int) -> None:
    """Is neither mixed with this model's results nor discarded."""
    from vit_client.cli._journal import Journal

    output = tmp_path / "out.npz"
    journal = Journal(output, "another model", 0)
    for number in range(images):
        journal.add(str(photos / f"{number:02}.png"), Analysis([], np.zeros(64, np.float32)))
    journal.close()
    ran = vit_client(url, "embed", photos, "-o", output)
    if images:
        assert f"{output}.partial has 1 images by another model than this server's" in ran.stderr
        assert "delete it to start over" in ran.stderr
        assert ran.returncode == 2
        assert not output.exists()
        Path(f"{output}.partial").unlink()
        ran = vit_client(url, "embed", photos, "-o", output)
    assert ran.stderr == ""
    with np.load(output) as arrays:
        assert np.abs(arrays["embeddings"][0]).sum() > 0


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("out.txt", "must end in .npz"),
        ("nowhere/out.npz", "no such folder"),
        ("photos.npz", "photos.npz is a folder"),
        ("x" * 250 + ".npz", "file name too long"),
    ],
    ids=lambda value: value[:12],
)
def test_a_bad_output_is_told_before_the_work(
    photos: Path, tmp_path: Path, output: str, words: str
) -> None:
    (tmp_path / "photos.npz").mkdir()
    ran = vit_client("localhost:1", "embed", photos, "-o", tmp_path / output)
    assert words in ran.stderr
    assert ran.returncode == 2


@pytest.mark.parametrize(
    "name",
    [
        *("a.npz", "a.safetensors", "a.parquet", "a.txt", "missing.npz", "empty.npz"),
        *("array.npz", "short.npz", "list.safetensors"),
    ],
)
def test_similar_wants_a_file_of_embeddings(
    url: str, photos: Path, tmp_path: Path, name: str
) -> None:
    file = tmp_path / name
    if name.startswith("a."):
        file.write_bytes(encoded(0))
    elif name == "empty.npz":
        file.touch()
    elif name == "array.npz":
        with file.open("wb") as opened:
            np.save(opened, np.zeros(3))
    elif name == "short.npz":
        np.savez(file, embeddings=np.zeros((2, 64), np.float32), images=np.array(["x"]))
    elif name == "list.safetensors":
        file.write_bytes(b"\2\0\0\0\0\0\0\0[]")
    ran = vit_client(url, "similar", photos / "00.png", "--to", tmp_path / name)
    assert name in ran.stderr
    assert ran.returncode == 2


@pytest.mark.parametrize("told", ["this", "older", "none", "other", "other version", "other name"])
def test_similar_refuses_another_model(
    url: str, client: Client, photos: Path, tmp_path: Path, told: str
) -> None:
    file = tmp_path / "other.npz"
    embeddings = client.embed([photos / "00.png"])
    model = json.loads(describe(client.model()))
    if told == "other version":
        model["model_version"] = "12345"
    elif told != "this":
        del model["model_version"]  # as an older vit-client wrote it
    if told == "other name":
        model["name"] = "other"
    text = {"none": "", "other": "other"}.get(told, json.dumps(model))
    np.savez(file, embeddings=embeddings, images=np.array(["x"]), model=np.array(text))
    ran = vit_client(url, "similar", photos / "00.png", "--to", file)
    if "other" in told:
        assert f"{file} is from another model than the server's" in ran.stderr
        assert client.model().version in ran.stderr
        assert ran.stdout == ""
        assert ran.returncode == 2
    else:
        assert ran.stdout == " 1.0000  x\n"
        assert ran.stderr == ""
    np.savez(file, embeddings=embeddings[:, :5], images=np.array(["x"]))
    ran = vit_client(url, "similar", photos / "00.png", "--to", file)
    assert "gives 64 numbers" in ran.stderr
    assert ran.returncode == 2


def test_features_are_saved_and_drawn(
    url: str, client: Client, photos: Path, tmp_path: Path
) -> None:
    photo = photos / "03.png"
    files = [tmp_path / name for name in ("neck.safetensors", "neck.npz", "map.png")]
    ran = vit_client(url, "features", photo, "-o", files[0], "--picture", files[2])
    assert ran.returncode == 0, ran.stderr
    vit_client(url, "features", "-", "-o", files[1], stdin=photo.read_bytes())
    neck = client.features(photo)["neck"]
    np.testing.assert_allclose(safetensors.numpy.load_file(files[0])["neck"], neck, atol=1e-5)
    with np.load(files[1]) as arrays:
        np.testing.assert_allclose(arrays["neck"], neck, atol=1e-5)
    with Image.open(files[2]) as picture:
        assert picture.size == (1024, 512)
        # The right half is a 4 × 4 grid of flat colours.
        assert len(picture.crop((512, 0, 1024, 512)).getcolors() or []) <= 16


def test_a_pipe_is_read_once(url: str, photos: Path, tmp_path: Path) -> None:
    """The picture shows the image that was sent."""
    picture = tmp_path / "map.png"
    vit_client(url, "features", photos / "00.png", "--picture", picture)
    expected = picture.read_bytes()
    for line in (
        f"{COMMAND} features /dev/stdin --picture {picture} < <(cat {photos}/00.png)",
        f"{COMMAND} features <(cat {photos}/00.png) --picture {picture}",
        f"{COMMAND} features - --picture {picture} < {photos}/00.png",
    ):
        picture.unlink()
        ran = subprocess.run(
            ["bash", "-c", line],
            env={**os.environ, "VIT_URL": url},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert ran.returncode == 0, ran.stderr
        assert picture.read_bytes() == expected


# Simulates a Pillow without a decoder for AVIF, which the server reads.
WITHOUT_AVIF = """
import sys
from PIL import Image
Image.init()
Image.ID.remove("AVIF")
from vit_client.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_picture_that_cannot_be_drawn(url: str, photos: Path, tmp_path: Path) -> None:
    photo, neck, picture = (tmp_path / name for name in ("a.avif", "neck.npz", "map.png"))
    photo.write_bytes(encoded(0, "AVIF"))
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_AVIF, "features", photo, "-o", neck, "--picture", picture],
        env={**os.environ, "VIT_URL": url},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.stderr.startswith(f"vit-client: {photo}: no picture: Pillow cannot read it here")
    assert ran.stderr.count("\n") == 1
    assert ran.returncode == 1
    assert neck.exists()  # it does not depend on the picture
    assert not picture.exists()


def test_pictures_of_any_shape(url: str, tmp_path: Path) -> None:
    """One row of pixels; and what Pillow calls a decompression bomb but the server accepts."""
    photo, picture = tmp_path / "a.png", tmp_path / "map.png"
    for size, expected in (((40000, 1), (4096, 1)), ((2, 9000), (2, 512))):
        Image.new("RGB", size).save(photo)
        ran = vit_client(url, "features", photo, "--picture", picture)
        assert ran.stderr == ""
        with Image.open(picture) as drawn:
            assert drawn.size == expected


def test_a_picture_does_not_replace_its_image(photos: Path) -> None:
    photo = photos / "00.png"
    before = photo.read_bytes()
    ran = vit_client("localhost:1", "features", photo, "--picture", photos / "." / "00.png")
    assert "is the image itself" in ran.stderr
    assert ran.returncode == 2
    assert photo.read_bytes() == before


def test_features_to_a_file_take_one_image(url: str, photos: Path, tmp_path: Path) -> None:
    ran = vit_client(url, "features", photos, "-o", tmp_path / "neck.npz")
    assert "take one image, not 20" in ran.stderr
    assert ran.returncode == 2
    ran = vit_client(url, "features", photos / "no.png", "-o", tmp_path / "neck.npz")
    assert "no such file" in ran.stderr
    assert ran.returncode == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--picture", "out.xyz", "-o", "n.npz"], "out.xyz: cannot write pictures of this kind"),
        (["-o", "n.npz", "--json"], "--json prints the map"),
        (["--picture", "out.png", "--json"], "--json prints the map"),
    ],
)
def test_features_are_refused_before_the_work(
    photos: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    paths = [tmp_path / word if "." in word else word for word in arguments]
    ran = vit_client("localhost:1", "features", photos / "00.png", *paths)
    assert words in ran.stderr
    assert ran.returncode == 2
    assert [path for path in tmp_path.iterdir() if path != photos] == []


def test_patches_that_are_alike_have_one_colour() -> None:
    """Two kinds of patches, left and right; and a uniform map."""
    neck = np.zeros((8, 4, 6), np.float32)
    neck[:, :, 3:] = np.arange(8, dtype=np.float32)[:, None, None]
    colours = principal_colours(neck)
    assert colours.shape == (4, 6, 3)
    assert len(np.unique(colours[:, :3].reshape(-1, 3), axis=0)) == 1
    assert len(np.unique(colours[:, 3:].reshape(-1, 3), axis=0)) == 1
    assert not np.array_equal(colours[0, 0], colours[0, 5])
    np.testing.assert_array_equal(principal_colours(neck), principal_colours(neck))
    assert principal_colours(np.ones((8, 2, 2), np.float32)).max() == 0


def test_health(url: str) -> None:
    ran = vit_client(url, "health")
    assert ran.stdout.startswith("answering  yes")
    assert ran.returncode == 0
    told = json.loads(vit_client(url, "health", "--json").stdout)
    assert told["answering"]
    assert told["model"]["classes"] == 12
    ran = vit_client("localhost:1", "health")
    assert ran.stdout.startswith("answering  no")
    assert ran.returncode == 3


def test_a_closed_pipe_is_no_error(url: str, photos: Path) -> None:
    ran = subprocess.run(
        f"{COMMAND} features {photos} --json | head -c 10",
        shell=True,
        env={**os.environ, "VIT_URL": url},
        capture_output=True,
        timeout=60,
    )
    assert len(ran.stdout) == 10
    assert ran.stderr == b""


@pytest.mark.parametrize(
    ("arguments", "words"), [([], "usage: "), (["."], "no images to compare in .")]
)
def test_duplicates_of_nothing(url: str, tmp_path: Path, arguments: list[str], words: str) -> None:
    ran = subprocess.run(
        [sys.executable, DUPLICATES, *arguments],
        cwd=tmp_path,
        env={**os.environ, "VIT_URL": url},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.stderr.startswith(words)
    assert ran.stderr.count("\n") == 1
    assert ran.returncode == 1

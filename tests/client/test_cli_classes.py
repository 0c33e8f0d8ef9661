"""`embed -o --top-k`: the best classes together with the vectors, from one forward pass."""

import sqlite3
from pathlib import Path

import numpy as np
import pytest
from vit_client import Analysis, Client, Prediction
from vit_client.cli import _tables
from vit_client.cli._embed import describe
from vit_client.cli._journal import Journal, _stamp

from .conftest import encoded, images_seen
from .test_cli import vit_client
from .test_cli_files import assert_same_classes, classes_in, need

FORMATS = ["npz", "parquet"]


@pytest.mark.parametrize("form", FORMATS)
def test_classes_beside_the_vectors(
    url: str, client: Client, photos: Path, tmp_path: Path, form: str
) -> None:
    need(form)
    paths = sorted(photos.iterdir())
    (photos / "broken.jpg").write_bytes(b"broken")
    output = tmp_path / f"out.{form}"
    seen = images_seen(url, "vit")
    ran = vit_client(url, "embed", photos, "-o", output, "--top-k", 3)
    assert images_seen(url, "vit") - seen == 20
    assert ran.stdout == f"{output}: 20 × 64 float32, and the 3 best classes of each\n"
    assert "broken.jpg: " in ran.stderr
    assert ran.returncode == 1
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [output.name]

    images, embeddings, model = _tables.read(output)
    assert images == _tables.read_images(output) == [str(path) for path in paths]
    assert model == describe(client.model())
    np.testing.assert_allclose(embeddings, client.embed(paths), atol=1e-5)
    assert_same_classes(classes_in(output), client.classify(paths, top_k=3))
    ran = vit_client(url, "similar", paths[7], "--to", output, "-n", 1)
    assert ran.stdout == f" 1.0000  {paths[7]}\n"


def test_their_types(url: str, photos: Path, tmp_path: Path) -> None:
    photo = photos / "00.png"
    ran = vit_client(url, "embed", photo, "-o", tmp_path / "out.npz", "-k", 1)
    assert ran.stdout.endswith("1 × 64 float32, and the best class of each\n")
    with np.load(tmp_path / "out.npz") as arrays:
        assert arrays["labels"].dtype.kind == "U"
        assert arrays["indices"].dtype == np.int32
        assert arrays["scores"].dtype == np.float32
        for name in ("labels", "indices", "scores"):
            assert arrays[name].shape == (1, 1)
    parquet = pytest.importorskip("pyarrow.parquet", exc_type=ImportError)
    vit_client(url, "embed", photo, "-o", tmp_path / "out.parquet", "-k", 1)
    fields = {field.name: field.type for field in parquet.read_schema(tmp_path / "out.parquet")}
    assert list(fields) == ["image", "embedding", "predictions"]
    guess = fields["predictions"].value_type
    assert [(field.name, str(field.type)) for field in guess] == [
        ("label", "string"), ("index", "int32"), ("score", "float")
    ]  # fmt: skip


def test_without_top_k_there_are_none(url: str, photos: Path, tmp_path: Path) -> None:
    vit_client(url, "embed", photos, "-o", tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as arrays:
        assert sorted(arrays) == ["embeddings", "images", "model"]
    parquet = pytest.importorskip("pyarrow.parquet", exc_type=ImportError)
    vit_client(url, "embed", photos, "-o", tmp_path / "out.parquet")
    assert parquet.read_schema(tmp_path / "out.parquet").names == ["image", "embedding"]


@pytest.mark.parametrize("form", FORMATS)
def test_many_blocks_and_labels_of_any_length(tmp_path: Path, form: str) -> None:
    """Through the journal, which keeps them bit for bit."""
    need(form)
    images = [f"{row}.png" for row in range(7)]
    answers = [
        Analysis(
            [
                Prediction("ß鳥" * rank * row, 10 * row + rank, 1 / (3 + row + rank))
                for rank in (0, 1)
            ],
            np.full(4, row, np.float32),
        )
        for row in range(7)
    ]
    journal = Journal(tmp_path / "out", "model", 2)
    for image, answer in zip(images, answers, strict=True):
        journal.add(image, answer)
    output = tmp_path / f"out.{form}"
    table = _tables.Table(images, 4, 2, lambda: journal.blocks(images, 3), "model")
    _tables.write(output, table)
    journal.delete()
    assert _tables.read(output)[0] == images
    np.testing.assert_array_equal(_tables.read(output)[1], [answer.embedding for answer in answers])
    assert classes_in(output) == [
        [
            Prediction(guess.label, guess.index, float(np.float32(guess.score)))
            for guess in answer.predictions
        ]
        for answer in answers
    ]


def test_labels_that_are_all_empty(tmp_path: Path) -> None:
    block = _tables.Block(np.zeros((1, 4), np.float32), [[Prediction("", 0, 1.0)]])
    _tables.write(tmp_path / "x.npz", _tables.Table(["x"], 4, 1, lambda: [block], "model"))
    assert classes_in(tmp_path / "x.npz") == block.predictions


def leave_behind(output: Path, client: Client, photo: Path, top_k: int) -> None:
    """Leave the journal of an interrupted run, with made-up numbers."""
    journal = Journal(output, describe(client.model()), top_k)
    wrong = Analysis([Prediction("wrong", 0, 1.0)] * top_k, np.zeros(64, np.float32))
    journal.add(str(photo), wrong)
    journal.close()


@pytest.mark.parametrize(("left", "asked"), [(0, 2), (3, 2), (2, 0)])
def test_another_top_k_is_not_resumed(
    url: str, client: Client, photos: Path, tmp_path: Path, left: int, asked: int
) -> None:
    output, paths = tmp_path / "out.npz", sorted(photos.iterdir())
    leave_behind(output, client, paths[0], left)
    ran = vit_client(url, "embed", photos, "-o", output, *(["-k", asked] if asked else []))
    assert "resuming" not in ran.stderr
    assert ran.returncode == 0
    np.testing.assert_allclose(_tables.read(output)[1], client.embed(paths), atol=1e-5)
    if asked:
        assert_same_classes(classes_in(output), client.classify(paths, top_k=asked))


@pytest.mark.parametrize("top_k", [[], ["--top-k", "2"]])
def test_what_an_earlier_version_left_is_dropped(
    url: str, client: Client, photos: Path, tmp_path: Path, top_k: list[str]
) -> None:
    output, photo = tmp_path / "out.npz", photos / "00.png"
    db = sqlite3.connect(f"{output}.partial")
    db.execute("CREATE TABLE model (model TEXT)")
    db.execute(
        "CREATE TABLE rows (image BLOB PRIMARY KEY, stamp TEXT, embedding BLOB) WITHOUT ROWID"
    )
    db.execute("INSERT INTO model VALUES (?)", (describe(client.model()),))
    row = (str(photo).encode(), _stamp(str(photo)), bytes(256))
    db.execute("INSERT INTO rows VALUES (?, ?, ?)", row)
    db.commit()
    db.close()
    ran = vit_client(url, "embed", photos, "-o", output, *top_k)
    assert ran.stderr == ""
    assert ran.returncode == 0
    expected = client.embed(sorted(photos.iterdir()))
    np.testing.assert_allclose(_tables.read(output)[1], expected, atol=1e-5)


def test_a_top_k_out_of_range_costs_nothing(
    url: str, client: Client, photos: Path, tmp_path: Path
) -> None:
    output, photo = tmp_path / "out.npz", photos / "00.png"
    seen = images_seen(url, "vit")
    ran = vit_client(url, "embed", photo, "-o", output, "-k", 13)
    assert ran.stderr == "vit-client: --top-k must be from 1 to 12, not 13\n"
    assert ran.returncode == 2
    assert list(tmp_path.iterdir()) == [photos]
    leave_behind(output, client, photo, 3)
    assert vit_client(url, "embed", photo, "-o", output, "-k", 13).returncode == 2
    assert images_seen(url, "vit") == seen
    ran = vit_client(url, "embed", photo, "-o", output, "-k", 3)  # the journal is kept
    assert "resuming: 1 of 1" in ran.stderr
    assert classes_in(output) == [[Prediction("wrong", 0, 1.0)] * 3]


def test_safetensors_have_no_classes(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    ran = vit_client("localhost:1", "embed", photos, "-o", output, "-k", 3)
    assert f"{output}: .safetensors cannot store text" in ran.stderr
    assert "must end in .npz or .parquet" in ran.stderr
    assert ran.returncode == 2
    assert list(tmp_path.iterdir()) == [photos]


def test_the_same_images_with_classes_now(url: str, photos: Path, tmp_path: Path) -> None:
    """They replace the file without classes; standard input gets classes too."""
    output = tmp_path / "out.npz"
    vit_client(url, "embed", photos, "-o", output)
    ran = vit_client(url, "embed", photos, "-", "-o", output, "-k", 2, stdin=encoded(5))
    assert ran.returncode == 0
    classes = classes_in(output)
    assert len(classes) == 21
    assert_same_classes(classes[20:], [classes[5]])

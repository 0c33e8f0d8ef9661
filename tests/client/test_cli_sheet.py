"""`--sheet`: the results as one picture, besides the printed output."""

import io
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageFont
from PIL._util import DeferredError
from vit_client import Client
from vit_client.cli import _sheet
from vit_client.cli._sheet import CELLS, GAP, TILE, Sheet, thumbnail

from .conftest import encoded, pixels
from .test_cli import COMMAND, vit_client
from .test_cli_files import WITHOUT_AVIF, on_small_disk
from .test_cli_interrupt import opened_for_reading, running, wait_until_empty

Pixels = npt.NDArray[np.uint8]

BACKGROUND = (0xF1, 0xF1, 0xF1)


class Drawn:
    """The pixels of a sheet, by cell."""

    def __init__(self, path: Path, columns: int, lines: int) -> None:
        with Image.open(path) as picture:
            self.pixels: Pixels = np.asarray(picture.convert("RGB"))
        self.columns = columns
        self.text_height = 17 * lines
        self.row_height = TILE + GAP // 4 + self.text_height + GAP

    def size_for(self, rows: int) -> tuple[int, int]:
        return GAP + rows * self.row_height, GAP + self.columns * (TILE + GAP)

    def tile(self, cell: int) -> Pixels:
        y, x = self._corner(cell)
        return self.pixels[y : y + TILE, x : x + TILE]

    def text(self, cell: int, line: int) -> Pixels:
        """A line under a thumbnail, from 0."""
        y, x = self._corner(cell)
        y += TILE + GAP // 4 + 17 * line
        return self.pixels[y : y + 17, x : x + TILE]

    def left_of(self, cell: int) -> Pixels:
        """The area between the texts of a cell and of the one before."""
        y, x = self._corner(cell)
        return self.pixels[y + TILE + GAP // 4 :, x - GAP + 1 : x - 1][: self.text_height]

    def _corner(self, cell: int) -> tuple[int, int]:
        row, column = divmod(cell, self.columns)
        return GAP + row * self.row_height, GAP + column * (TILE + GAP)


def has_text(pixels: Pixels) -> bool:
    """Whether there is text with enough contrast on white or grey."""
    return bool((pixels.min(axis=2) < 0x80).any())


def enlarged(seed: int) -> Pixels:
    """One of the 64 × 64 photos, with pixels enlarged to squares."""
    return pixels(seed).repeat(3, axis=0).repeat(3, axis=1)


@pytest.mark.parametrize("form", [[], ["--json"], ["--csv"]])
def test_classify(url: str, photos: Path, tmp_path: Path, form: list[str]) -> None:
    sheet = tmp_path / "sheet.png"
    without = vit_client(url, "classify", photos, *form)
    ran = vit_client(url, "classify", photos, *form, "--sheet", sheet)
    assert (ran.stdout, ran.stderr, ran.returncode) == (without.stdout, "", 0)
    assert list(tmp_path.glob("*.*")) == [sheet]  # and no temporary file
    drawn = Drawn(sheet, columns=7, lines=4)
    assert drawn.pixels.shape == (*drawn.size_for(rows=3), 3)
    for seed in range(20):
        np.testing.assert_array_equal(drawn.tile(seed), enlarged(seed))
        # The best three of five classes, with scores on the right; then the name.
        for line in range(3):
            assert has_text(drawn.text(seed, line)[:, :60])
            assert has_text(drawn.text(seed, line)[:, -30:])
        assert has_text(drawn.text(seed, 3)[:, :60])
        assert not has_text(drawn.text(seed, 3)[:, 60:])
    assert (drawn.tile(20) == 255).all()


def test_as_many_classes_as_were_asked_for(url: str, photos: Path, tmp_path: Path) -> None:
    vit_client(url, "classify", photos / "00.png", "-k", 1, "--sheet", tmp_path / "sheet.png")
    drawn = Drawn(tmp_path / "sheet.png", columns=1, lines=2)
    assert drawn.pixels.shape == (*drawn.size_for(rows=1), 3)


def test_similar(url: str, client: Client, photos: Path, tmp_path: Path) -> None:
    table, sheet = tmp_path / "photos.npz", tmp_path / "sheet.png"
    vit_client(url, "embed", photos, "-o", table)
    query = photos / "07.png"
    without = vit_client(url, "similar", query, "--to", table, "-n", 3, "--json")
    rows = [json.loads(line) for line in without.stdout.splitlines()]
    Path(rows[2]["image"]).unlink()  # deleted since
    ran = vit_client(url, "similar", query, "--to", table, "-n", 3, "--json", "--sheet", sheet)
    assert (ran.stdout, ran.stderr, ran.returncode) == (without.stdout, "", 0)
    drawn = Drawn(sheet, columns=4, lines=2)
    assert drawn.pixels.shape == (*drawn.size_for(rows=1), 3)
    np.testing.assert_array_equal(drawn.tile(0), enlarged(7))
    for cell, row in enumerate(rows[:2], 1):
        np.testing.assert_array_equal(drawn.tile(cell), enlarged(int(Path(row["image"]).stem)))
    assert tells_a_problem(drawn.tile(3))
    for cell in range(4):
        assert has_text(drawn.text(cell, 0))
        assert has_text(drawn.text(cell, 1))
    # Only the query has a frame.
    assert is_coloured(drawn.pixels[GAP - 3, GAP : GAP + TILE]).all()
    assert (drawn.pixels[GAP - 3, TILE + 2 * GAP :] == 255).all()


def is_coloured(colours: Pixels) -> Any:
    return np.ptp(colours.astype(int), axis=-1) > 60


def tells_a_problem(tile: Pixels) -> bool:
    """Whether the tile has red text and is otherwise empty."""
    red = (tile[..., 0].astype(int) - tile[..., 1]) > 60
    empty = (tile == BACKGROUND).all(axis=2)
    return bool(red.any() and empty.mean() > 0.8)


def test_images_that_fail_have_a_cell(url: str, photos: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    (photos / "01.png").write_bytes(b"broken")
    names = [photos / f"{seed:02}.png" for seed in (0, 1, 2)]
    ran = vit_client(url, "classify", *names, photos / "no.png", "--sheet", sheet)
    assert ran.stderr.count("\n") == 2
    assert ran.returncode == 1
    drawn = Drawn(sheet, columns=4, lines=4)
    np.testing.assert_array_equal(drawn.tile(0), enlarged(0))
    np.testing.assert_array_equal(drawn.tile(2), enlarged(2))
    for cell in (1, 3):
        assert tells_a_problem(drawn.tile(cell))
        assert has_text(drawn.text(cell, 0))  # the name
        assert not has_text(drawn.text(cell, 1))


def test_what_pillow_cannot_read_here_has_a_cell(url: str, tmp_path: Path) -> None:
    photo, sheet = tmp_path / "a.avif", tmp_path / "sheet.png"
    photo.write_bytes(encoded(0, "AVIF"))
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_AVIF, "classify", photo, "--sheet", sheet],
        env={**os.environ, "VIT_URL": url},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ran.stderr, ran.returncode) == ("", 0)
    drawn = Drawn(sheet, columns=1, lines=4)
    assert tells_a_problem(drawn.tile(0))
    assert has_text(drawn.text(0, 0)[:, -30:])  # the result is shown


def test_a_sheet_has_a_bounded_number_of_cells(url: str, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(CELLS + 5):
        Image.new("RGB", (1, 1), (number % 256, 0, number // 256)).save(photos / f"{number}.ppm")
    sheet = tmp_path / "sheet.png"
    ran = vit_client(url, "classify", photos, "-k", 1, "--json", "--sheet", sheet)
    assert len(ran.stdout.splitlines()) == CELLS + 5
    assert ran.stderr == (f"vit-client: the first {CELLS} of {CELLS + 5} images are in the sheet\n")
    assert ran.returncode == 0
    drawn = Drawn(sheet, columns=10, lines=2)
    assert drawn.pixels.shape == (*drawn.size_for(rows=CELLS // 10), 3)
    shown = [json.loads(line)["image"] for line in ran.stdout.splitlines()][:CELLS]
    for cell, name in enumerate(shown):
        number = int(Path(name).stem)
        assert (drawn.tile(cell) == (number % 256, 0, number // 256)).all()


@pytest.mark.parametrize("line", ["- < {photo}", "/dev/stdin < <(cat {photo})", "<(cat {photo})"])
def test_what_can_be_read_only_once(url: str, photos: Path, tmp_path: Path, line: str) -> None:
    sheet, table = tmp_path / "sheet.png", tmp_path / "photos.npz"
    vit_client(url, "embed", photos / "03.png", "-", "-o", table, stdin=encoded(4))
    words = line.format(photo=photos / "03.png")
    for verb in ("classify", f"similar --to {table}"):
        ran = subprocess.run(
            ["bash", "-c", f"{COMMAND} {verb} --sheet {sheet} {words}"],
            env={**os.environ, "VIT_URL": url},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (ran.stderr, ran.returncode) == ("", 0)
        drawn = Drawn(sheet, *((1, 4) if verb == "classify" else (3, 2)))
        np.testing.assert_array_equal(drawn.tile(0), enlarged(3))
        sheet.unlink()
    # The image from standard input is no longer available.
    np.testing.assert_array_equal(drawn.tile(1), enlarged(3))
    assert tells_a_problem(drawn.tile(2))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sheet.xyz", "sheet.xyz: cannot write pictures of this kind; try .png"),
        ("sheet.xbm", "sheet.xbm: cannot write pictures of this kind; try .png"),  # 1 bit only
        ("", "is a folder"),  # an unset shell variable
        ("sheet", "sheet: cannot write pictures of this kind; try .png"),
        ("no/sheet.png", "no such folder"),
        ("photos", "is a folder"),
        ("photos/./07.png", "is one of the images: choose another name"),
        ("link.png", "is one of the images: choose another name"),
    ],
)
def test_what_is_refused_before_the_work(
    photos: Path, tmp_path: Path, name: str, words: str
) -> None:
    os.link(photos / "07.png", tmp_path / "link.png")
    table = tmp_path / "photos.npz"
    names = np.array([str(photo) for photo in sorted(photos.iterdir())])
    np.savez(table, images=names, embeddings=np.ones((20, 64), np.float32))
    before = sorted(tmp_path.rglob("*"))
    for arguments in (["classify", photos], ["similar", photos / "00.png", "--to", table]):
        # Fails before connecting: an unreachable server is exit code 3.
        ran = vit_client("localhost:1", *arguments, "--sheet", name and tmp_path / name)
        assert words in ran.stderr
        assert ran.stderr.count("\n") == 1
        assert ran.returncode == 2
    assert sorted(tmp_path.rglob("*")) == before
    assert (photos / "07.png").read_bytes() == encoded(7)


def test_the_sheet_of_last_time_may_be_among_the_images(url: str, photos: Path) -> None:
    sheet = photos / "sheet.png"
    assert vit_client(url, "classify", photos, "--sheet", sheet).returncode == 0
    ran = vit_client(url, "classify", photos, "--sheet", sheet)
    assert "leave it out of its folder with --exclude sheet.png" in ran.stderr
    assert ran.returncode == 2
    ran = vit_client(url, "classify", photos, "--sheet", sheet, "--exclude", "sheet.png")
    assert ran.returncode == 0


def test_a_full_disk(url: str, photos: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    sheet.write_bytes(b"what was there before")
    ran = on_small_disk(url, 4096, "classify", str(photos), "--sheet", str(sheet))
    assert ran.stderr == f"vit-client: {sheet} cannot be written (file too large)\n"
    assert ran.returncode == 5
    assert sorted(tmp_path.iterdir()) == [photos, sheet]
    assert sheet.read_bytes() == b"what was there before"


def test_a_file_of_somebody_else_has_numbers_for_names(
    url: str, photos: Path, tmp_path: Path
) -> None:
    table, sheet = tmp_path / "photos.npz", tmp_path / "sheet.png"
    np.savez(table, images=np.arange(2), embeddings=np.ones((2, 64), np.float32))
    arguments = ["similar", photos / "00.png", "--to", table, "--json", "--sheet", sheet]
    ran = vit_client(url, *arguments)
    assert [json.loads(line)["image"] for line in ran.stdout.splitlines()] == ["0", "1"]
    assert (ran.stderr, ran.returncode) == ("", 0)
    assert tells_a_problem(Drawn(sheet, columns=3, lines=2).tile(1))


def test_a_folder_that_cannot_be_written_to(url: str, photos: Path) -> None:
    ran = vit_client(url, "classify", photos / "00.png", "--sheet", "/proc/sheet.png")
    assert ran.stderr.startswith("vit-client: /proc/sheet.png cannot be written (")
    assert ran.returncode == 5


def test_an_interrupted_run_leaves_no_sheet(url: str, photos: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    arguments = ["classify", photos, pipe, "--sheet", tmp_path / "sheet.png"]
    with running(url, COMMAND, *arguments) as process:
        writer = opened_for_reading(pipe)
        try:
            os.write(writer, b"the beginning")
            wait_until_empty(writer)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        finally:
            os.close(writer)
    assert said == "vit-client: interrupted\n"
    assert process.returncode == 130
    assert sorted(tmp_path.iterdir()) == [photos, pipe]


def test_without_a_server_there_is_no_sheet(photos: Path, tmp_path: Path) -> None:
    ran = vit_client("localhost:1", "classify", photos, "--sheet", tmp_path / "sheet.png")
    assert ran.returncode == 3
    assert list(tmp_path.iterdir()) == [photos]


@pytest.mark.parametrize("suffix", ["jpg", "webp", "tiff", "gif", "pdf"])
def test_other_formats(url: str, photos: Path, tmp_path: Path, suffix: str) -> None:
    sheet = tmp_path / f"sheet.{suffix}"
    assert vit_client(url, "classify", photos / "00.png", "--sheet", sheet).returncode == 0
    if suffix == "pdf":
        assert sheet.read_bytes().startswith(b"%PDF-")
    else:
        with Image.open(sheet) as picture:
            assert picture.format == suffix.upper().replace("JPG", "JPEG")
            assert picture.size == (GAP + TILE + GAP, GAP + TILE + GAP // 4 + 4 * 17 + GAP)


@pytest.fixture(params=["as it is", "no other fonts", "no FreeType"])
def _fonts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "as it is":
        monkeypatch.setattr(_sheet, "_FONTS", ())
    if request.param == "no FreeType":
        missing = DeferredError.new(ImportError("The _imagingft C module is not installed"))
        monkeypatch.setattr(ImageFont, "core", missing)


@pytest.mark.usefixtures("_fonts")
@pytest.mark.parametrize(
    "text",
    ["a" * 5000, "写真" * 50, "naïve café", "пёс 🐕 שלום", "two\nlines\t\x1b\0", "\udcff\udcfe",
     "word " * 200, "x", ""],
)  # fmt: skip
def test_texts_stay_in_their_cell(tmp_path: Path, text: str) -> None:
    path = tmp_path / "sheet.png"
    photo = tmp_path / "photo.png"
    photo.write_bytes(encoded(0))
    sheet = Sheet(path, ["a.png", f"folder/{text}", str(photo), "z.png"], lines=1)
    sheet.add(str(photo), [("", "")])
    sheet.add(text, problem=f"before {text}")
    sheet.add(str(photo), [(f"{text} and more", "12.3%")])
    sheet.add("z.png", problem="x")
    sheet.save()
    drawn = Drawn(path, columns=4, lines=2)
    for cell in (1, 2, 3):
        assert (drawn.left_of(cell) == 255).all()
    assert tells_a_problem(drawn.tile(1))
    assert (drawn.tile(1)[-5:] == BACKGROUND).all()
    assert (drawn.tile(1)[:, -5:] == BACKGROUND).all()
    # The label leaves room for its score.
    score = int(sheet._font.getlength("12.3%"))
    assert (drawn.text(2, 0)[:, -score - 8 : -score - 2] == 255).all()
    assert has_text(drawn.text(2, 0)[:, -30:])


def test_long_names_keep_their_end(tmp_path: Path) -> None:
    sheet = Sheet(tmp_path / "sheet.png", ["x"], lines=1)
    name = "a long name of a folder/of a photo with a number at its end 0123.jpg"
    cut = sheet._cut(name, TILE, _sheet._middle_cut)
    start, end = cut.split("...")
    assert name.startswith(start)
    assert name.endswith(end)
    assert end.endswith("end 0123.jpg")
    # As much of it as fits.
    assert TILE - 10 < sheet._font.getlength(cut) <= TILE
    assert sheet._cut("short.jpg", TILE, _sheet._middle_cut) == "short.jpg"


def saved(image: Image.Image, path: Path, **options: Any) -> str:
    image.save(path, **options)
    return str(path)


def test_thumbnails_have_the_pixels_that_the_model_sees(tmp_path: Path) -> None:
    """RGB as Pillow converts it: alpha dropped, 16 bits cut, EXIF orientation ignored."""
    size = (TILE, TILE)
    colours = pixels(1, TILE, TILE)
    alpha = np.zeros((TILE, TILE, 1), np.uint8)
    see_through = saved(Image.fromarray(np.concatenate([colours, alpha], 2)), tmp_path / "a.png")
    np.testing.assert_array_equal(thumbnail(see_through), colours)

    deep = Image.fromarray(np.full(size, 200, np.uint16))
    np.testing.assert_array_equal(
        thumbnail(saved(deep, tmp_path / "deep.png")), np.asarray(deep.convert("RGB"))
    )
    palette = Image.fromarray(colours).quantize(64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = saved(palette, tmp_path / "p.png", transparency=bytes(range(64)))
        np.testing.assert_array_equal(thumbnail(path), np.asarray(palette.convert("RGB")))

    turned = Image.Exif()
    turned[0x0112] = 6
    wide = Image.fromarray(pixels(2, TILE // 2, TILE))
    np.testing.assert_array_equal(
        thumbnail(saved(wide, tmp_path / "exif.png", exif=turned)), np.asarray(wide)
    )
    cyan = saved(Image.new("CMYK", size, (255, 0, 0, 0)), tmp_path / "cmyk.jpg")
    np.testing.assert_allclose(thumbnail(cyan), np.full((*size, 3), (0, 255, 255)), atol=3)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((28, 28), (168, 168)), ((32, 32), (192, 192)), ((1, 1), (192, 192)),
     ((150, 100), (192, 128)), ((600, 300), (192, 96)), ((40000, 1), (192, 1)),
     ((1, 40000), (1, 192)), ((96, 1), (192, 2))],
)  # fmt: skip
def test_thumbnails_fill_the_tile(
    tmp_path: Path, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert thumbnail(saved(Image.new("RGB", size), tmp_path / "x.png")).size == expected


def test_a_large_jpeg_is_decoded_small(tmp_path: Path) -> None:
    from vit_client.cli._pictures import decoded

    path = saved(Image.new("RGB", (4000, 3000), "red"), tmp_path / "large.jpg")
    assert decoded(path).size == (4000, 3000)
    assert decoded(path, TILE).size == (500, 375)
    assert thumbnail(path).size == (192, 144)


def test_only_what_the_server_would_open_is_opened(tmp_path: Path) -> None:
    """Pillow would start Ghostscript for EPS; and names may come from untrusted files."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "EPS")
    path = tmp_path / "photo.jpg"
    path.write_bytes(file.getvalue())
    with pytest.raises(OSError, match="cannot identify image file"):
        thumbnail(str(path))


def test_help_teaches_it() -> None:
    for verb, example in (
        ("classify", "vit-client classify photos/ --sheet sheet.png"),
        ("similar", "vit-client similar cat.jpg --to photos.npz --sheet alike.png"),
    ):
        ran = vit_client("", verb, "--help")
        assert "--sheet PICTURE" in ran.stdout
        assert example in ran.stdout

"""The load test's parts, against a real server with the real perf_analyzer."""

import base64
import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from conftest import PHOTOS, Server
from PIL import Image

from bench.load import inputs, perf_analyzer, report
from bench.load.perf_analyzer import Measured, PerfAnalyzerError
from bench.load.report import Parts, Point
from bench.load.sweep import Sweep
from bench.load.triton import Address, Triton

FILES = [photo.read_bytes() for photo in inputs.photos(PHOTOS)]


@pytest.fixture(scope="module")
def binary() -> Path:
    try:
        return perf_analyzer.install()
    except PerfAnalyzerError as e:
        pytest.skip(str(e))


@pytest.fixture
def sweep(tiny_server: Server, binary: Path) -> Sweep:
    return Sweep(Triton(Address(tiny_server.url)), binary, seconds=1)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    inputs.write_images(tmp_path / "images.json", FILES)
    return tmp_path / "images.json"


def test_an_image_is_its_length_then_the_file(images: Path) -> None:
    rows = json.loads(images.read_text())["data"]
    assert [row["image"]["shape"] for row in rows] == [[1]] * len(FILES)
    for row, file in zip(rows, FILES, strict=True):
        assert (
            base64.b64decode(row["image"]["content"]["b64"]) == struct.pack("<I", len(file)) + file
        )


def test_pixels_are_what_preprocess_makes(tmp_path: Path, tiny_server: Server) -> None:
    inputs.write_pixels(tmp_path / "pixels.json", inputs.photos(PHOTOS), 64, 64)
    rows = json.loads((tmp_path / "pixels.json").read_text())["data"]
    sent = [base64.b64decode(row["pixels"]["content"]["b64"]) for row in rows]
    expected = tiny_server.infer("preprocess", "image", FILES)["pixels"]
    assert np.array_equal(np.frombuffer(b"".join(sent), np.uint8).reshape(expected.shape), expected)


@pytest.mark.parametrize("megapixels", [0.05, 2.0])
def test_a_photo_keeps_its_shape_at_another_size(megapixels: float) -> None:
    photo = PHOTOS / "coffee.jpg"  # 3:2
    with Image.open(io.BytesIO(inputs.resized(photo, megapixels))) as image:
        assert image.width * image.height == pytest.approx(megapixels * 1e6, rel=0.01)
        assert image.width / image.height == pytest.approx(1.5, rel=0.01)


@pytest.mark.parametrize("model", ["classify", "features"])
def test_an_ensemble_is_measured(sweep: Sweep, images: Path, model: str) -> None:
    point = sweep.point(model, "", images, "concurrency", 2)
    parts = point.parts
    assert point.measured.per_second > 0
    assert 0 < point.measured.p50 <= point.measured.p90 <= point.measured.p99
    assert parts is not None
    assert parts.preprocess > 0
    assert parts.vit > 0
    assert (parts.postprocess > 0) == (model == "classify")
    assert parts.batch >= 1


def test_the_form_without_shape(sweep: Sweep, tmp_path: Path) -> None:
    inputs.write_images(tmp_path / "bare.json", FILES, bare=True)
    bare = Sweep(sweep.triton, sweep.binary, sweep.seconds, ["--shape", "image:1"])
    assert bare.point("embed", "", tmp_path / "bare.json", "concurrency", 2).measured.per_second > 0


def test_a_request_rate_on_vit_alone(sweep: Sweep, tmp_path: Path) -> None:
    inputs.write_pixels(tmp_path / "pixels.json", inputs.photos(PHOTOS), 64, 64)
    point = sweep.point("vit", "", tmp_path / "pixels.json", "rate", 20)
    # Its Poisson schedule is short here, and so off by chance; but the same each time.
    assert 5 < point.measured.per_second < 40
    assert point.parts is not None
    assert point.parts.preprocess == 0


def test_a_refused_request_is_told_in_the_servers_words(sweep: Sweep, tmp_path: Path) -> None:
    inputs.write_images(tmp_path / "bad.json", [b"no image"])
    with pytest.raises(PerfAnalyzerError, match="8 bytes that are not an image"):
        sweep.point("embed", "", tmp_path / "bad.json", "concurrency", 2)


def test_the_report(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs bench/load/requirements.txt")
    measured = Measured(12.5, 0.04, 80.0, 79.0, 90.0, 99.0, "perf_analyzer …")
    parts = Parts(10.0, 20.0, 30.0, 0.0, 20.0, 4.0)
    points = [
        Point("embed", "0.3 MP", "concurrency", 1, measured, parts),
        Point("embed", "0.3 MP", "concurrency", 2, measured, None),
    ]
    report.write(tmp_path, {"network": "tiny"}, points)
    text = (tmp_path / "report.md").read_text()
    assert "## embed, 0.3 MP\n\n| concurrency | images/s |" in text
    assert "| 1 | 12.5 | 4% | 79.0 | 90.0 | 99.0 | 10.0 | 20.0 | 30.0 | 0.0 | 20.0 | 4.0 |" in text
    assert "| 2 | 12.5 | 4% | 79.0 | 90.0 | 99.0 | ? | ? | ? | ? | ? | ? |" in text
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 3
    assert json.loads((tmp_path / "results.json").read_text())["points"][0]["per_second"] == 12.5
    with Image.open(tmp_path / "latency.png") as picture:
        assert picture.width > 500

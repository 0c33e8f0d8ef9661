"""`make bench-host`, but for the bare loops, which want packages of their own."""

from pathlib import Path

import numpy as np
import pytest
from conftest import PHOTOS, serving
from vit_client import Client

from bench.host.__main__ import Bench, markdown, predicted, repositories
from bench.load import inputs
from bench.load.triton import Address


def test_served_with_and_without_decoding(tmp_path: Path) -> None:
    photo = PHOTOS / "coffee.jpg"
    inputs.write_images(tmp_path / "images.json", [photo.read_bytes()])
    bench = Bench(Path(), 0.2, tmp_path)
    found = []
    with repositories(tmp_path) as both:
        for repository in both:
            with serving(repository) as server, Client(server.url) as client:
                found.append(bench.served(Address(server.url), tmp_path / "images.json"))
                pixels = server.infer("preprocess", "image", [photo.read_bytes()])["pixels"]
                assert client.embed(photo).shape == (16,)
    np.testing.assert_array_equal(pixels, np.full((1, 256, 256, 3), 128))
    whole, around = found
    assert 0 < around["preprocess"] < whole["preprocess"]
    assert whole["tritonserver"] > 0
    assert whole["images/s"] > 0


def test_prediction() -> None:
    """At 2 core-ms an image 16 cores are the limit; with 0.9 under a lock, the locks are."""
    assert predicted(16, 2.0, 0.2) == (6, pytest.approx(8000))
    assert predicted(16, 2.0, 0.9) == (6, pytest.approx(6 / 0.9 * 1000))


def test_report() -> None:
    served = {"preprocess": 2.0, "tritonserver": 0.5, "images/s": 400.0}
    way = {"ms": 1.5, "mean": 0.1, "most": 3}
    found = {
        "served": {"0.25": served},
        "loops": {"0.25": {"preprocess's decode.py": way, "Pillow": {**way, "ms": 3.0}}},
        "around": {"preprocess": 0.25},
    }
    text = markdown({"machine": "2 cores", "rounds": [found, found, found]})
    assert "| 0.25 | 2.00 | 0.50 | 2.50 | 400 |" in text
    assert "| 16 | 6 | 6,400 |" in text
    assert "| Pillow | 0.25 | 3.00 | 2.00 | 0.10 | 3 |" in text

"""What is sent for each kind of image, and the errors for anything else."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from vit_client._images import Unusable, encode, is_one_image, name_of

from .conftest import encoded, pixels

SIZE = (64, 64)

# Pillow 13's resize is the reference; earlier versions scale tall images to other pixels.
SHAPES = [(64, 64), (10, 20), (200, 100), (100, 200), (64, 65), (700, 37), (130, 64), (130, 66)]
if int(PIL.__version__.split(".")[0]) < 13:
    SHAPES = [shape for shape in SHAPES if shape[0] <= shape[1]]


def test_files_are_sent_as_they_are(tmp_path: Path) -> None:
    """Without decoding or encoding."""
    data = encoded(0, "JPEG")
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    for image in (path, str(path), data, bytearray(data), memoryview(data), io.BytesIO(data)):
        assert encode(image, SIZE) == data


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["array", "slice", "PIL"])
def test_pixels_are_sent_whole_or_as_the_server_would_scale_them(
    shape: tuple[int, int], kind: str
) -> None:
    array = pixels(0, *shape)
    given: Any = {
        "array": array,
        "slice": np.flip(np.flip(array, 0).copy(), 0),
        "PIL": Image.fromarray(array),
    }[kind]
    sent = Image.open(io.BytesIO(encode(given, SIZE)))
    assert sent.width * sent.height <= max(shape[0] * shape[1], 64 * 64)
    there = sent.convert("RGB").resize((64, 64), Image.Resampling.BICUBIC)
    expected = Image.fromarray(array).resize((64, 64), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(np.asarray(there), np.asarray(expected))


def test_nothing_larger_than_the_model_needs_is_sent() -> None:
    assert len(encode(pixels(0, 1000, 900), SIZE)) < 64 * 64 * 3 + 20
    assert len(encode(Image.new("L", (1000, 900)), SIZE)) < 64 * 64 * 3 + 20


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((8, 8, 3), np.float32), "astype"),
        (np.zeros((8, 8), np.uint8), "grey"),
        (np.zeros((3, 8, 8), np.uint8), "transpose"),
        (np.zeros((8, 8, 4), np.uint8), r"\[8, 8, 4\] is not uint8 \[height, width, 3\]"),
        (np.zeros((2, 8, 8, 3), np.uint8), "list"),
        (np.zeros((0, 8, 3), np.uint8), "no pixels"),
        (np.zeros((3, 8, 8), np.float32), r"transpose\(1, 2, 0\), scale it"),
        (np.zeros(8, np.float32), "is not uint8"),
        (np.zeros(0, np.uint8), "is not uint8"),
        (np.array(["a.jpg"], "S5"), "list of paths, or of the bytes"),
        (np.array([["a.jpg"]], object), "list of paths"),
        (b"", "is empty"),
        (io.BytesIO(), "is empty"),
        (io.StringIO("text"), '"rb"'),
        ("", "an empty name"),
        ("no\0name", "null"),
        ("/no/such/file", "no such file"),
        ("/dev/zero", "is a device, not a file"),
        ("/", "directory"),
        ("https://example.org/cat.jpg", "URLs are not fetched: download it first"),
        ("s3://bucket/cat.jpg", "URLs are not fetched"),
        ("file:///tmp/cat.jpg", "pass only the path"),
        ("data:image/png;base64,iVBORw0KGgo", "decode it, and pass the bytes"),
        ("x" * 5000, "too long"),
        ({"a": "a.jpg"}, r"dict is not a list of images: pass list\(images.values\(\)\)"),
        (torch.zeros(3, 8, 8), r"array of float32 \[3, 8, 8\] .*transpose\(1, 2, 0\), scale it"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), r"transpose\(1, 2, 0\)$"),
        (torch.zeros(2, 3, 8, 8), "list"),
        (torch.zeros(8, 8, 3, device="meta"), "Tensor cannot be converted to an array"),
        (7, "int is not an image"),
        (None, "NoneType is not an image"),
    ],
)
def test_what_is_no_image_is_told_why(image: Any, words: str) -> None:
    with pytest.raises(Unusable, match=words):
        encode(image, SIZE)


def test_a_closed_file(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(0))
    with path.open("rb") as file, Image.open(path) as image:
        pass
    with pytest.raises(Unusable, match="closed"):
        encode(file, SIZE)
    with pytest.raises(Unusable, match="cannot be decoded"):
        encode(image, SIZE)


def test_a_truncated_pil_image() -> None:
    image = Image.open(io.BytesIO(encoded(0, "JPEG")[:1500]))
    with pytest.raises(Unusable, match="truncated"):
        encode(image, SIZE)


def test_names(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(0))
    with path.open("rb") as file, Image.open(path) as image:
        assert {name_of(each) for each in (path, str(path), file, image)} == {str(path)}
    assert name_of(encoded(0)) is None
    assert name_of(pixels(0)) is None
    assert name_of(io.BytesIO(b"x")) is None


def test_one_or_many(tmp_path: Path) -> None:
    one = ["a.jpg", Path("a.jpg"), b"x", pixels(0), Image.new("RGB", (1, 1)), io.BytesIO(), 7]
    assert all(is_one_image(image) for image in one)
    assert not any(is_one_image(images) for images in ([], (), iter([]), {"a.jpg"}, map(str, [])))

"""The single-result tasks against the real server."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from vit_client import BadImage, BadImages, Client, ImageLike, Prediction

from .conftest import encoded, pixels

GOLDENS = sorted((Path(__file__).parents[1] / "goldens" / "images").iterdir())


def test_one_image_has_no_batch_axis(client: Client) -> None:
    guesses = client.classify(encoded(0), top_k=3)
    assert [type(guess) for guess in guesses] == [Prediction] * 3
    assert guesses == sorted(guesses, key=lambda guess: -guess.score)
    assert client.probabilities(encoded(0)).shape == (12,)
    assert client.embed(encoded(0)).shape == (64,)
    assert client.features(encoded(0))["neck"].shape == (64, 4, 4)


def test_a_list_has_one(client: Client) -> None:
    images = [encoded(seed) for seed in range(3)]
    assert [len(guesses) for guesses in client.classify(images, top_k=2)] == [2, 2, 2]
    assert client.probabilities(images).shape == (3, 12)
    assert client.embed(images).shape == (3, 64)
    assert client.features(images)["neck"].shape == (3, 64, 4, 4)


def test_an_empty_list_has_no_rows(client: Client) -> None:
    assert client.classify([]) == []
    assert client.probabilities([]).shape == (0, 12)
    assert client.embed([]).shape == (0, 64)
    assert client.features([])["neck"].shape == (0, 64, 4, 4)


def test_the_answers_agree_with_each_other(client: Client) -> None:
    image = encoded(1)
    probabilities = client.probabilities(image)
    assert probabilities.sum() == pytest.approx(1, abs=1e-5)
    for guess in client.classify(image, top_k=12):
        assert guess.score == pytest.approx(probabilities[guess.index], abs=1e-6)
    neck = client.features(image)["neck"]
    np.testing.assert_allclose(neck.mean((1, 2)), client.embed(image), atol=1e-5)


def test_a_long_list_keeps_its_order(client: Client) -> None:
    """Several requests, answered in any order; the last is not full."""
    images = [encoded(seed) for seed in range(70)]
    assert client.model().max_batch_size < len(images)
    together = client.embed(images)
    for index in (0, 15, 16, 17, 63, 69):
        np.testing.assert_allclose(together[index], client.embed(images[index]), atol=1e-5)
    assert len(np.unique(together[:, 0])) == len(images)


def test_arrays_belong_to_the_caller(client: Client) -> None:
    client.embed(encoded(0))[0] = 1
    client.embed([encoded(0)])[0, 0] = 1
    client.features(encoded(0))["neck"][0] = 1


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.name)
def test_every_kind_of_image_gives_the_same_pixels(client: Client, path: Path) -> None:
    """Path, bytes, file and PIL image; the client decodes and scales the last."""
    expected = client.embed(path)
    np.testing.assert_array_equal(client.embed(str(path)), expected)
    np.testing.assert_array_equal(client.embed(path.read_bytes()), expected)
    np.testing.assert_array_equal(client.embed(memoryview(path.read_bytes())), expected)
    with path.open("rb") as file:
        np.testing.assert_array_equal(client.embed(file), expected)
    with Image.open(path) as image:
        np.testing.assert_array_equal(client.embed(image), expected)
        rgb = np.asarray(image.convert("RGB"))
        np.testing.assert_array_equal(client.embed(rgb), expected)
        np.testing.assert_array_equal(client.embed(rgb[::-1][::-1]), expected)


def test_a_mixed_list(client: Client, tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    file.write_bytes(encoded(3))
    kinds: list[ImageLike] = [
        file,
        str(file),
        encoded(3),
        io.BytesIO(encoded(3)),
        Image.open(file),
        pixels(3),
    ]
    rows = client.embed(kinds)
    for row in rows[1:]:
        np.testing.assert_array_equal(row, rows[0])


def test_a_bad_image_says_which_and_why(client: Client, tmp_path: Path) -> None:
    with pytest.raises(BadImage, match="image 0: ") as caught:
        client.embed(b"not an image")
    assert caught.value.task == "embed"
    assert caught.value.details
    missing = tmp_path / "missing.jpg"
    with pytest.raises(BadImage, match="no such file") as caught:
        client.classify(missing)
    assert caught.value.name == str(missing)


def test_bad_images_do_not_cost_their_neighbours_the_answers(
    client: Client, tmp_path: Path
) -> None:
    """Bad images among good ones, rejected by the server or by the client."""
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(encoded(0, "JPEG")[:300])
    images: list[ImageLike] = [encoded(seed) for seed in range(40)]
    images[2], images[17], images[18], images[39] = b"bad", broken, tmp_path / "missing", b""
    with pytest.raises(BadImages) as caught:
        client.embed(images)
    bad = caught.value
    assert [error.index for error in bad.errors] == [2, 17, 18, 39]
    assert [error.name for error in bad.errors] == [
        None,
        str(broken),
        str(tmp_path / "missing"),
        None,
    ]
    assert [index for index, result in enumerate(bad.results) if result is None] == [2, 17, 18, 39]
    np.testing.assert_allclose(bad.results[38], client.embed(images[38]), atol=1e-5)
    assert bad.message.endswith("(and 3 more of 40 images)")
    assert bad.index == 2


def test_only_bad_images(client: Client) -> None:
    with pytest.raises(BadImages) as caught:
        client.classify([b"bad"] * 20)
    assert len(caught.value.errors) == 20
    assert client.embed(encoded(0)).shape == (64,)


def test_top_k_is_checked(client: Client) -> None:
    with pytest.raises(ValueError, match="from 1 to 12"):
        client.classify(encoded(0), top_k=13)
    with pytest.raises(ValueError, match="from 1 to 12"):
        client.classify(encoded(0), top_k=0)


def test_the_model_is_described(client: Client) -> None:
    model = client.model()
    assert model.image_size == (64, 64)
    assert model.classes == 12
    assert model.embedding_size == 64
    assert model.feature_shape == (64, 4, 4)
    assert model.max_batch_size == 16
    assert model.precision == "fp32"
    assert int(model.version) > 1
    assert client.model() is model

"""Several results of one forward pass: their values and their cost."""

import asyncio
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from vit_client import Analysis, AsyncClient, BadImages, Client, ImageLike, Prediction, _engine

from .conftest import encoded, images_seen
from .proxy import Proxy

Array = npt.NDArray[np.float32]
IMAGES = [encoded(seed) for seed in range(3)]


class Everything(NamedTuple):
    neck: Array
    predictions: list[Prediction]
    embedding: Array
    probabilities: Array


@dataclass
class Card:
    """The results in birder's own model card."""

    probabilities: Array
    embedding: Array


def test_labels_and_vector(client: Client) -> None:
    predictions, embedding = client.analyze(IMAGES[0])
    assert predictions == client.classify(IMAGES[0])
    np.testing.assert_array_equal(embedding, client.embed(IMAGES[0]))
    assert client.analyze(IMAGES[0], top_k=2).predictions == predictions[:2]


def test_a_list_has_one_for_each(client: Client) -> None:
    answers = client.analyze(IMAGES, top_k=12)
    assert [type(answer) for answer in answers] == [Analysis] * 3
    for image, answer in zip(IMAGES, answers, strict=True):
        np.testing.assert_allclose(answer.embedding, client.embed(image), atol=1e-5, rtol=0)
        right = client.classify(image, top_k=12)
        assert [guess.label for guess in answer.predictions] == [guess.label for guess in right]
    assert client.analyze([]) == []


def test_all_answers_at_once(client: Client) -> None:
    answer = client.analyze(IMAGES[1], into=Everything, top_k=3)
    assert answer.predictions == client.classify(IMAGES[1], top_k=3)
    np.testing.assert_array_equal(answer.embedding, client.embed(IMAGES[1]))
    np.testing.assert_array_equal(answer.probabilities, client.probabilities(IMAGES[1]))
    np.testing.assert_array_equal(answer.neck, client.features(IMAGES[1])["neck"])


def test_what_was_not_asked_for_is_not_there(client: Client) -> None:
    cards = client.analyze(IMAGES, into=Card)
    assert [list(vars(card)) for card in cards] == [["probabilities", "embedding"]] * 3
    np.testing.assert_allclose(cards[2].probabilities, client.probabilities(IMAGES[2]), atol=1e-6)


def test_a_stream_and_an_async_client(url: str) -> None:
    async def asked() -> tuple[Analysis, list[Card]]:
        async with AsyncClient(url) as client:
            stream = client.stream(IMAGES, task="analyze", into=Card)
            return await client.analyze(IMAGES[0]), [item.result async for item in stream]

    one, cards = asyncio.run(asked())
    with Client(url) as client:
        items = list(client.stream([*IMAGES, b"bad"], task="analyze", top_k=1, on_error="return"))
    assert items[0].result.predictions == one.predictions[:1]
    assert [item.error is None for item in items] == [True, True, True, False]
    for item, card in zip(items, cards, strict=False):
        np.testing.assert_allclose(item.result.embedding, card.embedding, atol=1e-5, rtol=0)


def test_arrays_belong_to_the_caller(client: Client) -> None:
    client.analyze(IMAGES[0]).embedding[0] = 1
    client.analyze(IMAGES, into=Everything)[1].neck[0] = 1


def test_bad_images_do_not_cost_their_neighbours_the_answers(client: Client) -> None:
    images: list[ImageLike] = [encoded(seed) for seed in range(20)]
    images[3], images[19] = b"bad", b""
    with pytest.raises(BadImages) as caught:
        client.analyze(images)
    assert [(error.index, error.task) for error in caught.value.errors] == [
        (3, "analyze"),
        (19, "analyze"),
    ]
    assert caught.value.results[3] is None
    assert isinstance(caught.value.results[4], Analysis)


@pytest.mark.parametrize(
    ("into", "ensemble", "labels"),
    [(Analysis, "analyze", 3), (Card, "analyze", 0), (Everything, "everything", 3)],
)
def test_it_is_one_pass(
    client: Client, url: str, into: type[Any], ensemble: str, labels: int
) -> None:
    """By Triton's count of images; and no model runs, and no map is requested, needlessly."""
    models = ("preprocess", "vit", "postprocess", "analyze", "everything")

    def seen() -> Counter[str]:
        return Counter({model: images_seen(url, model) for model in models})

    before = seen()
    client.analyze(IMAGES, into=into)
    assert seen() - before == Counter(
        {"preprocess": 3, "vit": 3, "postprocess": labels, ensemble: 3}
    )


def test_a_request_has_as_many_images_as_their_answers_allow(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny model's answers: 64 bytes for each of 12 classes with labels, 48 of probabilities,
    256 of embedding, 4096 of map."""
    monkeypatch.setattr(_engine, "_MAX_ANSWER_BYTES", 2 * (768 + 48 + 256 + 4096))
    with Client(proxy.url) as client:
        client.analyze(IMAGES + IMAGES, into=Everything)
        assert proxy.inferences == 3
        client.analyze(IMAGES + IMAGES)
        assert proxy.inferences == 4


class Logits(NamedTuple):
    embedding: Array
    logits: Array


class Plain:
    embedding: Array


@pytest.mark.parametrize("into", [Logits, dict, object, Plain])
def test_other_fields_are_refused(client: Client, into: type[Any]) -> None:
    words = "predictions, probabilities, embedding, neck, or some of them; "
    with pytest.raises(ValueError, match=words + f"{into.__name__} has (embedding, logits|none)"):
        client.analyze(IMAGES[0], into=into)
    with pytest.raises(ValueError, match=words):
        client.stream(IMAGES, task="analyze", into=into)


def test_into_is_a_class(client: Client) -> None:
    with pytest.raises(ValueError, match=r"a NamedTuple or dataclass .* 'Card' has none"):
        client.analyze(IMAGES[0], into="Card")  # type: ignore[call-overload]


def test_arguments_that_do_not_fit_are_refused(client: Client) -> None:
    with pytest.raises(ValueError, match="into goes with the task 'analyze', not with 'embed'"):
        client.stream(IMAGES, into=Card)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="from 1 to 12"):
        client.analyze(IMAGES[0], top_k=13)
    assert client.analyze(IMAGES[0], into=Card, top_k=13)  # no predictions requested

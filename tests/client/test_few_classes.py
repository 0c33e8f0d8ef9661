"""A model with fewer classes than `top_k` asks for by default."""

from collections.abc import Iterator

import pytest
import vit_builder
from conftest import GOLDENS, PHOTOS, Server, serving
from vit_client import Client

from .test_cli import vit_client

PHOTO = PHOTOS / "coffee.jpg"


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("three") / "models"
    settings = vit_builder.Settings(precision="fp32", max_batch_size=4, top_k=3)
    vit_builder.build(vit_builder.load(GOLDENS / "tiny.pt"), settings, folder)
    with serving(folder) as server:
        yield server


def test_the_default_gives_all_of_them(three: Server) -> None:
    with Client(three.url) as client:
        guesses = client.classify(PHOTO)
        assert [guess.score for guess in guesses] == sorted(
            (guess.score for guess in guesses), reverse=True
        )
        assert len(guesses) == 3
        assert client.classify(PHOTO, top_k=2) == guesses[:2]
        assert client.analyze(PHOTO).predictions == guesses
        (item,) = client.stream([PHOTO], task="classify")
        assert item.result == guesses
        with pytest.raises(ValueError, match="from 1 to 3, not 6"):
            client.classify(PHOTO, top_k=6)


@pytest.mark.parametrize("verb", ["classify", "analyze"])
def test_on_the_command_line(three: Server, verb: str) -> None:
    ran = vit_client(three.url, verb, PHOTO)
    assert ran.returncode == 0
    assert ran.stdout.count("%") == 3

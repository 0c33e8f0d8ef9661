"""A client warns if the model was built by a version that may be incompatible."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import vit_builder
from conftest import PHOTOS, Server, copy, serving
from vit_client import Client, _wire

from .test_cli import vit_client

PHOTO = PHOTOS / "coffee.jpg"


@pytest.fixture(scope="module")
def newer_server(
    tiny_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server whose model seems to be built by a later vit-builder."""
    repository = copy(tiny_repository, tmp_path_factory.mktemp("newer"))
    config = repository / "vit" / "config.pbtxt"
    text = config.read_text()
    assert text.count(f'"{vit_builder.__version__}"') == 1
    config.write_text(text.replace(f'"{vit_builder.__version__}"', '"9.1.0"'))
    with serving(repository) as server:
        yield server


@pytest.mark.parametrize(
    ("builder", "client", "advice"),
    [
        ("0.1.0", "0.1.7", ""),
        ("0.1.0", "0.2.0", "rebuild the model, or install vit-client 0.1"),
        ("0.3.0", "0.2.1", "update vit-client"),
        ("1.9.0", "1.0.0", ""),
        ("2.0.0", "1.9.0", "update vit-client"),
        ("1.0.0", "2.0.0", "rebuild the model, or install vit-client 1"),
        ("0.9.0", "1.0.0", "rebuild the model, or install vit-client 0.9"),
        ("1.0.0rc1", "1.0.0", ""),
        ("", "1.0.0", ""),
        ("a fork", "1.0.0", ""),
    ],
)
def test_which_versions_fit(builder: str, client: str, advice: str) -> None:
    said = _wire.misfit(builder, client)
    assert advice in said
    assert bool(said) == bool(advice)


def test_a_newer_model_is_warned_of_once(
    newer_server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "vit_client"), Client(newer_server.url) as client:
        assert client.model().builder_version == "9.1.0"
        client.embed(PHOTO)
        client.model()
    (warning,) = caplog.messages
    assert warning.startswith("the server's model was built by vit-builder 9.1.0, and this is")


def test_the_command_warns_too(newer_server: Server) -> None:
    ran = vit_client(newer_server.url, "classify", PHOTO)
    assert ran.returncode == 0
    assert "vit-client: warning: the server's model was built by vit-builder 9.1.0" in ran.stderr
    ran = vit_client(newer_server.url, "health")
    assert "built by   vit-builder 9.1.0" in ran.stdout


def test_nothing_is_said_where_they_fit(url: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "vit_client"), Client(url) as client:
        assert client.model().builder_version == vit_builder.__version__
    assert not caplog.messages

"""Files that are too large for the server or a proxy in front of it."""

import io
import resource
import shutil
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from conftest import serving
from google.protobuf import text_format
from PIL import Image
from tritonclient.grpc import model_config_pb2
from vit_client import BadImage, BadImages, Client, InvalidRequest, _wire
from vit_client._engine import _FRAME_BYTES
from vit_client._images import Unusable, encode

from .conftest import encoded, pixels
from .http2 import http_status, peering
from .proxy import Proxy

MIB = 1 << 20


def sparse(path: Path, size: int) -> Path:
    """A sparse file of that size."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


def ppm(size: int) -> bytes:
    """An image file of that many bytes."""
    head = b"P6 1000 1 255\n"
    return head + bytes(size - len(head))


def narrowed(repository: Path, folder: Path, most: int) -> Path:
    """The same models, with a limit that the server reports."""
    copy = folder / "models"
    shutil.copytree(repository, copy)
    file = copy / "vit" / "config.pbtxt"
    config = text_format.Parse(file.read_text(), model_config_pb2.ModelConfig())
    config.parameters["max_request_bytes"].string_value = str(most)
    file.write_text(text_format.MessageToString(config))
    return copy


def test_the_server_tells_its_bound(tiny_repository: Path, tmp_path: Path) -> None:
    with (
        serving(narrowed(tiny_repository, tmp_path, 300_000)) as server,
        Client(server.url) as client,
    ):
        assert client.model().max_request_bytes == 300_000
        whole = ppm(300_000 - _FRAME_BYTES)
        assert client.embed(whole).shape == (64,)
        with pytest.raises(BadImage, match=r"is 299\.2 KiB, too large .*289\.0 KiB"):
            client.embed(ppm(306_400))
        # The client scales it.
        assert client.embed(pixels(0, 600, 600)).shape == (64,)
        assert client.embed(Image.fromarray(pixels(0, 600, 600))).shape == (64,)


@pytest.mark.parametrize(
    ("told", "bytes_"),
    [({}, 64 * MIB), ({"max_request_bytes": "12345678"}, 12345678)]
    + [({"max_request_bytes": text}, 64 * MIB) for text in ("", "0", "many", "-1")]
    + [({"max_request_bytes": str(2**40)}, 2**31 - 1)],
)
def test_the_bound_of_a_server_that_tells_none(
    client: Client, monkeypatch: pytest.MonkeyPatch, told: dict[str, str], bytes_: int
) -> None:
    right = _wire.model

    def model(config: Any, version: str) -> Any:
        changed = type(config)()
        changed.CopyFrom(config)
        changed.parameters.pop("max_request_bytes", None)
        for name, value in told.items():
            changed.parameters[name].string_value = value
        return right(changed, version)

    monkeypatch.setattr(_wire, "model", model)
    assert client.model().max_request_bytes == bytes_


def test_large_files_are_not_read(client: Client, tmp_path: Path) -> None:
    """gRPC cannot send 2 GiB or more; smaller ones would cost memory for the same error."""
    photo = tmp_path / "photo.png"
    photo.write_bytes(encoded(0))
    huge = sparse(tmp_path / "video.mp4", 2100 * MIB)
    large = sparse(tmp_path / "large.tiff", 1200 * MIB)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadImages) as caught:
        client.embed([photo, huge, photo, str(large), photo])
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * 1024 < 200 * MIB
    assert [error.name for error in caught.value.errors] == [str(huge), str(large)]
    assert [result is None for result in caught.value.results] == [False, True, False, True, False]
    assert str(caught.value.errors[0]).endswith(
        "video.mp4: is 2.1 GiB, too large (the server accepts 64.0 MiB per request): "
        "save it as JPEG, or pass a PIL image"
    )
    items = list(client.stream([photo, huge, photo], on_error="skip"))
    assert [item.index for item in items] == [0, 2]


class Endless(io.RawIOBase):
    given = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.given += len(buffer)
        return len(buffer)


def test_of_an_open_file_no_more_is_read_than_can_be_sent() -> None:
    file = Endless()
    with pytest.raises(Unusable, match=r"is too large \(the server accepts 1\.0 MiB"):
        encode(file, (64, 64), MIB)
    assert file.given == MIB + 1


def test_a_file_that_grows(tmp_path: Path) -> None:
    """stat() does not give the final size of a file being written, or of a pipe."""
    with pytest.raises(Unusable, match="is too large"):
        encode("/proc/self/maps", (64, 64), 100)
    data = Path("/proc/self/environ").read_bytes()
    assert encode("/proc/self/environ", (64, 64)) == data


@pytest.mark.parametrize("kind", ["bytes", "paths"])
def test_a_request_never_exceeds_the_bound(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    most = 3 * MIB
    monkeypatch.setattr(_wire, "_request_bytes", lambda text: most)
    sizes = [1, 2 * MIB, MIB, 1000, 3 * MIB - _FRAME_BYTES, 1, 5 * MIB, 2 * MIB, 2 * MIB]
    images: list[Any] = [ppm(max(size, 3100)) for size in sizes]
    if kind == "paths":
        for index, data in enumerate(images):
            images[index] = tmp_path / f"{index}.ppm"
            images[index].write_bytes(data)
    with Client(proxy.url) as client:
        items = list(client.stream(images, on_error="return"))
    assert [item.index for item in items if item.error] == [6]
    assert max(proxy.sizes) <= most
    assert proxy.inferences == 5
    rows = [item.result for item in items if not item.error]
    assert len(rows) == 8
    assert all(np.isfinite(row).all() for row in rows)


def test_what_something_on_the_way_finds_too_large_is_named(proxy: Proxy, tmp_path: Path) -> None:
    """A gateway with a lower limit. Small requests pass, so a long list needs more of them."""
    proxy.most = MIB
    large = tmp_path / "large.ppm"
    large.write_bytes(ppm(MIB))
    images = [ppm(200_000)] * 16
    with Client(proxy.url) as client:
        with pytest.raises(BadImage, match=r"large\.ppm: is 1\.0 MiB, too large .*larger than max"):
            client.embed(large)
        assert client.embed(images).shape == (16, 64)
        refused = proxy.inferences
        assert client.embed(images).shape == (16, 64)
        # The second time without rejections.
        assert proxy.inferences == refused + 4
        with pytest.raises(BadImages) as caught:
            client.embed([*images, large])
    assert [error.index for error in caught.value.errors] == [16]


def test_a_proxy_that_says_413_names_the_image(url: str, client: Client) -> None:
    with peering(url, http_status(413)) as peer, Client(peer.url) as behind:
        behind._bridge.client._engine.connection._models[""] = client.model()
        with pytest.raises(BadImage, match=r"image 0: is 12\.1 KiB, too large .*413"):
            behind.embed(encoded(0))


def test_an_answer_that_is_too_large_is_no_fault_of_the_image(url: str, client: Client) -> None:
    options = [("grpc.max_receive_message_length", 200)]
    with Client(url, channel_options=options) as narrow:
        narrow._bridge.client._engine.connection._models[""] = client.model()
        with pytest.raises(InvalidRequest, match="larger than max"):
            narrow.embed(encoded(0))


def test_words_alone_make_no_image_too_large(proxy: Proxy) -> None:
    proxy.refusals = [(grpc.StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max")]
    with Client(proxy.url) as client, pytest.raises(InvalidRequest) as caught:
        client.embed(encoded(0))
    assert not isinstance(caught.value, BadImage)

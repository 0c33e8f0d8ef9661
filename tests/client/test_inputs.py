"""What users pass as images, and how it is interpreted if it is unambiguous."""

import array
import base64
import contextlib
import io
import os
import pickle
import tarfile
import threading
import urllib.request
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import aiohttp
import httpx2
import numpy as np
import pyarrow
import pytest
import requests
import torch
import urllib3
from PIL import Image
from vit_client import AsyncClient, BadImage, Client
from vit_client._images import Unusable, encode, is_one_image, mistaken
from vit_client.errors import shortened

from .conftest import encoded, pixels

SIZE = (64, 64)
PHOTO = encoded(0)


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for index, path in enumerate(paths):
        path.write_bytes(encoded(index))
    return paths


class Column:
    """Like a column of a pandas table: it has the attributes of an array, but holds names."""

    def __init__(self, values: list[str]) -> None:
        self._values = np.array(values, object)
        self.shape, self.dtype = self._values.shape, self._values.dtype

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def zipped(name: str) -> zipfile.Path:
    """The photo as a path in an archive."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.write(name, "a.png")
    return zipfile.Path(file, "a.png")


@pytest.mark.parametrize(
    "collection",
    [
        lambda names: np.array(names, object),
        np.array,
        lambda names: np.array([encoded(index) for index in range(3)], object),
        Column,
        pyarrow.array,
        lambda names: pyarrow.chunked_array([names]),
        lambda names: [zipped(name) for name in names],
        lambda names: dict.fromkeys(names).keys(),
        lambda names: (name for name in names),
        lambda names: Path(names[0]).parent.glob("[0-2].png"),
        lambda names: map(str, names),
        lambda names: np.stack([pixels(index) for index in range(3)]).__iter__(),
    ],
    ids=[
        *(
            "objects",
            "texts",
            "files",
            "column",
            "pyarrow",
            "chunked",
            "zip",
            "keys",
            "generator",
            "glob",
            "map",
        ),
        "pixels",
    ],
)
def test_collections(client: Client, photos: list[Path], collection: Any) -> None:
    names = [str(path) for path in photos]
    images = collection(names)
    assert not is_one_image(images)
    if "glob" in type(images).__name__ or hasattr(images, "gi_code"):
        images = sorted(images)
    expected = client.embed([encoded(index) for index in range(3)])
    np.testing.assert_allclose(client.embed(images), expected, atol=1e-5)


def test_an_encoded_file_as_numbers() -> None:
    """OpenCV's imencode gives [N] or [N, 1], torchvision's encode_jpeg a tensor."""
    vector = np.frombuffer(PHOTO, np.uint8)
    for image in (vector, vector[:, None], vector[None], torch.tensor(vector)):
        assert is_one_image(image)
        assert encode(image, SIZE) == PHOTO


def test_tensors_of_pixels() -> None:
    array = pixels(0)
    assert is_one_image(torch.tensor(array))
    assert encode(torch.tensor(array), SIZE) == encode(array, SIZE)
    # As from torchvision's read_image, with the axes permuted.
    assert encode(torch.tensor(array.transpose(2, 0, 1)).permute(1, 2, 0), SIZE) == encode(
        array, SIZE
    )


def test_a_file_at_its_end_is_meant_whole(tmp_path: Path) -> None:
    written = io.BytesIO()
    Image.fromarray(pixels(0)).save(written, "PNG")
    assert encode(written, SIZE) == written.getvalue()
    assert encode(written, SIZE) == written.getvalue()
    path = tmp_path / "a.png"
    path.write_bytes(PHOTO)
    with path.open("rb") as file:
        file.read()
        assert encode(file, SIZE) == PHOTO
    with pytest.raises(Unusable, match="is empty"):
        encode(io.BytesIO(), SIZE)


def test_a_file_in_the_middle_is_read_from_there() -> None:
    """As in a file that holds several images."""
    file = io.BytesIO(b"header" + PHOTO)
    file.seek(6)
    assert encode(file, SIZE) == PHOTO


def test_files_that_give_little_at_once() -> None:
    class Slow(io.RawIOBase):
        def __init__(self) -> None:
            self.source = io.BytesIO(PHOTO)

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            return self.source.readinto(memoryview(buffer)[:1000])

    class NoSize:
        def read(self) -> bytes:
            return PHOTO

    class Views(io.BytesIO):
        def read(self, size: int | None = -1) -> Any:
            return memoryview(super().read(size))

    assert encode(Slow(), SIZE) == PHOTO
    assert encode(Views(PHOTO), SIZE) == PHOTO
    assert encode(NoSize(), SIZE) == PHOTO  # type: ignore[arg-type]


# -- files within others, and from the network -------------------------------------------------


def test_archives(tmp_path: Path, photos: list[Path]) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(photos[0], "0.png")
        assert "pass the bytes of each of its files" in mistaken(archive)
        assert is_one_image(archive)
    with zipfile.ZipFile(tmp_path / "a.zip") as archive, archive.open("0.png") as member:
        assert encode(member, SIZE) == PHOTO
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(photos[0], "0.png")
        assert "TarFile is an archive" in mistaken(tar)
        assert is_one_image(tar)
    with tarfile.open(tmp_path / "a.tar") as tar:
        inside: Any = tar.extractfile("0.png")
        assert encode(inside, SIZE) == PHOTO


@pytest.fixture
def web() -> Iterator[str]:
    """A web server with one photo."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(PHOTO)))
            self.end_headers()
            self.wfile.write(PHOTO)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def test_what_http_libraries_answer(web: str) -> None:
    with urllib.request.urlopen(web) as answer:
        assert encode(answer, SIZE) == PHOTO
    with urllib3.PoolManager() as pool:
        streamed: Any = pool.request("GET", web, preload_content=False)
        assert encode(streamed, SIZE) == PHOTO
        streamed.release_conn()
        read: Any = pool.request("GET", web)
        assert is_one_image(read)
        with pytest.raises(Unusable, match="has nothing left to read"):
            encode(read, SIZE)
    for library in (requests, httpx2):
        response = library.get(web)
        assert is_one_image(response)
        with pytest.raises(
            Unusable, match=r"Response is an HTTP response, not an image: pass its .con"
        ):
            encode(response, SIZE)  # type: ignore[arg-type]
        response.close()


async def _aiohttp(web: str, url: str) -> str:
    async with (
        aiohttp.ClientSession() as session,
        session.get(web) as response,
        AsyncClient(url) as client,
    ):
        with pytest.raises(BadImage) as caught:
            await client.embed(response)  # type: ignore[arg-type]
        return str(caught.value)


def test_an_answer_that_is_read_asynchronously(web: str, url: str) -> None:
    import asyncio

    assert "async: pass await file.read()" in asyncio.run(_aiohttp(web, url))


# -- errors ------------------------------------------------------------------------------------


class Table:
    iloc = columns = ()


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ({"a": b"x"}, "pass list(images.values())"),
        (Table(), "pass its column of paths"),
        (list(PHOTO), "pass bytes(…) of it"),
        (array.array("B", PHOTO), "pass bytes(…) of it"),
        ((True, np.frombuffer(PHOTO, np.uint8)), "pass [1] of what OpenCV's imencode gives"),
    ],
)
def test_mistakes_are_told_by_every_method(client: Client, images: Any, words: str) -> None:
    with pytest.raises(BadImage) as caught:
        client.embed(images)
    assert words in str(caught.value)
    with pytest.raises(TypeError) as refused:
        client.stream(images)
    assert words in str(refused.value)


def test_mistaken_names(client: Client) -> None:
    for image, words in (
        (base64.b64encode(PHOTO).decode(), "is it base64? Decode it"),
        ("", "an empty name"),
        (np.zeros((8, 8, 4), np.uint8), "leave out the alpha"),
    ):
        with pytest.raises(BadImage) as caught:
            client.embed(image)
        assert words in str(caught.value)


def test_what_anything_raises_is_its_own_fault_only(client: Client) -> None:
    class Broken:
        def read(self, size: int = -1) -> bytes:
            raise LookupError("row 7")

    with pytest.raises(BadImage, match="image 0: cannot be read: row 7"):
        client.embed(Broken())  # type: ignore[arg-type]


def test_long_names_are_shortened(client: Client) -> None:
    name = "/folder/" + "x" * 3000 + "/photo.jpg"
    with pytest.raises(BadImage) as caught:
        client.embed(name)
    text = str(caught.value)
    assert len(text) < 260
    assert text.startswith("/folder/xxx")
    assert "…" in text
    assert "/photo.jpg: " in text
    assert caught.value.name == name
    assert str(pickle.loads(pickle.dumps(caught.value))) == text
    assert shortened("a.jpg") == "a.jpg"
    assert shortened("Größe 1.jpg") == "Größe 1.jpg"
    assert shortened("a\nb\x1b[1m\udc80") == "a\\nb\\x1b[1m\\udc80"


def test_paths_as_bytes(tmp_path: Path) -> None:
    """From os.scandir(b"…"): a path-like object with a bytes path."""
    (tmp_path / "a.png").write_bytes(PHOTO)
    with contextlib.closing(os.scandir(os.fsencode(tmp_path))) as entries:
        (entry,) = entries
    assert encode(entry, SIZE) == PHOTO  # type: ignore[arg-type]

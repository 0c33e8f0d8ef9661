"""Model versions: two models behind one name, as during a rolling update."""

import asyncio
import dataclasses
import io
import json
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import vit_builder
from conftest import GOLDENS, Server, built, serving
from tritonclient.grpc import InferenceServerClient, InferInput
from vit_client import AsyncClient, BadImages, Client, ModelChanged

from .conftest import encoded, pixels
from .proxy import Proxy
from .test_cli import vit_client

IMAGES = [encoded(seed) for seed in range(40)]


@pytest.fixture(scope="module")
def other_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The tiny model with different weights."""
    tiny = vit_builder.load(GOLDENS / "tiny.pt")
    name = "norm.weight"
    state = {**tiny.state, name: tiny.state[name] * 3}
    folder = tmp_path_factory.mktemp("other") / "models"
    settings = vit_builder.Settings(precision="fp32", max_batch_size=16, top_k=12)
    vit_builder.build(dataclasses.replace(tiny, state=state), settings, folder)
    with serving(folder) as server:
        yield server


@pytest.fixture(scope="module")
def large_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A model with images twice as large and a smaller batch size."""
    config = dataclasses.replace(
        vit_builder.load(GOLDENS / "tiny.pt").config, image_size=(128, 128)
    )
    folder = tmp_path_factory.mktemp("large") / "models"
    settings = vit_builder.Settings(precision="fp32", max_batch_size=4, top_k=12)
    vit_builder.build(vit_builder.random(config), settings, folder)
    with serving(folder) as server:
        yield server


@pytest.fixture
def urls(tiny_server: Server, other_server: Server) -> list[str]:
    return [tiny_server.url, other_server.url]


def version(server: Server) -> str:
    return built(server.repository, "vit").name


def embeddings(url: str) -> np.ndarray:
    with Client(url) as client:
        return client.embed(IMAGES)


def test_every_client_sees_the_same_number(tiny_server: Server) -> None:
    with Client(tiny_server.url) as client:
        assert client.model().version == version(tiny_server)
        (item,) = client.stream(IMAGES[:1])
        assert item.model_version == version(tiny_server)
    with InferenceServerClient(tiny_server.url) as triton:
        tensor = InferInput("image", [1, 1], "BYTES")
        tensor.set_data_from_numpy(np.array([[IMAGES[0]]], np.object_))
        answer = triton.infer("embed", [tensor], request_id="mine")
        assert answer.get_response().model_version == version(tiny_server)
        assert answer.get_response().id == "mine"
    curl = subprocess.run(
        [
            *("curl", "--silent", "--fail", "--data-binary", "@-"),
            *("-H", "Inference-Header-Content-Length: 0"),
            f"{tiny_server.http_url}/v2/models/classify/infer",
        ],
        input=IMAGES[0],
        capture_output=True,
        check=True,
    )
    assert f'"model_version":"{version(tiny_server)}"'.encode() in curl.stdout
    with urllib.request.urlopen(tiny_server.metrics_url, timeout=30) as metrics:
        assert f'model="vit",version="{version(tiny_server)}"'.encode() in metrics.read()


def replacing(proxy: Proxy, new: list[str], after: int) -> Iterator[bytes]:
    """Yields the images; after `after` of them the proxy switches to the servers `new`."""
    for number, image in enumerate(IMAGES):
        if number == after:
            while not proxy.inferences:  # images read before go to the old server
                threading.Event().wait(0.01)
            proxy.targets = new
        yield image


def test_a_list_is_of_one_model(proxy: Proxy, urls: list[str], other_server: Server) -> None:
    """The old server is gone before the second half is sent."""
    with Client(proxy.url) as client:
        old = client.model()
        got = client.embed(replacing(proxy, urls[1:], 20))
        assert client.model().version == version(other_server) != old.version
    np.testing.assert_allclose(got, embeddings(urls[1]), atol=1e-5)
    assert np.abs(got - embeddings(urls[0])).max() > 0.1


def test_a_list_while_both_answer(proxy: Proxy, urls: list[str]) -> None:
    proxy.targets = urls
    both = [embeddings(url) for url in urls]
    with Client(proxy.url) as client:
        for _ in range(5):
            got = client.embed(IMAGES)
            assert min(np.abs(got - one).max() for one in both) < 1e-5


def test_bad_images_in_a_list_while_both_answer(proxy: Proxy, urls: list[str]) -> None:
    proxy.targets = urls
    images = [*IMAGES[:20], b"bad", *IMAGES[20:], b"worse"]
    both = [embeddings(url) for url in urls]
    with Client(proxy.url) as client, pytest.raises(BadImages) as caught:
        client.embed(images)
    bad = caught.value
    assert [error.index for error in bad.errors] == [20, 41]
    got = np.stack([result for result in bad.results if result is not None])
    assert min(np.abs(got - one).max() for one in both) < 1e-5


def test_two_that_go_on_answering_are_an_error(proxy: Proxy, urls: list[str]) -> None:
    """Each time that one version is requested, only the other is served."""

    async def contrary(method: str, request: bytes, context: object) -> object:
        others = [url for url, number in zip(urls, versions, strict=True) if number not in request]
        proxy.targets = [others[proxy.inferences % len(others)]]
        return await handle(method, request, context)

    versions = []
    for url in urls:
        with Client(url) as client:
            versions.append(client.model().version.encode())
    handle = proxy.handle
    proxy.handle = contrary  # type: ignore[method-assign, assignment]
    with Client(proxy.url, timeout=3) as client, pytest.raises(ModelChanged) as caught:
        client.embed(IMAGES)
    assert "answers with several models" in str(caught.value)
    assert all(number.decode() in str(caught.value) for number in versions)
    assert caught.value.task == "embed"
    assert caught.value.request_id


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_stream_tells_the_model_of_each(
    proxy: Proxy, urls: list[str], asynchronous: bool
) -> None:
    async def collect() -> list[tuple[str, np.ndarray]]:
        async with AsyncClient(proxy.url) as client:
            stream = client.stream(replacing(proxy, urls[1:], 20))
            return [(item.model_version, item.result) async for item in stream]

    if asynchronous:
        items = asyncio.run(collect())
    else:
        with Client(proxy.url) as client:
            stream = client.stream(replacing(proxy, urls[1:], 20))
            items = [(item.model_version, item.result) for item in stream]
    expected = {}
    for url in urls:
        with Client(url) as client:
            expected[client.model().version] = client.embed(IMAGES)
    assert {number for number, _ in items} == expected.keys()
    for row, (number, got) in enumerate(items):
        np.testing.assert_allclose(got, expected[number][row], atol=1e-5)


def test_a_stream_of_one_model_only(proxy: Proxy, urls: list[str], tiny_server: Server) -> None:
    with Client(proxy.url) as client:
        first = client.model().version
        proxy.targets = urls
        items = list(client.stream(IMAGES, model_version=first))  # of two servers
        assert {item.model_version for item in items} == {first}
        proxy.targets = urls[1:]
        with pytest.raises(ModelChanged, match="another model") as caught:
            list(client.stream(IMAGES, model_version=first, request_id="mine"))
        assert caught.value.request_id.startswith("mine")
        for wrong in ("latest", "", "0", 12345, "9" * 19):
            with pytest.raises(ValueError, match="model_version must be a number as text"):
                client.stream(IMAGES, model_version=wrong)  # type: ignore[call-overload]
    assert first == version(tiny_server)


def test_open_files_while_both_answer(proxy: Proxy, urls: list[str]) -> None:
    """Images that are sent again are not read again; the files here are read from the middle."""
    proxy.targets = urls

    def opened(number: int) -> io.BytesIO:
        file = io.BytesIO(b"something else" + IMAGES[number])
        file.seek(len(b"something else"))
        return file

    both = [embeddings(url) for url in urls]
    with Client(proxy.url) as client:
        for _ in range(5):
            got = client.embed([opened(number) for number in range(40)])
            assert min(np.abs(got - one).max() for one in both) < 1e-5


def test_arrays_are_scaled_for_the_model_that_answers(
    proxy: Proxy, tiny_server: Server, large_server: Server
) -> None:
    """Whichever model responds, and also after one has replaced the other."""
    arrays = [pixels(seed, 300, 200) for seed in range(12)]
    expected = {}
    for server in (tiny_server, large_server):
        with Client(server.url) as client:
            expected[version(server)] = client.embed(arrays)
    urls = [tiny_server.url, large_server.url]
    with Client(proxy.url) as client:
        for targets in (urls[:1], urls[1:], urls, urls[:1]):
            proxy.targets = targets
            for row, array in enumerate(arrays[:4]):
                got = client.embed(array)
                np.testing.assert_allclose(got, expected[client.model().version][row], atol=1e-5)
            got = client.embed(arrays)
            assert min(np.abs(got - one).max() for one in expected.values()) < 1e-5
            for item in client.stream(arrays):
                right = expected[item.model_version][item.index]
                np.testing.assert_allclose(item.result, right, atol=1e-5)
        proxy.targets = urls
        for number, right in expected.items():
            for item in client.stream(arrays, model_version=number):
                np.testing.assert_allclose(item.result, right[item.index], atol=1e-5)


def test_smaller_batches_than_the_server_told(
    proxy: Proxy, tiny_server: Server, large_server: Server
) -> None:
    with Client(proxy.url) as client:
        client.model()
        proxy.targets = [large_server.url]  # before the first response
        got = client.embed(IMAGES)
        assert client.model().max_batch_size == 4
    with Client(large_server.url) as client:
        np.testing.assert_allclose(got, client.embed(IMAGES), atol=1e-5)


def test_the_model_is_the_one_that_answered(proxy: Proxy, urls: list[str]) -> None:
    proxy.targets = urls
    expected = {}
    for url in urls:
        with Client(url) as client:
            expected[client.model().version] = client.embed(IMAGES[0])
    for _ in range(10):
        with Client(proxy.url) as client:
            got = client.embed(IMAGES[0])
            np.testing.assert_allclose(got, expected[client.model().version], atol=1e-5)
            for number in expected:
                assert client.model(model_version=number).version == number
            with pytest.raises(ModelChanged):
                client.model(model_version="12345")


@pytest.mark.parametrize("command", ["embed", "classify", "analyze"])
def test_what_is_printed_is_of_one_model(
    proxy: Proxy, urls: list[str], photos: Path, command: str
) -> None:
    proxy.targets = urls
    for number in range(60):  # several requests
        (photos / f"more-{number}.png").write_bytes(encoded(0))
    for _ in range(2):
        ran = vit_client(proxy.url, command, photos, "--json")
        assert ran.returncode == 0, ran.stderr
        lines = [json.loads(line) for line in ran.stdout.splitlines()]
        assert len({line["model_version"] for line in lines}) == 1
        same = [line for line in lines if Path(line["image"]).name.startswith("more-")]
        if command == "classify":
            numbers = [[guess["score"] for guess in line["predictions"]] for line in same]
        else:
            numbers = [line["embedding"] for line in same]
        assert np.ptp(np.array(numbers), axis=0).max() < 1e-5


def test_a_client_learns_of_the_new_model(proxy: Proxy, urls: list[str]) -> None:
    with Client(proxy.url) as client:
        old = client.model()
        proxy.targets = urls[1:]
        client.embed(IMAGES[0])
        new = client.model()
        proxy.targets = urls[:1]
        client.embed(IMAGES[0])
        assert client.model() == old != new
        # Known models are not requested again.
        assert proxy.calls.count("ModelConfig") == 2


def test_embed_to_a_file_is_of_one_model(
    proxy: Proxy, urls: list[str], photos: Path, tmp_path: Path
) -> None:
    """A new server replaces the old one midway; the same command is rejected; then it restarts."""
    output, partial = tmp_path / "out.npz", tmp_path / "out.npz.partial"
    command = ["embed", photos, "-o", output]
    for number in range(20):  # several requests
        for copy in range(4):
            (photos / f"{number:02}-{copy}.png").write_bytes(encoded(100 * copy + number))
    handle, versions = proxy.handle, []
    for url in urls:
        with Client(url) as client:
            versions.append(client.model().version)

    async def handle_and_replace(method: str, request: bytes, context: object) -> object:
        if proxy.inferences == 3:
            proxy.targets = urls[1:]
        return await handle(method, request, context)

    proxy.handle = handle_and_replace  # type: ignore[method-assign, assignment]
    ran = vit_client(proxy.url, *command)
    assert ran.returncode == 4, ran.stderr
    assert f"{proxy.url} now serves another model than the requested one" in ran.stderr
    assert f"{partial} keeps the results so far: delete it to start over" in ran.stderr
    assert partial.exists()
    assert not output.exists()

    ran = vit_client(urls[1], *command)
    assert ran.returncode == 2
    assert "images by another model than this server's: delete it to start over" in ran.stderr
    assert all(number in ran.stderr for number in versions)

    # A server with the first model can resume, even if another model has the same address.
    proxy.handle, proxy.targets = handle, urls  # type: ignore[method-assign]
    ran = vit_client(proxy.url, *command)
    assert "resuming" in ran.stderr
    assert ran.returncode == 0
    images = sorted(photos.iterdir())
    with np.load(output) as arrays, Client(urls[0]) as client:
        assert json.loads(str(arrays["model"]))["model_version"] == versions[0]
        np.testing.assert_allclose(arrays["embeddings"], client.embed(images), atol=1e-5)

    ran = vit_client(urls[1], "similar", images[0], "--to", output)
    assert ran.returncode == 2
    assert "is from another model than the server's" in ran.stderr
    ran = vit_client(proxy.url, "similar", images[0], "--to", output, "-n", "1")
    assert ran.stdout == f" 1.0000  {images[0]}\n"  # the query went to the model of the file

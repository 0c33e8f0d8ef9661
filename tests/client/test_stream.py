"""Streams: order, bounds, slow sources, errors, leaving early."""

import asyncio
import gc
import itertools
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from vit_client import (
    AsyncClient,
    BadImage,
    Client,
    ClientClosed,
    ConfigurationError,
    Unavailable,
)

from .conftest import encoded
from .proxy import Proxy

IMAGES = [encoded(seed) for seed in range(50)]


def test_items_come_in_order_and_know_their_image(client: Client) -> None:
    items = list(client.stream(iter(IMAGES), task="embed"))
    assert [item.index for item in items] == list(range(50))
    assert all(item.image is image for item, image in zip(items, IMAGES, strict=True))
    np.testing.assert_allclose(
        np.stack([item.result for item in items]), client.embed(IMAGES), atol=1e-5
    )


@pytest.mark.parametrize("task", ["classify", "probabilities", "embed", "features"])
def test_a_result_is_what_the_method_returns(client: Client, task: str) -> None:
    (item,) = client.stream([IMAGES[0]], task=task)  # type: ignore[call-overload]
    alone = getattr(client, task)(IMAGES[0])
    if task == "classify":
        assert item.result == alone
    elif task == "features":
        np.testing.assert_array_equal(item.result["neck"], alone["neck"])
    else:
        np.testing.assert_array_equal(item.result, alone)


def test_results_do_not_keep_their_neighbours_alive(client: Client) -> None:
    item = next(client.stream(IMAGES, task="features"))
    assert item.result["neck"].base is None
    assert item.result["neck"].flags.writeable


def test_async_iterables(url: str) -> None:
    async def source() -> AsyncIterator[bytes]:
        for image in IMAGES:
            await asyncio.sleep(0)
            yield image

    async def run() -> list[int]:
        async with AsyncClient(url) as client:
            return [item.index async for item in client.stream(source())]

    assert asyncio.run(run()) == list(range(50))


def test_memory_and_requests_are_bounded(proxy: Proxy) -> None:
    """Endless input; reading stays only a little ahead of the consumer."""
    taken = read = furthest = 0

    def source() -> Iterator[bytes]:
        nonlocal read, furthest
        for image in itertools.cycle(IMAGES):
            read += 1
            furthest = max(furthest, read - taken)
            yield image

    with Client(proxy.url, concurrency=3) as client:
        stream = client.stream(source())
        for _ in itertools.islice(stream, 500):
            taken += 1
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        for _ in itertools.islice(stream, 1500):
            taken += 1
        after, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        stream.close()
    assert proxy.most_in_flight <= 3
    assert furthest <= 3 * 16 + 2 * 16 + 1  # in flight, being taken, read ahead
    assert after - before < 5_000_000


def test_the_bound_holds_over_all_calls_of_a_client(proxy: Proxy) -> None:
    proxy.delay = 0.02
    with Client(proxy.url, concurrency=4) as client:
        threads = [threading.Thread(target=client.embed, args=(IMAGES,)) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert proxy.most_in_flight == 4


def test_a_slow_source_is_not_held_up(client: Client) -> None:
    """An image is sent when it arrives, not when a chunk is full."""
    asked = threading.Event()

    def source() -> Iterator[bytes]:
        yield IMAGES[0]
        yield IMAGES[1]
        assert asked.wait(20), "the first two were not answered before the third came"
        yield IMAGES[2]

    stream = client.stream(source())
    assert next(stream).index == 0
    assert next(stream).index == 1
    asked.set()
    assert [item.index for item in stream] == [2]


def test_a_source_that_fails(client: Client) -> None:
    """Earlier images still get results; then the source's own error is raised."""

    def source() -> Iterator[bytes]:
        yield from IMAGES[:20]
        raise LookupError("no more photos")

    stream = client.stream(source())
    assert len(list(itertools.islice(stream, 20))) == 20
    with pytest.raises(LookupError, match="no more photos"):
        next(stream)


MIXED = [*IMAGES[:18], b"bad", *IMAGES[18:20]]


def test_on_error_raise(client: Client) -> None:
    stream = client.stream(MIXED)
    assert [item.index for item in itertools.islice(stream, 18)] == list(range(18))
    with pytest.raises(BadImage) as caught:
        next(stream)
    assert caught.value.index == 18


def test_on_error_return(client: Client) -> None:
    items = list(client.stream(MIXED, on_error="return"))
    assert [item.index for item in items if item.error] == [18]
    assert items[18].image == b"bad"
    with pytest.raises(BadImage):
        _ = items[18].result


def test_on_error_skip(client: Client) -> None:
    items = list(client.stream(MIXED, on_error="skip"))
    assert [item.index for item in items] == [*range(18), 19, 20]


def test_only_images_can_be_skipped(url: str) -> None:
    """A lost server must not skip a million images."""
    with Client("localhost:1", retries=0) as client, pytest.raises(Unavailable):
        list(client.stream(IMAGES, on_error="skip"))


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def threads() -> set[str]:
    """Names of all threads except the idle ones that load images."""
    names = {thread.name for thread in threading.enumerate()}
    return {name for name in names if not name.startswith("vit-load")}


@pytest.mark.parametrize("kind", ["iterable", "list"])
def test_leaving_early_cancels_and_leaks_nothing(proxy: Proxy, kind: str) -> None:
    closed = threading.Event()

    def source() -> Iterator[bytes]:
        try:
            yield from itertools.cycle(IMAGES)
        finally:
            closed.set()

    with Client(proxy.url) as client:
        client.embed(IMAGES[0])
        before = threads()
        stream = client.stream(source() if kind == "iterable" else IMAGES * 100)
        next(stream)
        proxy.delay = 30
        while not proxy.held:  # more is sent as results are taken
            next(stream)
            time.sleep(0.05)  # for it to arrive: the next result may be a delayed one
        stream.close()
        if kind == "iterable":
            assert closed.wait(5)
        eventually(lambda: not proxy.in_flight)
        assert proxy.cancelled
        eventually(lambda: threads() <= before)
        proxy.delay = 0
        assert client.embed(IMAGES[0]).shape == (64,)


def test_a_forgotten_stream_is_closed_too(proxy: Proxy) -> None:
    with Client(proxy.url) as client:
        stream = client.stream(IMAGES * 100)
        next(stream)
        proxy.delay = 30
        del stream
        gc.collect()
        eventually(lambda: not proxy.in_flight)


def test_leaving_an_async_stream_early(proxy: Proxy) -> None:
    async def run() -> set[str]:
        async with AsyncClient(proxy.url) as client:
            await client.embed(IMAGES[0])
            stream = client.stream(IMAGES * 100)
            await anext(stream)
            proxy.delay = 30
            await stream.aclose()
            return {task.get_name() for task in asyncio.all_tasks() - {asyncio.current_task()}}

    assert asyncio.run(run()) == set()


def test_closing_the_client_ends_a_stream_that_waits_for_images(url: str) -> None:
    async def source() -> AsyncIterator[bytes]:
        yield IMAGES[0]
        await asyncio.sleep(30)

    async def run() -> None:
        client = AsyncClient(url)
        stream = client.stream(source())
        await anext(stream)
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.1)
        await client.close()
        with pytest.raises(ClientClosed):
            await waiting

    asyncio.run(run())


def test_progress_counts(client: Client) -> None:
    told: list[int] = []
    list(client.stream(IMAGES, progress=told.append))
    assert told[-1] == 50
    assert told == sorted(told)


def test_a_progress_bar(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    list(client.stream(IMAGES, progress=True))
    assert "50/50" in capsys.readouterr().err


def test_a_progress_bar_without_tqdm(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
    with pytest.raises(ConfigurationError, match="vit-client\\[progress\\]"):
        list(client.stream(IMAGES, progress=True))


def test_arguments_are_checked_at_once(client: Client) -> None:
    with pytest.raises(ValueError, match="task must be one of classify"):
        client.stream(IMAGES, task="detect")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="on_error must be one of"):
        client.stream(IMAGES, on_error="ignore")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="not one str"):
        client.stream("photos")


def test_big_files_are_sent_in_several_requests(proxy: Proxy, tmp_path: Path) -> None:
    """The bytes of a request are bounded, however many images it may have."""
    big = tmp_path / "big.ppm"
    big.write_bytes(b"P6 2000 2000 255\n" + bytes(12_000_000))
    with Client(proxy.url) as client:
        assert client.embed([big] * 8).shape == (8, 64)
    assert proxy.inferences == 4  # 3 × 12 MB would be more than 32 MiB

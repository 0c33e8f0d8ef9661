"""Images that never arrive: pipes without a writer stand for dead mounts."""

import asyncio
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vit_client import AsyncClient, BadImage, BadImages, Client, ClientClosed

from .conftest import encoded
from .proxy import Proxy


@pytest.fixture
def pipes(tmp_path: Path) -> Iterator[list[Path]]:
    """Named pipes, closed at the end, so that no test leaves threads behind."""
    made = [tmp_path / f"pipe-{index}" for index in range(20)]
    for path in made:
        os.mkfifo(path)
    yield made
    deadline = time.monotonic() + 60
    while sum(was_read(path) for path in made):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def was_read(path: Path) -> bool:
    """Whether the pipe has a blocked reader; releases it with an empty file."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    except OSError:
        return False
    return True


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    path.write_bytes(encoded(0))
    return path


def test_reading_belongs_to_the_deadline(client: Client, pipes: list[Path]) -> None:
    started = time.monotonic()
    with pytest.raises(BadImage, match="pipe-0: could not be read within 1 s") as caught:
        client.embed(pipes[0], timeout=1)
    assert caught.value.name == str(pipes[0])
    assert time.monotonic() - started >= 0.9


def test_neighbours_are_answered(client: Client, pipes: list[Path], photo: Path) -> None:
    images = [photo, pipes[0], encoded(0), *pipes[1:17], photo, photo]
    with pytest.raises(BadImages) as caught:
        client.embed(images, timeout=5)
    assert [error.index for error in caught.value.errors] == [1, *range(3, 19)]
    assert all("could not be read within 5 s" in str(error) for error in caught.value.errors)
    expected = client.embed(encoded(0))
    for index in (0, 2, 19, 20):
        np.testing.assert_array_equal(caught.value.results[index], expected)
    items = list(client.stream([pipes[17], photo], timeout=1, on_error="skip"))
    assert [item.index for item in items] == [1]


def test_hanging_reads_stop_no_others(client: Client, pipes: list[Path], photo: Path) -> None:
    """As many as there are concurrent reads."""
    with ThreadPoolExecutor(16) as pool:
        hanging = [pool.submit(client.embed, pipe, timeout=20) for pipe in pipes[:16]]
        assert client.embed(photo, timeout=10).shape == (64,)
        assert not any(call.done() for call in hanging)
        for pipe in pipes[:16]:
            pipe.write_bytes(encoded(0))
        for call in hanging:
            np.testing.assert_array_equal(call.result(), client.embed(photo))


def test_an_image_that_comes_late_is_answered(proxy: Proxy, pipes: list[Path], photo: Path) -> None:
    """The other images do not wait for it."""
    with Client(proxy.url) as client, ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.embed, [pipes[0], photo, pipes[1], photo])
        deadline = time.monotonic() + 20
        while proxy.inferences < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        pipes[1].write_bytes(encoded(2))
        pipes[0].write_bytes(encoded(1))
        rows = call.result()
        np.testing.assert_allclose(
            rows, client.embed([encoded(1), photo, encoded(2), photo]), atol=1e-5
        )
        assert client.embed([encoded(0)] * 3).shape == (3, 64)


def test_reading_does_not_use_up_the_time_of_a_request(client: Client) -> None:
    """Slow files: those read within half of the timeout are sent together."""

    class Slow:
        def read(self) -> bytes:
            time.sleep(0.6)
            return encoded(0)

    assert client.embed([Slow() for _ in range(16)], timeout=8).shape == (16, 64)  # type: ignore[misc]


def test_more_files_hang_than_there_are_threads(
    client: Client, pipes: list[Path], photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other calls wait for a free thread, then complete."""
    monkeypatch.setattr("vit_client._engine._MOST_THREADS", 4)
    with ThreadPoolExecutor(5) as pool:
        hanging = [pool.submit(client.embed, pipe, timeout=100) for pipe in pipes[:4]]
        while len(client._bridge.client._engine._readings) < 4:
            time.sleep(0.01)
        with pytest.raises(BadImage, match="could not be read within 1 s"):
            client.embed(photo, timeout=1)
        assert client.embed(encoded(0)).shape == (64,)  # already in memory
        waiting = pool.submit(client.embed, photo, timeout=100)
        for pipe in pipes[:4]:
            pipe.write_bytes(encoded(0))
        for call in (waiting, *hanging):
            assert call.result().shape == (64,)


def test_files_that_hang(client: Client) -> None:
    """Anything with a read(), or that converts to an array, may hang."""
    going_on = threading.Event()

    class Slow:
        name = "slow"

        def read(self, size: int = -1) -> bytes:
            going_on.wait(60)
            return b""

    with pytest.raises(BadImages) as caught:
        client.embed([Slow(), encoded(0)], timeout=1)  # type: ignore[list-item]
    going_on.set()
    assert str(caught.value.errors[0]) == "slow: could not be read within 1 s"
    assert len(caught.value.errors) == 1


def test_closing_does_not_wait(url: str, pipes: list[Path]) -> None:
    client = Client(url)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.embed, pipes[0])
        while not client._bridge.client._engine._readings:
            time.sleep(0.01)
        client.close()
        assert isinstance(call.exception(timeout=20), ClientClosed)


def test_closing_an_async_client_does_not_wait(url: str, pipes: list[Path]) -> None:
    async def run() -> None:
        client = AsyncClient(url)
        call = asyncio.ensure_future(client.embed(pipes[0]))
        stream = client.stream([pipes[1]] * 3)
        following = asyncio.ensure_future(anext(stream))
        while len(client._engine._readings) < 2:
            await asyncio.sleep(0.01)
        await client.close()
        for waiting in (call, following):
            with pytest.raises(ClientClosed):
                await asyncio.wait_for(waiting, 20)

    asyncio.run(run())


def loaders() -> int:
    return sum(thread.name == "vit-load" for thread in threading.enumerate())


@pytest.mark.parametrize("closed", [True, False])
def test_threads_end_with_their_client(url: str, photo: Path, closed: bool) -> None:
    def ends(count: int) -> None:
        deadline = time.monotonic() + 60
        while loaders() > count:
            gc.collect()
            assert time.monotonic() < deadline
            time.sleep(0.01)

    async def run() -> None:
        client = AsyncClient(url)
        for _ in range(3):
            await client.embed(photo)
        assert loaders() > before
        await client._engine.connection.close()
        if closed:
            await client.close()

    ends(0)
    before = loaders()
    asyncio.run(run())
    ends(before)


def script(code: str, *arguments: Any) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("closed", [True, False])
def test_the_interpreter_ends(url: str, pipes: list[Path], closed: bool) -> None:
    code = """
        import sys
        from vit_client import Client
        client = Client(sys.argv[1])
        try:
            client.embed(sys.argv[2], timeout=1)
        except Exception as error:
            print(error)
        if sys.argv[3] == "True":
            client.close()
    """
    process = script(code, url, pipes[0], closed)
    out, err = process.communicate(timeout=60)
    assert "could not be read within 1 s" in out
    assert err == ""
    assert process.returncode == 0


def test_ctrl_c_ends_a_read(url: str, pipes: list[Path]) -> None:
    code = """
        import sys
        from vit_client import Client
        with Client(sys.argv[1]) as client:
            client.model()
            print("reading", flush=True)
            client.embed(sys.argv[2:])
    """
    process = script(code, url, *pipes[:3])
    assert process.stdout is not None
    assert process.stdout.readline() == "reading\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert err.endswith("KeyboardInterrupt\n")

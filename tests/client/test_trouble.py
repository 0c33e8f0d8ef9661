"""Deadlines, retries, overload, server restarts, and misuse of a client."""

import asyncio
import multiprocessing
import os
import shutil
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

import grpc
import numpy as np
import pytest
from conftest import built, serving
from processes import tritonserver
from vit_client import (
    AsyncClient,
    BadImage,
    Client,
    ClientClosed,
    DeadlineExceeded,
    InvalidRequest,
    ModelNotServed,
    Overloaded,
    ServerError,
    Unavailable,
    VitClientError,
    _wire,
)
from vit_client._retry import RetryBudget, backoff

from .conftest import encoded
from .proxy import Proxy

IMAGE = encoded(0)
GONE = (grpc.StatusCode.UNAVAILABLE, "Socket closed")
FULL = (grpc.StatusCode.UNAVAILABLE, "in ensemble 'embed', Exceeds maximum queue size")
STOPPING = (
    grpc.StatusCode.NOT_FOUND,
    "Request for unknown model: 'embed' has no available versions",
)
DIED = (grpc.StatusCode.INTERNAL, "Stub process 'vit_0' is not healthy.")
RESET = (
    grpc.StatusCode.INTERNAL,
    "Stream removed (RST_STREAM (Received RST_STREAM with error code 2))",
)
EXPIRED = (grpc.StatusCode.UNAVAILABLE, "Request timeout expired")
# Errors that a malformed request causes for others in its batch.
BESIDE_PIXELS = (
    grpc.StatusCode.INTERNAL,
    "in ensemble 'embed', batch size 65 for 'vit_0', max allowed is 16",
)
BESIDE_STRING = (
    grpc.StatusCode.INVALID_ARGUMENT,
    "in ensemble 'embed', incomplete string data for inference input 'image', expecting string of "
    "length 100 but only 1 bytes available",
)


# -- retries -----------------------------------------------------------------------------------


@pytest.mark.parametrize("refusal", [GONE, FULL, EXPIRED, STOPPING, DIED, RESET])
def test_what_may_pass_is_tried_again(proxy: Proxy, refusal: tuple[grpc.StatusCode, str]) -> None:
    proxy.refusals = [refusal, refusal]
    with Client(proxy.url) as client:
        assert client.embed(IMAGE).shape == (64,)
    assert proxy.inferences == 3


def test_a_server_that_stops_costs_no_retry(proxy: Proxy) -> None:
    """Of two servers, every second attempt reaches the one that is shutting down."""
    proxy.refusals = [STOPPING] * 10
    with Client(proxy.url, retries=1) as client:
        assert client.embed(IMAGE).shape == (64,)
    assert proxy.inferences == 11
    proxy.refusals, proxy.forever = [STOPPING], True
    with Client(proxy.url, retries=1) as client, pytest.raises(Unavailable):
        client.embed(IMAGE)
    assert proxy.inferences == 11 + 16 + 2


@pytest.mark.parametrize(
    ("refusal", "kind"), [(GONE, Unavailable), (FULL, Overloaded), (EXPIRED, Overloaded)]
)
def test_in_the_end_it_is_told_what_it_was(
    proxy: Proxy, refusal: tuple[grpc.StatusCode, str], kind: type[VitClientError]
) -> None:
    proxy.refusals, proxy.forever = [refusal], True
    with Client(proxy.url, retries=2) as client, pytest.raises(kind) as caught:
        client.embed(IMAGE)
    assert proxy.inferences == 3
    assert caught.value.task == "embed"
    assert caught.value.details == refusal[1]
    assert caught.value.retryable


def test_it_waits_as_long_as_it_is_told_to(proxy: Proxy) -> None:
    limit = (grpc.StatusCode.RESOURCE_EXHAUSTED, "quota")
    proxy.refusals, proxy.pushback = [limit, limit], "700"
    with Client(proxy.url) as client:
        started = time.monotonic()
        assert client.embed(IMAGE).shape == (64,)
        assert time.monotonic() - started > 1.4
        assert proxy.inferences == 3
        proxy.refusals = [limit] * 3
        with pytest.raises(Overloaded) as caught:  # before its time is up
            client.embed(IMAGE, timeout=0.5)
    assert proxy.inferences == 4
    assert caught.value.retry_after == 0.7


@pytest.mark.parametrize("pushback", ["-1", "later"])
def test_it_does_not_try_again_if_told_not_to(proxy: Proxy, pushback: str) -> None:
    proxy.refusals, proxy.pushback = [(grpc.StatusCode.RESOURCE_EXHAUSTED, "quota")], pushback
    with Client(proxy.url) as client, pytest.raises(Overloaded) as caught:
        client.embed(IMAGE)
    assert proxy.inferences == 1
    assert caught.value.retry_after == -1


@pytest.mark.parametrize(
    ("code", "words", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, "unexpected shape", InvalidRequest),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max", InvalidRequest),
        (grpc.StatusCode.INTERNAL, "out of memory", ServerError),
        (grpc.StatusCode.NOT_FOUND, "Request for unknown model: 'embed'", ModelNotServed),
        (grpc.StatusCode.UNIMPLEMENTED, "", ModelNotServed),
    ],
)
def test_what_will_not_pass_is_not_tried_again(
    proxy: Proxy, code: grpc.StatusCode, words: str, kind: type[VitClientError]
) -> None:
    proxy.refusals, proxy.forever = [(code, words)], True
    with Client(proxy.url) as client, pytest.raises(kind) as caught:
        client.embed(IMAGE)
    assert proxy.inferences == 1
    assert not caught.value.retryable


def test_models_that_are_older_than_analyze(proxy: Proxy) -> None:
    words = "Request for unknown model: 'analyze' is not found"
    proxy.refusals = [(grpc.StatusCode.NOT_FOUND, words)]
    with (
        Client(proxy.url) as client,
        pytest.raises(ModelNotServed, match="built by a vit-builder older than this client"),
    ):
        client.analyze(IMAGE)


def test_an_answer_to_another_number_of_images(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = _wire.rows
    monkeypatch.setattr(_wire, "rows", lambda *given: right(*given) * 2)
    with pytest.raises(ServerError, match="answered 1 images with 2 rows"):
        client.embed(IMAGE)


def test_bad_images_are_not_retried(proxy: Proxy) -> None:
    with Client(proxy.url) as client, pytest.raises(BadImage):
        client.embed(b"bad")
    assert proxy.inferences == 1


def test_no_retries(proxy: Proxy) -> None:
    proxy.refusals = [GONE]
    with Client(proxy.url, retries=0) as client, pytest.raises(Unavailable):
        client.embed(IMAGE)
    assert proxy.inferences == 1


def test_retries_do_not_become_a_storm(proxy: Proxy) -> None:
    """50 callers, all rejected for two seconds: without a budget that is 250 requests."""
    proxy.refusals, proxy.forever = [FULL], True
    with Client(proxy.url, concurrency=50, timeout=2) as client:
        client.model()

        def call(_: int) -> type[BaseException]:
            with pytest.raises(VitClientError) as caught:
                client.embed(IMAGE)
            return caught.type

        with ThreadPoolExecutor(50) as pool:
            kinds = set(pool.map(call, range(50)))
    # The deadline may cut off the last attempt of a call.
    assert {Overloaded} <= kinds <= {Overloaded, DeadlineExceeded}
    assert proxy.inferences <= 50 + 10 + 3


def test_the_budget_is_for_overload_only(proxy: Proxy) -> None:
    """A dying server fails all its requests at once, and another one is idle."""
    proxy.refusals = [GONE] * 50
    with Client(proxy.url, concurrency=50, timeout=10) as client:
        client.model()
        with ThreadPoolExecutor(50) as pool:
            rows = list(pool.map(lambda _: client.embed(IMAGE), range(50)))
    assert len(rows) == 50


@pytest.mark.parametrize("refusal", [BESIDE_PIXELS, BESIDE_STRING])
def test_retries_outlast_malformed_requests_of_others(
    proxy: Proxy, refusal: tuple[grpc.StatusCode, str]
) -> None:
    """Until the deadline, however many retries that takes."""
    proxy.refusals = [refusal] * 40
    with Client(proxy.url, retries=1) as client:
        assert client.embed(IMAGE).shape == (64,)
    assert proxy.inferences == 41


def test_malformed_requests_of_others_that_do_not_end(proxy: Proxy) -> None:
    proxy.refusals, proxy.forever = [BESIDE_PIXELS], True
    begun = time.monotonic()
    with Client(proxy.url, concurrency=50, timeout=2) as client:
        client.model()

        def call(_: int) -> VitClientError:
            with pytest.raises(VitClientError) as caught:
                client.embed(IMAGE)
            return caught.value

        with ThreadPoolExecutor(50) as pool:
            errors = list(pool.map(call, range(50)))
    # The deadline may cut off the last attempt of a call.
    assert {type(error) for error in errors} <= {Unavailable, DeadlineExceeded}
    assert any("another client's malformed request (in ensemble" in str(error) for error in errors)
    assert proxy.inferences <= 50 + 10 + 40 * (time.monotonic() - begun)


def test_without_retries_the_first_answer_counts_beside_a_malformed_request(proxy: Proxy) -> None:
    proxy.refusals = [BESIDE_PIXELS]
    with Client(proxy.url, retries=0) as client, pytest.raises(Unavailable):
        client.embed(IMAGE)
    assert proxy.inferences == 1


@pytest.mark.parametrize("words", [BESIDE_PIXELS[1], BESIDE_STRING[1]])
def test_an_image_is_bad_whatever_the_words_of_its_reason(proxy: Proxy, words: str) -> None:
    reason = "it cannot be decoded: " + words.removeprefix("in ensemble 'embed', ")
    refusal = (grpc.StatusCode.INVALID_ARGUMENT, f"in ensemble 'embed', image[0]: {reason}")
    proxy.refusals = [refusal]
    with Client(proxy.url) as client, pytest.raises(BadImage) as caught:
        client.embed(IMAGE)
    assert reason in str(caught.value)
    assert proxy.inferences == 1


def test_the_budget_is_a_tenth_of_the_successes_and_one_a_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    budget = RetryBudget(per_success=0.1, per_second=1)
    assert [budget.reserve() for _ in range(10)] == [0] * 10
    assert budget.reserve() == pytest.approx(1)
    assert budget.reserve() == pytest.approx(2)
    for _ in range(20):
        budget.success()
    assert budget.reserve() == pytest.approx(1)
    now += 100
    assert [budget.reserve() for _ in range(10)] == [0] * 10
    assert budget.reserve() > 0


def test_backoff_grows_and_has_jitter() -> None:
    for attempt, most in [(0, 0.25), (1, 0.5), (2, 1), (10, 5), (10_000, 5)]:
        pauses = [backoff(attempt) for _ in range(200)]
        assert 0 <= min(pauses) < most / 4
        assert most * 3 / 4 < max(pauses) <= most


def test_a_channel_to_a_server_that_stops_is_left(proxy: Proxy) -> None:
    """For a new one, which resolves the name again; calls in flight on the old one continue."""

    async def run() -> None:
        async with AsyncClient(proxy.url) as client:
            await client.model()
            await asyncio.sleep(1.1)
            connection = client._engine.connection
            old = connection._current
            proxy.delay = 3
            under_way = asyncio.ensure_future(client.embed(IMAGE))
            while not proxy.in_flight:
                await asyncio.sleep(0.01)
            proxy.delay, proxy.refusals = 0, [STOPPING]
            # The rejection is consumed during the delay: the first request is not rejected.
            assert (await client.embed(IMAGE)).shape == (64,)
            assert proxy.in_flight == 1
            assert connection._current is not old
            assert connection._left == {old}
            assert (await under_way).shape == (64,)
            assert not connection._left

    asyncio.run(run())
    assert proxy.inferences == 3
    assert proxy.cancelled == 0


# -- deadlines ---------------------------------------------------------------------------------


def test_one_deadline_for_all_tries(proxy: Proxy) -> None:
    proxy.refusals, proxy.forever = [GONE], True
    with Client(proxy.url, retries=1000) as client:
        client.model()
        started = time.monotonic()
        # The last attempt may have started in time and been cut off.
        with pytest.raises((Unavailable, DeadlineExceeded)):
            client.embed(IMAGE, timeout=1)
        assert time.monotonic() - started < 20  # a thousand retries would take hours


def test_a_server_that_does_not_answer(proxy: Proxy) -> None:
    with Client(proxy.url) as client:
        client.model()
        proxy.delay = 30
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"within 0\.5 s"):
            client.embed(IMAGE, timeout=0.5)
        assert time.monotonic() - started < 20
        with pytest.raises(TimeoutError):
            client.classify([IMAGE] * 3, timeout=0.2)


def test_waiting_for_a_slot_counts(proxy: Proxy) -> None:
    with Client(proxy.url, concurrency=1) as client:
        client.model()
        proxy.delay = 3
        hog = threading.Thread(target=client.embed, args=(IMAGE,))
        hog.start()
        while not proxy.in_flight:
            time.sleep(0.01)
        with pytest.raises(DeadlineExceeded, match="slots"):
            client.embed(IMAGE, timeout=0.3)
        hog.join()


def test_a_slow_server_is_given_less(proxy: Proxy) -> None:
    """Otherwise the last of its requests would miss their deadlines."""
    images = [encoded(seed) for seed in range(16)] * 12
    with Client(proxy.url, timeout=2) as client:
        client.model()
        proxy.delay = 0.6  # over a quarter of the timeout
        assert client.embed(images).shape == (192, 64)
    assert proxy.most_in_flight <= 2


# -- real servers in real trouble --------------------------------------------------------------


@pytest.fixture
def narrow_repository(tiny_repository: Path, tmp_path: Path) -> Path:
    """The tiny model with a queue of two requests and slow processing."""
    folder = tmp_path / "models"
    shutil.copytree(tiny_repository, folder)
    config = folder / "preprocess" / "config.pbtxt"
    text = config.read_text()
    narrow = text.replace("max_queue_size: 128", "max_queue_size: 2")
    assert narrow != text
    config.write_text(narrow)
    model = built(folder, "preprocess", "model.py")
    slow = model.read_text().replace(
        "    def execute(self, requests):\n",
        "    def execute(self, requests):\n        import time; time.sleep(0.3)\n",
    )
    assert slow != model.read_text()
    model.write_text(slow)
    return folder


def test_a_full_queue_is_overload(narrow_repository: Path) -> None:
    images = [encoded(seed) for seed in range(8)]
    with serving(narrow_repository) as server:
        with Client(server.url, retries=0) as client, ThreadPoolExecutor(8) as pool:
            client.embed(IMAGE)
            calls = [pool.submit(client.embed, image) for image in images]
            errors = [error for call in calls if (error := call.exception()) is not None]
            assert errors, "the queue was never full"
            assert {type(error) for error in errors} == {Overloaded}
        # With enough retries all of them succeed.
        with Client(server.url, retries=100) as client, ThreadPoolExecutor(8) as pool:
            rows = np.stack(list(pool.map(client.embed, images)))
            np.testing.assert_allclose(rows, client.embed(images), atol=1e-5)


def test_a_server_that_hangs_and_recovers(tiny_repository: Path) -> None:
    with serving(tiny_repository) as server, Client(server.url) as client:
        client.embed(IMAGE)
        # Not the models' processes: these exit after being stopped.
        triton = tritonserver(server.process.pid)
        os.kill(triton, signal.SIGSTOP)
        try:
            with pytest.raises(DeadlineExceeded):
                client.embed(IMAGE, timeout=0.5)
            health = client.health(timeout=0.5)
            assert not health
            assert "within" in health.problem
        finally:
            os.kill(triton, signal.SIGCONT)
        assert client.embed(IMAGE).shape == (64,)
        assert client.health()


def test_a_server_that_goes_away_and_comes_back(tiny_repository: Path) -> None:
    """The same client recovers by itself."""
    with serving(tiny_repository) as server:
        client = Client(server.url, retries=0)
        client.embed(IMAGE)
        port = server.url.rpartition(":")[2]
    with pytest.raises(Unavailable, match=f"no server at 127.0.0.1:{port}"):
        client.embed(IMAGE)
    assert not client.health()
    with serving(tiny_repository, "--grpc-port", port):
        deadline = time.monotonic() + 20
        while not client.health() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert client.embed(IMAGE).shape == (64,)
    client.close()


def test_no_server() -> None:
    with Client("localhost:1", retries=1) as client, pytest.raises(Unavailable) as caught:
        client.embed(IMAGE)
    assert "no server at localhost:1" in str(caught.value)


def test_the_http_port(tiny_server: Any) -> None:
    url = tiny_server.http_url.removeprefix("http://")
    with (
        Client(url, retries=0, timeout=5) as client,
        pytest.raises(Unavailable, match="Is it the HTTP port"),
    ):
        client.embed(IMAGE)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vat", "does not serve the vit models"),
        ("preprocess", "not the one this client is made for"),
    ],
)
def test_a_server_with_other_models(
    client: Client, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    """There is no model of this name, or it is another one."""
    monkeypatch.setattr("vit_client._wire.MODEL", name)
    with pytest.raises(ModelNotServed, match=words):
        client.embed(IMAGE)


# -- misuse ------------------------------------------------------------------------------------


def test_a_closed_client(url: str) -> None:
    client = Client(url)
    client.embed(IMAGE)
    stream = client.stream([IMAGE] * 100)
    next(stream)
    client.close()
    client.close()
    with pytest.raises(ClientClosed, match="closed"):
        list(stream)
    with pytest.raises(ClientClosed, match="closed"):
        client.embed(IMAGE)
    with pytest.raises(ClientClosed, match="closed"):
        next(client.stream([IMAGE]))


def test_closing_ends_the_calls_of_other_threads(proxy: Proxy) -> None:
    client = Client(proxy.url)
    client.model()
    proxy.delay = 30
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.embed, IMAGE)
        while not proxy.in_flight:
            time.sleep(0.01)
        client.close()
        assert isinstance(call.exception(timeout=5), ClientClosed)


def test_many_threads_share_a_client(client: Client) -> None:
    images = [encoded(seed) for seed in range(40)]
    expected = client.embed(images)
    with ThreadPoolExecutor(16) as pool:
        rows = list(pool.map(client.embed, images))
    np.testing.assert_allclose(np.stack(rows), expected, atol=1e-5)


def test_many_tasks_share_a_client(url: str) -> None:
    images = [encoded(seed) for seed in range(40)]

    async def run() -> tuple[Any, Any]:
        async with AsyncClient(url) as client:
            rows = await asyncio.gather(*(client.embed(image) for image in images))
            return np.stack(rows), await client.embed(images)

    rows, expected = asyncio.run(run())
    np.testing.assert_allclose(rows, expected, atol=1e-5)


def test_a_client_of_another_event_loop(url: str) -> None:
    client = AsyncClient(url)
    asyncio.run(client.embed(IMAGE))
    with pytest.raises(ClientClosed, match="another event loop"):
        asyncio.run(client.embed(IMAGE))


def test_cancelling_a_task_cancels_the_request(proxy: Proxy) -> None:
    async def run() -> None:
        async with AsyncClient(proxy.url) as client:
            await client.model()
            proxy.delay = 30
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(client.embed(IMAGE), 0.3)
            await asyncio.sleep(0.2)

    asyncio.run(run())
    assert proxy.cancelled == 1
    assert proxy.in_flight == 0


def script(code: str, *arguments: str) -> "subprocess.Popen[str]":
    """A separate program, because it forks or is interrupted."""
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork")
def test_after_a_fork_there_is_an_error_not_a_hang(url: str) -> None:
    code = """
        import os, sys
        from vit_client import Client, ClientClosed
        client, unused = Client(sys.argv[1]), Client(sys.argv[1])
        if sys.argv[2] == "used":
            client.model()
        if os.fork() == 0:
            try:
                if sys.argv[2] == "used":
                    client.model()
                print(unused.embed(b"P6 1 1 255\\n123").shape)
            except ClientClosed as error:
                print(error)
            client.close()
            sys.stdout.flush()
            os._exit(0)
        os.wait()
    """
    out, _ = script(code, url, "used").communicate(timeout=20)
    assert "does not survive a fork" in out
    # Nor does a new client in the child, which inherits gRPC's state.
    fresh = code.replace(
        "                    client.model()\n                print",
        "                    pass\n                print",
    )
    out, _ = script(fresh, url, "used").communicate(timeout=20)
    assert "does not survive a fork" in out
    out, _ = script(code, url, "unused").communicate(timeout=20)
    assert out == "(64,)\n"


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, asyncio.CancelledError])
def test_a_source_that_ends_the_program_does_not_hang_the_client(
    url: str, kind: type[BaseException]
) -> None:
    def images() -> Iterator[bytes]:
        yield IMAGE
        raise kind("row 2 is bad")

    with Client(url) as client:
        with pytest.raises(RuntimeError, match=kind.__name__) as raised:
            list(client.stream(images()))
        assert isinstance(raised.value.__cause__, kind)
        assert client.embed(IMAGE).shape == (64,)  # the client is still usable


def test_first_calls_of_many_threads_keep_their_deadlines(proxy: Proxy) -> None:
    """All of them wait for the model, which is requested once."""
    proxy.delay = 30

    def call(seconds: float) -> float:
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            client.embed(IMAGE, timeout=seconds)
        return time.monotonic() - started - seconds

    with Client(proxy.url) as client, ThreadPoolExecutor(8) as pool:
        late = list(pool.map(call, [0.5, 1, 0.5, 1, 0.5, 1, 0.5, 1]))
    assert max(late) < 0.4
    assert min(late) > -0.1
    # Requested again for callers with time left, but not once per caller.
    assert set(proxy.calls) == {"ModelConfig"}
    assert 2 <= len(proxy.calls) < 8


@pytest.mark.parametrize("blocked", ["SIGUSR1", "SIGINT"], ids=["any thread", "another thread"])
def test_ctrl_c_ends_a_call_at_once(proxy: Proxy, blocked: str) -> None:
    """Whichever thread the kernel delivers the signal to."""
    code = """
        import signal, sys
        from vit_client import Client
        with Client(sys.argv[1]) as client:
            client.model()
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.Signals[sys.argv[2]]})
            print("asking", flush=True)
            try:
                client.embed(b"P6 1 1 255\\n123")
            except KeyboardInterrupt:
                print("interrupted", flush=True)
    """
    proxy.delay = 0
    process = script(code, proxy.url, blocked)
    assert process.stdout is not None
    proxy.delay = 1  # also delays ModelConfig, within the timeout
    assert process.stdout.readline() == "asking\n"
    proxy.delay = 30
    while proxy.in_flight == 0:
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=5)
    assert out == "interrupted\n", err
    deadline = time.monotonic() + 5
    while proxy.in_flight and time.monotonic() < deadline:
        time.sleep(0.01)
    assert proxy.in_flight == 0


def test_an_async_stream_left_in_the_middle(proxy: Proxy) -> None:
    """A `break` does not close an async generator; closing the client must suffice, without
    warnings from asyncio."""
    code = """
        import asyncio, sys
        from vit_client import AsyncClient

        async def run():
            async with AsyncClient(sys.argv[1]) as client:
                async for item in client.stream([b"P6 1 1 255\\n123"] * 10_000):
                    print(item.result.shape)
                    break

        asyncio.run(run())
    """
    out, err = script(code, proxy.url).communicate(timeout=20)
    assert out == "(64,)\n"
    assert err == ""


def test_nothing_is_left_at_exit(url: str) -> None:
    """An unclosed client and an unfinished stream."""
    code = """
        import itertools, sys
        from vit_client import Client
        client = Client(sys.argv[1])
        stream = client.stream(itertools.repeat(b"P6 1 1 255\\n123"))
        print(next(stream).result.shape)
    """
    process = script(code, url)
    out, err = process.communicate(timeout=20)
    assert out == "(64,)\n"
    assert err == ""
    assert process.returncode == 0

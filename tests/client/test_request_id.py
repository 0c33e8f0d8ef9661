"""Request ids: those sent to the server, in errors and in the log."""

import logging
import pickle
import subprocess
import sys
from collections.abc import Callable

import grpc
import pytest
from vit_client import (
    BadImage,
    BadImages,
    Client,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    Unavailable,
    VitClientError,
)

from .conftest import encoded
from .proxy import FULL, Proxy

IMAGE = encoded(0)
BROKEN = (grpc.StatusCode.INVALID_ARGUMENT, "nonsense")


@pytest.mark.parametrize("task", ["classify", "probabilities", "embed", "features", "analyze"])
def test_the_server_gets_the_callers(proxy: Proxy, task: str) -> None:
    with Client(proxy.url) as client:
        getattr(client, task)(IMAGE, request_id="order:17/a")
        list(client.stream([IMAGE], task=task, request_id="bulk"))  # type: ignore[call-overload]
    assert proxy.ids == ["order:17/a", "bulk"]


def test_a_call_of_several_requests_numbers_them(proxy: Proxy) -> None:
    images = [encoded(seed) for seed in range(40)]  # 16 per request
    with Client(proxy.url) as client:
        client.embed(images, request_id="mine")
        assert sorted(proxy.ids) == ["mine", "mine-2", "mine-3"]
        proxy.ids.clear()
        with pytest.raises(BadImages):  # the request is sent again without the bad one
            client.embed([IMAGE, b"bad"], request_id="mine")
    assert proxy.ids == ["mine", "mine-2"]


def test_made_ones_differ(proxy: Proxy) -> None:
    with Client(proxy.url) as client:
        for _ in range(100):
            client.embed(IMAGE)
    assert len(set(proxy.ids)) == 100
    assert all(len(made) == 16 and made.isalnum() for made in proxy.ids)


def test_a_retry_has_the_same_one(proxy: Proxy) -> None:
    proxy.refusals = [FULL, FULL]
    with Client(proxy.url) as client:
        client.embed(IMAGE, request_id="mine")
    assert proxy.ids == ["mine"] * 3


@pytest.mark.parametrize("wrong", ["", " ", "a b", "ü", "a\n", "x" * 129, 7])
def test_what_is_no_id(client: Client, wrong: str) -> None:
    with pytest.raises(ValueError, match="request_id must be 1 to 128 visible ASCII characters"):
        client.embed(IMAGE, request_id=wrong)


def refused(proxy: Proxy) -> None:
    proxy.refusals, proxy.forever = [BROKEN], True


def full(proxy: Proxy) -> None:
    proxy.refusals, proxy.forever = [FULL], True


def slow(proxy: Proxy) -> None:
    proxy.delay = 30


def gone(proxy: Proxy) -> None:
    proxy.targets = ["127.0.0.1:1"]


@pytest.mark.parametrize(
    ("trouble", "kind"),
    [
        (refused, InvalidRequest),
        (full, Overloaded),
        (slow, DeadlineExceeded),
        (gone, Unavailable),
    ],
)
@pytest.mark.parametrize("connected", [True, False])
def test_every_error_names_it(
    proxy: Proxy, trouble: Callable[[Proxy], None], kind: type[VitClientError], connected: bool
) -> None:
    """Even if no inference request was sent, because the model is not known yet."""
    with Client(proxy.url, timeout=3, retries=1) as client:
        if connected:
            client.embed(IMAGE)
        trouble(proxy)
        with pytest.raises(kind) as caught:
            client.embed(IMAGE, request_id="mine")
        with pytest.raises(kind) as streamed:
            list(client.stream([IMAGE], request_id="bulk"))
    for error, name in ((caught.value, "mine"), (streamed.value, "bulk")):
        assert error.request_id == name
        assert str(error) == f"{error.message} [request {name}]"
        assert pickle.loads(pickle.dumps(error)).request_id == name


def test_a_bad_image_names_the_request_that_was_refused(client: Client) -> None:
    with pytest.raises(BadImage) as caught:
        client.embed(b"bad", request_id="mine")
    assert str(caught.value).startswith("image 0: 3 bytes that are not an image")
    assert str(caught.value).endswith("[request mine]")
    images = [encoded(seed) for seed in range(20)]
    images[18] = b"bad"
    with pytest.raises(BadImages) as several:
        client.embed(images, request_id="mine")
    assert several.value.request_id in ("mine", "mine-2")  # whichever failed first
    (item,) = client.stream([b"bad"], on_error="return", request_id="bulk")
    assert item.error is not None
    assert item.error.request_id == "bulk"
    # Not sent to any server, so it is the id of the call.
    with pytest.raises(BadImage) as missing:
        client.embed("nowhere.jpg", request_id="mine")
    assert missing.value.request_id == "mine"


def test_the_log(proxy: Proxy, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "vit_client")
    proxy.refusals = [FULL]
    secrets = {"token": "s3cret-token", "headers": {"x-key": "s3cret-value"}}
    with Client(proxy.url, **secrets) as client:  # type: ignore[arg-type]
        client.embed([IMAGE, encoded(1)], request_id="mine")
        version = client.model().version
        with pytest.raises(BadImage):
            client.embed(b"s3cret image, which is none", request_id="other")
    lines = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert {record.name for record in caplog.records} == {"vit_client"}
    retries = [line for level, line in lines if level == "INFO"]
    assert len(retries) == 1
    assert retries[0].startswith("request mine: try 1 failed, again in ")
    assert "is overloaded (Exceeds maximum queue size)" in retries[0]
    tries = [line for level, line in lines if level == "DEBUG" and "request mine: try" in line]
    assert [line.split(",")[0] for line in tries] == [f"request mine: try {n}" for n in (1, 2)]
    assert ("DEBUG", "request mine: embed of 2 images") in lines
    (answered,) = [line for _, line in lines if line.startswith("request mine: answered in ")]
    assert answered.endswith(f" s, by model version {version}")
    assert any(line.startswith("request other: try 1 failed") for _, line in lines)
    told = "\n".join(line for _, line in lines)
    assert "s3cret" not in told
    assert "IHDR" not in told  # contents of the files


def test_nothing_is_logged_by_default(proxy: Proxy) -> None:
    proxy.refusals = [FULL]
    code = f"""
from vit_client import Client
with Client({proxy.url!r}) as client:
    client.embed({IMAGE!r})
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (ran.stdout, ran.stderr) == ("", "")
    assert len(proxy.ids) == 2

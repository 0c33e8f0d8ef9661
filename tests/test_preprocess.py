"""The decode function of `preprocess`, outside of Triton: what goldens over gRPC do not reach."""

import contextlib
import importlib
import importlib.util
import io
import os
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import PIL
import pytest
from conftest import GOLDENS, PREPROCESS
from PIL import Image
from reliability.poison import resized
from vit_server import installation

PHOTOS = Path(__file__).parent.parent / "photos"


@pytest.fixture(scope="module")
def preprocess(decoding: ModuleType) -> ModuleType:
    """model_repository/preprocess/1/model.py, beside Triton's own utilities."""
    sys.path.append(str(installation.find().python_backend))
    spec = importlib.util.spec_from_file_location("preprocess", PREPROCESS / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_resize_is_pillows(decoding: ModuleType) -> None:
    random = np.random.default_rng(0)
    orders = set()
    for _ in range(200):
        width, height, to_width, to_height = random.integers(1, 400, 4).tolist()
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))
        expected = resized(image, to_height, to_width)
        for form in (image, np.asarray(image)):
            np.testing.assert_array_equal(decoding.resize(form, to_height, to_width), expected)
        if int(PIL.__version__.split(".")[0]) >= 13:
            whole = image.resize((to_width, to_height), Image.Resampling.BICUBIC)
            np.testing.assert_array_equal(whole, expected)
        orders.add(height > to_height and height - to_height > 2 * (width - to_width))
    assert orders == {True, False}


SIZES = [(1, 1), (1, 700), (700, 1), (256, 256), (1000, 777), (65535, 3), (3, 65535), (65535, 33)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("pixels", ["noise", "black and white"])
def test_resize_in_pieces(decoding: ModuleType, size: tuple[int, int], pixels: str) -> None:
    """Of any shape, in several pieces and strips or less than one; sums beyond 0 and 255."""
    array = np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8)
    if pixels == "black and white":
        array = (array > 127).astype(np.uint8) * 255
    image = Image.fromarray(array)
    for side in (1, 64, 256):
        expected = resized(image, side, side)
        np.testing.assert_array_equal(decoding.resize(image, side, side), expected)


@pytest.mark.parametrize("address", ["127.0.0.1:8002", "[::1]:8002", "triton-0.vit:8002"])
def test_where_metrics_may_be(preprocess: ModuleType, address: str) -> None:
    assert preprocess.Backlog(address, 8, 2).address == (address[:-5].strip("[]"), 8002)


@pytest.mark.parametrize("address", ["http://localhost:8002", "::1", "localhost", ":8002"])
def test_where_metrics_cannot_be(preprocess: ModuleType, address: str) -> None:
    assert not sys.modules[preprocess.Backlog.__module__].ADDRESS.fullmatch(address)


@pytest.mark.parametrize("drips", [False, True])
def test_metrics_that_do_not_answer_stop_nobody(preprocess: ModuleType, drips: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip() -> None:
            with server.accept()[0] as connection, contextlib.suppress(OSError):
                for _ in range(20 * drips):
                    connection.sendall(b" ")
                    time.sleep(0.5)
                time.sleep(3)

        threading.Thread(target=drip, daemon=True).start()
        backlog = preprocess.Backlog(f"127.0.0.1:{server.getsockname()[1]}", 8, 2)
        began = time.monotonic()
        backlog.wait()
        assert backlog.room == 8
        assert time.monotonic() - began < 8  # where it would be for ever, or ten


def test_images_that_wait_are_those_of_the_last_requests(preprocess: ModuleType) -> None:
    backlog = preprocess.Backlog("127.0.0.1:9", 8, 2)
    backlog.pending = lambda: 3
    assert backlog.waiting() == 0  # all of other processes
    backlog.sent([1] * 100)
    assert backlog.waiting() == 2
    backlog.sent([16])
    assert backlog.waiting() == 17


def test_messages_have_bounds(preprocess: ModuleType) -> None:
    lines = [f"image[{row}]: {'x' * 200}" for row in range(64)]
    message = preprocess.shorten(lines)
    assert len(message) < preprocess.MAX_MESSAGE + 300
    assert message.splitlines()[:2] == lines[:2]
    assert message.splitlines()[-1] == f"(and {64 - len(message.splitlines()) + 1} more)"


def test_limits(decoding: ModuleType) -> None:
    data = (GOLDENS / "images" / "tall.jpg").read_bytes()  # 37x700
    assert decoding.decode(data, 64, 64, decoding.Room(37 * 700)).shape == (64, 64, 3)
    with pytest.raises(decoding.BadImage, match="37x700 is over 25899 pixels"):
        decoding.decode(data, 64, 64, decoding.Room(37 * 700 - 1))
    for size in ((65536, 1), (1, 65536)):
        file = io.BytesIO()
        Image.new("L", size).save(file, "PNG")
        with pytest.raises(decoding.BadImage, match=f"{size[0]}x{size[1]} has a side of over"):
            decoding.decode(file.getvalue(), 64, 64, decoding.Room(10**6))


OTHERS = {
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "JPEG XL": b"\xff\x0a\0\0",
    "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n",
    "PDF": b"%PDF-1.7\n",
    "SVG": b'<?xml version="1.0"?><svg/>',
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_image_here_is_named(decoding: ModuleType, name: str) -> None:
    with pytest.raises(decoding.BadImage, match=f"bytes that are {name}: not supported"):
        decoding.decode(OTHERS[name], 64, 64, decoding.Room(10**6))


def test_run_length_encoded_bitmap(decoding: ModuleType) -> None:
    """Pillow reads each run in two: 2.5 million for 1280 x 960 pixels that differ."""
    pixels = np.random.default_rng(0).integers(0, 256, (960, 1280), np.uint8)
    runs = np.stack([np.ones_like(pixels), pixels], axis=2).reshape(960, -1)
    rows = b"".join(row.tobytes() + b"\0\0" for row in runs[::-1]) + b"\0\1"
    palette = b"".join(bytes((i, i, i, 0)) for i in range(256))
    info = struct.pack("<IiiHHIIiiII", 40, 1280, 960, 1, 8, 1, len(rows), 0, 0, 256, 256)
    head = struct.pack("<2sIHHI", b"BM", 14 + 40 + 1024 + len(rows), 0, 0, 14 + 40 + 1024)
    got = decoding.decode(head + info + palette + rows, 64, 64, decoding.Room(10**7))
    expected = resized(Image.fromarray(pixels).convert("RGB"), 64, 64)
    np.testing.assert_array_equal(got, expected)


def test_pixels_in_memory_are_bounded(decoding: ModuleType) -> None:
    room, begun, done = decoding.Room(10), threading.Event(), []

    def large() -> None:
        begun.set()
        with room.taken(10):
            done.append("large")

    waiting = threading.Thread(target=large)
    with room.taken(1):
        waiting.start()
        begun.wait()
        with room.taken(9):
            assert not done
        done.append("small")
    waiting.join()
    assert done == ["small", "large"]
    assert room.free == 10


@pytest.mark.parametrize(("text", "number"), [("4,3,2", 4), (" 2 ", 2), ("1", 1), ("", None)])
def test_threads_are_openmps(
    preprocess: ModuleType, monkeypatch: pytest.MonkeyPatch, text: str, number: int | None
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert preprocess.threads() == (number or len(os.sched_getaffinity(0)))


@pytest.mark.parametrize("side", [64, 96])
@pytest.mark.parametrize("photo", sorted(PHOTOS.glob("*.jpg")), ids=lambda path: path.stem)
def test_fast_jpeg_is_nearly_the_same(decoding: ModuleType, photo: Path, side: int) -> None:
    """A photo of 4 to 10 times the model's size, as 2 megapixels are of 256 pixels."""
    data = photo.read_bytes()
    exact = decoding.decode(data, side, side, decoding.Room(10**6)).astype(int)
    fast = decoding.decode(data, side, side, decoding.Room(10**6), fast_jpeg=True).astype(int)
    assert 0 < abs(fast - exact).mean() < 1
    assert abs(fast - exact).max() <= 40


def test_fast_jpeg_changes_nothing_else(decoding: ModuleType) -> None:
    """No other kind of file, and no JPEG below four times the model's size (two each way)."""
    for path in sorted((GOLDENS / "images").iterdir()):
        side = 16 if path.suffix != ".jpg" else 256
        data, room = path.read_bytes(), decoding.Room(10**6)
        exact, fast = (decoding.decode(data, side, side, room, fast) for fast in (False, True))
        np.testing.assert_array_equal(fast, exact, str(path))

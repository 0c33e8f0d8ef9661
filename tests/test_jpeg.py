"""JPEGs that go past Pillow (preprocess/1/jpeg.py): its pixels and its verdicts all the same."""

import io
import random
from collections import Counter
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import GOLDENS, PHOTOS
from PIL import Image

SIDE = 32


def made(rng: random.Random, photo: Image.Image) -> bytes:
    """A JPEG of any kind that Pillow can write."""
    left, top = rng.randrange(200), rng.randrange(200)
    part = photo.crop((left, top, left + rng.randint(1, 200), top + rng.randint(1, 200)))
    mode = rng.choice(["RGB"] * 6 + ["L", "CMYK"])
    options: dict[str, Any] = {"quality": rng.randint(1, 100), "progressive": rng.random() < 0.3}
    options["optimize"] = rng.random() < 0.3
    if mode == "RGB" and rng.random() < 0.15:
        options["keep_rgb"] = True
    elif mode == "RGB":
        options["subsampling"] = rng.choice(["4:4:4", "4:2:2", "4:2:0", "4:1:1"])
    if rng.random() < 0.3:
        options["restart_marker_blocks"] = rng.randint(1, 20)
    file = io.BytesIO()
    part.convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def damaged(rng: random.Random, data: bytes) -> list[bytes]:
    """Cut off, with bytes put in, and with some changed: anywhere, and among the markers."""
    at = rng.randrange(len(data))
    changed, head = bytearray(data), bytearray(data)
    for _ in range(rng.choice([1, 2, 20])):
        changed[rng.randrange(len(data))] = rng.randrange(256)
    head[rng.randrange(min(700, len(data)))] ^= 1 << rng.randrange(8)
    inserted = data[:at] + rng.randbytes(rng.randint(1, 9)) + data[at:]
    return [data[: at + 1], inserted, bytes(changed), bytes(head)]


def verdict(decoding: ModuleType, data: bytes, fast: bool) -> Any:
    try:
        return decoding.decode(data, SIDE, SIDE, decoding.Room(10**7), fast)
    except decoding.BadImage as error:
        return str(error)


@pytest.mark.parametrize("fast", [False, True], ids=["exact", "fast_jpeg"])
def test_pixels_and_verdicts_are_pillows(
    decoding: ModuleType, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    rng = random.Random(0)
    photos = [Image.open(path).convert("RGB") for path in sorted(PHOTOS.glob("*.jpg"))]
    files = [path.read_bytes() for path in sorted((GOLDENS / "images").glob("*.jp*g"))]
    files += [path.read_bytes() for path in sorted(PHOTOS.glob("*.jpg"))]
    files += [made(rng, rng.choice(photos)) for _ in range(400)]
    files += [broken for data in list(files) for broken in damaged(rng, data)]

    seen: Counter[str] = Counter()
    plain = decoding.plain_jpeg

    def counted(*given: Any) -> Any:
        pixels = plain(*given)
        seen["plain" if pixels is not None else "Pillow's"] += 1
        return pixels

    monkeypatch.setattr(decoding, "plain_jpeg", counted)
    got = [verdict(decoding, data, fast) for data in files]
    monkeypatch.setattr(decoding, "plain_jpeg", lambda *_: None)
    for data, here in zip(files, got, strict=True):
        expected = verdict(decoding, data, fast)
        assert type(here) is type(expected), (here, expected)
        np.testing.assert_array_equal(here, expected)
        seen["refused"] += isinstance(here, str)
    assert seen["plain"] > 400
    assert seen["Pillow's"] > 400
    assert seen["refused"] > 100


def test_an_image_over_the_limit_is_refused_unseen(decoding: ModuleType) -> None:
    data = (PHOTOS / "coffee.jpg").read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        pixels = image.width * image.height
    with pytest.raises(decoding.BadImage, match=f"is over {pixels - 1} pixels"):
        decoding.decode(data, SIDE, SIDE, decoding.Room(pixels - 1))

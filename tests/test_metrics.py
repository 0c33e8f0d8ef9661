"""What `preprocess` tells of images, in the metrics of the real server: exactly, and in time."""

import os
import re
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import PHOTOS, Server, copy, png, serving
from tritonclient.utils import InferenceServerException

PHOTO = (PHOTOS / "coffee.jpg").read_bytes()  # 600x400
LARGER = png(np.zeros((800, 1000, 3), np.uint8))
BAD = {
    "empty": b"",
    "not_an_image": b"not an image",
    "unsupported_format": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "too_many_bytes": bytes(2_000_001),
    "too_many_pixels": png(np.zeros((1001, 1000, 3), np.uint8)),
    "too_many_parts": b"\xff\xd8" + 101 * b"\xff\xda\0\2",
    "damaged": PHOTO[: len(PHOTO) // 2],
}


@pytest.fixture(scope="module")
def server(tiny_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Three processes of preprocess, and low limits."""
    repository = copy(tiny_repository, tmp_path_factory.mktemp("strict"))
    config = repository / "preprocess" / "config.pbtxt"
    text = config.read_text()
    for pattern, new in {
        r"(count: )2": r"\g<1>3",
        r'(key: "max_image_pixels"\s+value {\s+string_value: )"\d+"': r'\1"1000000"',
        r'(key: "max_request_bytes"\s+value {\s+string_value: )"\d+"': r'\1"2000000"',
    }.items():
        text, count = re.subn(pattern, new, text)
        assert count == 1
    config.write_text(text)
    with serving(repository) as running:
        yield running


def metrics(server: Server) -> dict[str, float]:
    """Of `preprocess`, without that in their names."""
    with urllib.request.urlopen(server.metrics_url, timeout=10) as response:
        lines = response.read().decode()
    return {
        name: float(value)
        for name, value in re.findall(r"^vit_preprocess_(\S+) (\S+)$", lines, re.MULTILINE)
    }


def settled(server: Server, enough: Callable[[dict[str, float]], bool]) -> dict[str, float]:
    """The metrics when they fit, without a further request, and could be too many."""
    deadline = time.monotonic() + 60
    while not enough(metrics(server)) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(3)
    return metrics(server)


def test_refused_images_by_reason(server: Server) -> None:
    refused = {reason: f'refused_images_total{{reason="{reason}"}}' for reason in BAD}
    before = settled(server, lambda now: now["decode_seconds_count"] >= 6)
    assert {name for name in before if "reason" in name} == set(refused.values())
    for i, data in enumerate(BAD.values()):
        for _ in range(i + 1):
            with pytest.raises(InferenceServerException, match=r"^[^\n]*image\[0\]: [^\n]*$"):
                server.infer("embed", "image", [data])
    for _ in range(2):
        with pytest.raises(InferenceServerException, match=r"image\[1\]: "):
            server.infer("embed", "image", [PHOTO, *BAD.values(), PHOTO])
    requests = sum(range(1, 8)) + 2
    name = "refused_requests_total"
    after = settled(server, lambda now: now[name] >= before[name] + requests)
    grown = {name: after[name] - before[name] for name in after}
    assert grown[name] == requests
    assert {reason: grown[name] for reason, name in refused.items()} == {
        reason: i + 1 + 2 for i, reason in enumerate(BAD)
    }
    assert grown["decode_seconds_count"] == grown["megapixels_count"] == 4


def test_histograms_have_each_image_once(server: Server) -> None:
    """Of many callers, in batches of any size, by three processes."""
    before = settled(server, lambda now: now["decode_seconds_count"] >= 6)
    sent = Counter[bytes]()
    lock = threading.Lock()

    def ask(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(15):
            rows = [(PHOTO, LARGER)[i] for i in random.integers(0, 2, random.integers(1, 17))]
            server.infer("embed", "image", rows)
            with lock:
                sent.update(rows)

    began = time.monotonic()
    callers = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    seconds = time.monotonic() - began
    total = sent.total()
    name = "decode_seconds_count"
    after = settled(server, lambda now: now[name] >= before[name] + total)
    grown = {name: after[name] - before[name] for name in after}
    assert grown["decode_seconds_count"] == grown["megapixels_count"] == total
    megapixels = sent[PHOTO] * 0.24 + sent[LARGER] * 0.8
    assert grown["megapixels_sum"] == pytest.approx(megapixels)
    # Three processes, with threads as many as the cores at the most.
    assert 0 < grown["decode_seconds_sum"] < seconds * 3 * (os.cpu_count() or 1)
    assert 0 <= grown["held_back_seconds_total"] < seconds * 3
    sizes = buckets(grown, "megapixels")
    assert sizes.pop(0.25) == sent[PHOTO]
    assert {limit: sizes[limit] for limit in (0.001, 0.1, 0.5, 1, float("inf"))} == {
        0.001: 0,
        0.1: 0,
        0.5: sent[PHOTO],
        1: total,
        float("inf"): total,
    }
    times = buckets(grown, "decode_seconds")
    assert times[float("inf")] == total
    in_order = [times[limit] for limit in sorted(times)]
    assert in_order == sorted(in_order)


def buckets(values: dict[str, float], name: str) -> dict[float, float]:
    found = {}
    for key, value in values.items():
        if limit := re.fullmatch(rf'{name}_bucket{{le="(.*)"}}', key):
            found[float(limit[1])] = value
    return found

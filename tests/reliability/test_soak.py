"""Five minutes of mixed traffic; `make soak` takes thirty."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Server, serving

from bench.footprint import Footprint, Usage

from .soak import growth, known, many, report, right, soak


@pytest.fixture(scope="module")
def server(tiny_repository: Path) -> Iterator[Server]:
    """A separate server, so that other tests do not affect its memory."""
    with serving(tiny_repository) as server:
        yield server


@pytest.mark.timeout(600)
def test_nothing_is_lost_or_wrong_and_nothing_grows(server: Server) -> None:
    result = asyncio.run(soak(server.url, server.process.pid, server.repository, seconds=150))
    print(f"\n{report(result)}")
    assert not result.faults()
    for outcome in ("one: right", "several: right", "bad: rejected", "cancelled", "clients killed"):
        assert result.counts[outcome] > 20, outcome
    assert server.process.poll() is None


@pytest.mark.timeout(600)
def test_every_request_of_many_is_counted(server: Server) -> None:
    """A shorter `python -m tests.reliability.soak --requests 100000`."""
    result = asyncio.run(many(server.url, server.process.pid, server.repository, 3000))
    assert result.counts == {"one: right": 3000}


def test_it_would_see_growth() -> None:
    def samples(leak: float, descriptors: float) -> list[tuple[float, Footprint]]:
        return [
            (float(t), Footprint({"vit": Usage(100 + leak * t, 40 + int(descriptors * t))}, 192))
            for t in range(100)
        ]

    assert growth(samples(0, 0)) == []
    assert growth(samples(1, 0)) == ["vit grew by 49.0 MiB over the second half"]
    assert growth(samples(0, 1)) == ["vit grew by 49.0 descriptors over the second half"]


def test_it_would_see_another_images_answer(tiny_repository: Path) -> None:
    """The results of the good images differ by more than the tolerance."""
    good, bad = known(tiny_repository)
    assert len(good) > 20
    assert len(bad) > 20
    for task in ("probabilities", "embed"):
        assert right(task, good[0].answer[task], good[0].answer)
        # Some goldens are lossless copies of the same photo.
        alike = sum(right(task, image.answer[task], good[0].answer) for image in good)
        assert alike < 4

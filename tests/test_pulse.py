"""When a model's process counts as held up, with clocks that the tests set."""

import importlib
import os
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "model_repository" / "preprocess" / "1"


@pytest.fixture(scope="module")
def pulse() -> ModuleType:
    sys.path.append(str(FOLDER))  # as Triton does
    return importlib.import_module("pulse")


class Clocks:
    """For the module `time`. The process uses no CPU, and the thread of its pulse never beats."""

    def __init__(self) -> None:
        self.boot, self.wall = 1000.0, 1e9
        self.lost = 0.0  # seconds, once, between two clocks

    def pass_by(self, seconds: float) -> None:
        self.boot += seconds
        self.wall += seconds

    def now(self) -> float:
        return self.boot

    def time(self) -> float:
        wall = self.wall
        self.pass_by(self.lost)
        self.lost = 0
        return wall

    def process_time(self) -> float:
        return 0

    def sleep(self, _seconds: float) -> None:
        threading.Event().wait()


@pytest.fixture
def clocks(pulse: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Clocks:
    clocks = Clocks()
    monkeypatch.setattr(pulse, "time", clocks)
    monkeypatch.setattr(pulse, "now", clocks.now)
    return clocks


def ends(pulse: ModuleType, watched: Any, begun: float, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether an answer to a request that began then is one too many."""
    killed: list[int] = []
    with monkeypatch.context() as patched:
        patched.setattr(os, "kill", lambda pid, _: killed.append(pid))
        watched.check(begun)
    return killed == [os.getpid()]


@pytest.mark.parametrize(
    ("passed", "step", "held_up"),
    [
        (0.1, 0, False),
        (0.1, 0.2, False),
        (0.1, 0.3, True),
        (0.1, 3600, True),
        (0.1, -3600, False),  # Triton just waits for longer
        (0.8, 0, True),
        (3600, 0, True),  # suspended: both clocks go on
    ],
)
def test_held_up(
    pulse: ModuleType,
    clocks: Clocks,
    monkeypatch: pytest.MonkeyPatch,
    passed: float,
    step: float,
    held_up: bool,
) -> None:
    watched = pulse.Pulse()
    begun = clocks.now()
    clocks.pass_by(passed)
    clocks.wall += step
    assert ends(pulse, watched, begun, monkeypatch) == held_up
    clocks.pass_by(0.1)
    assert ends(pulse, watched, begun, monkeypatch) == held_up  # all that were there
    for _ in range(30):  # a request may have been there all that time, where others have the cores
        clocks.pass_by(0.1)
        watched.beat()
    assert ends(pulse, watched, clocks.now(), monkeypatch) == held_up
    for _ in range(20):
        clocks.pass_by(0.1)
        watched.beat()
    assert not ends(pulse, watched, clocks.now(), monkeypatch)


@pytest.mark.parametrize("lost", [0.005, 0.6])
def test_a_core_lost_between_the_clocks_is_no_step(
    pulse: ModuleType, clocks: Clocks, monkeypatch: pytest.MonkeyPatch, lost: float
) -> None:
    watched = pulse.Pulse()
    begun = clocks.now()
    for _ in range(5):
        clocks.pass_by(0.05)
        clocks.lost = lost
        assert not ends(pulse, watched, begun, monkeypatch)


def test_the_clocks_are_the_machines(pulse: ModuleType) -> None:
    at_most = -pulse.now() + time.time()
    offset = pulse.wall_clock()
    at_least = time.time() - pulse.now()
    assert at_least - 0.01 <= offset <= at_most + 0.01


@pytest.mark.parametrize(
    ("machine", "variable", "threads", "seconds"),
    [
        (1, "1", None, 0.1),
        (2, "2", None, 0.1),
        (2, None, None, 0.1),
        (192, "4", None, 0.04),
        (192, "4,2", None, 0.04),
        (192, "192", 4, 0.04),
        (192, None, None, 0.2 / 192),  # nothing says that they are fewer
        (192, "", None, 0.2 / 192),
        (2, "64", None, 0.1),
    ],
)
def test_how_often_it_beats(
    pulse: ModuleType,
    clocks: Clocks,
    monkeypatch: pytest.MonkeyPatch,
    machine: int,
    variable: str | None,
    threads: int | None,
    seconds: float,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(machine)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert pulse.Pulse(threads).interval == pytest.approx(seconds)

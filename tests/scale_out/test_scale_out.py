"""One DNS name, several servers, and what a client notices of their comings and goings."""

import time
from collections.abc import Callable

import pytest

from .__main__ import measure
from .conftest import CONNECTION_AGE
from .fleet import Fleet, Replica
from .load import load

pytestmark = pytest.mark.timeout(600)  # some start three servers, which takes a minute or more


def spread(replicas: list[Replica], work: Callable[[], object]) -> list[int]:
    """How many requests each of them answers in the meantime, by its own statistics."""
    before = [replica.answered() for replica in replicas]
    work()
    return [replica.answered() - earlier for replica, earlier in zip(replicas, before, strict=True)]


def test_traffic_spreads_evenly(three: Fleet) -> None:
    with load(three.url, three.replicas[0].url) as requests:
        requests.go_on(1)  # while the client connects to all of them
        shares = spread(three.replicas, lambda: requests.go_on(2))
    print(f"{requests}; {shares}")
    assert not requests.lost
    assert min(shares) > 0.8 * max(shares), shares


def test_the_benchmark_uses_all_replicas(three: Fleet) -> None:
    """That throughput adds up is seen on a quiet machine: `python -m tests.scale_out`."""
    measured = []
    shares = spread(three.replicas, lambda: measured.append(measure(three, seconds=1)))
    print(*measured, shares)
    assert measured[0].per_second > 0
    assert min(shares) > 0.5 * max(shares), shares


def test_a_replica_that_is_killed_costs_no_answer(three: Fleet) -> None:
    with load(three.url, three.replicas[0].url) as requests:
        requests.go_on(2)
        three.kill(three.replicas[1])
        requests.go_on(2)
    print(requests)
    assert not requests.lost


def test_a_new_replica_gets_its_share_within_the_connection_age(three: Fleet) -> None:
    """Nothing fails, so nothing but the age of its connections makes the client look again."""
    with load(three.url, three.replicas[0].url) as requests:
        requests.go_on(1)
        new = three.add()
        started, before = time.monotonic(), new.answered()
        # gRPC lets a connection live up to a tenth longer; the rest is for a busy machine.
        while new.answered() == before and time.monotonic() - started < 1.1 * CONNECTION_AGE + 10:
            requests.go_on(0.1)
        found = time.monotonic() - started
        shares = spread(three.replicas, lambda: requests.go_on(2))
    print(f"{requests}; found after {found:.1f} s, then {shares}")
    assert not requests.lost
    assert shares[-1] > sum(shares) / len(shares) / 2, shares


def test_a_rolling_restart_costs_no_answer(three: Fleet) -> None:
    """SIGTERM comes as soon as the next replica is ready."""
    with load(three.url, three.replicas[0].url) as requests:
        for old in list(three.replicas):
            three.add()
            requests.go_on(1)
            three.remove(old)
        requests.go_on(1)
    print(requests)
    assert not requests.lost


def test_a_rolling_restart_with_a_pause_costs_no_request(three: Fleet) -> None:
    """Where SIGTERM comes later than the connection age, no client is there any more: nothing
    fails, and nothing is tried again."""
    with load(three.url, three.replicas[0].url, retries=0) as requests:
        for old in list(three.replicas):
            three.add()
            three.remove(old, pause=2 * CONNECTION_AGE + 2)
        requests.go_on(1)
    print(requests)
    assert not requests.lost

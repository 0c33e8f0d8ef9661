"""The fleet that all tests of this folder use, one after the other."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from . import dns, fleet

CONNECTION_AGE = 3  # seconds


@pytest.fixture(scope="package")
def all_replicas(tiny_repository: Path) -> Iterator[fleet.Fleet]:
    try:
        dns.install()
    except dns.DnsError as e:
        pytest.skip(str(e))
    with fleet.running(tiny_repository, CONNECTION_AGE) as replicas:
        yield replicas


@pytest.fixture
def three(all_replicas: fleet.Fleet) -> fleet.Fleet:
    """The tiny model on three replicas, whatever the test before has left."""
    all_replicas.scale(3)
    return all_replicas

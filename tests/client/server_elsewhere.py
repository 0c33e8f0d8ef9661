"""A pytest plugin: the tiny model is already served, at VIT_TEST_URL.

For tests/client in an environment that has the client and not the server; see test_versions.py.
"""

import os
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def tiny_server() -> SimpleNamespace:
    """Stands in for the fixture that starts the server."""
    return SimpleNamespace(url=os.environ["VIT_TEST_URL"])

"""A pytest plugin for a tiny model that is already served, at VIT_TEST_URL.

For tests/client in an environment with the client but without the server; see test_versions.py.
"""

import os
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def tiny_server() -> SimpleNamespace:
    """Replaces the fixture that starts the server."""
    return SimpleNamespace(url=os.environ["VIT_TEST_URL"])

"""What several files of this folder use."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cache(request: pytest.FixtureRequest) -> Path:
    """Where Debian's package of Prometheus is kept, for the next run."""
    return Path(request.config.cache.mkdir("prometheus"))

"""The engine and the images, once for all tests."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .bases import ROOT, Bases, bases
from .engine import TOKEN, Engine, engine

# What docker/README.md calls them.
IMAGES = {"builder": "vit-builder", "cpu": "vit-server:cpu", "gpu": "vit-server:gpu"}
IMAGES |= {"cpu-baked": "vit-server:cpu-baked"}


@pytest.fixture(scope="session")
def docker() -> Iterator[Engine]:
    with engine() as found:
        yield found


@pytest.fixture(scope="session")
def built_on(docker: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bases]:
    with bases(docker, tmp_path_factory.mktemp("bases")) as found:
        yield found


@pytest.fixture(scope="session")
def images(docker: Engine, built_on: Bases) -> dict[str, float]:
    """Every target of docker/Dockerfile, built; the seconds that each took."""
    return {target: build(docker, built_on, target, IMAGES[target]) for target in IMAGES}


def build(docker: Engine, built_on: Bases, target: str, image: str, *more: str) -> float:
    """Seconds that it took."""
    print(f"\nBuilding {image} …", end=" ", flush=True)
    arguments = [*built_on.arguments, *more]
    if target.endswith("-baked"):
        arguments += ["--build-arg=WEIGHTS=random"]  # no hub is needed
    begun = time.monotonic()
    docker(
        *("build", "-f", ROOT / "docker" / "Dockerfile", "--target", target, "-t", image),
        *(*arguments, ROOT),
        seconds=1200,
    )
    seconds = time.monotonic() - begun
    print(f"{seconds:.0f} s, {docker.size(image):.0f} MB", flush=True)
    return seconds


@pytest.fixture(scope="session")
def network(docker: Engine) -> str:
    """Ports can be published from it, also where the engine has no bridge."""
    docker("network", "create", "--label", f"{TOKEN}=1", TOKEN)
    return TOKEN


@pytest.fixture(scope="session")
def tiny(tiny_repository: Path) -> Path:
    """A model repository for containers that run as other users."""
    for path in (tiny_repository, *tiny_repository.parents):
        if path.owner() == tiny_repository.owner() and path.name.startswith(("tiny", "pytest-")):
            path.chmod(0o755)
    return tiny_repository

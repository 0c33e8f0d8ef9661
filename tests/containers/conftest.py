"""The engine and the images, once for all tests; sizes and times are told at the end."""

import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .bases import ROOT, Bases, bases
from .engine import TOKEN, Engine, engine

# Under names of their own: somebody's vit-server:cpu stays what it is.
IMAGES = {target: f"{TOKEN}:{target}" for target in ("builder", "cpu", "gpu", "cpu-baked")}
told: list[str] = []  # for the end


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.timeout(1200))  # seconds: the first one waits for the builds


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if told:
        terminalreporter.section("images")
        terminalreporter.write_line("\n".join(told))


@pytest.fixture(scope="session")
def docker() -> Iterator[Engine]:
    # SIGTERM, which CI sends, clears up like Ctrl-C does.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    with engine() as found:
        yield found
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def built_on(docker: Engine) -> Iterator[Bases]:
    begun = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="vit-bases-") as folder,
        bases(docker, Path(folder)) as found,
    ):
        told.append(f"bases: {time.monotonic() - begun:.0f} s")
        yield found
        told.append(f"stood in for: {', '.join(found.stood_in) or 'nothing'}")


@pytest.fixture(scope="session")
def images(docker: Engine, built_on: Bases) -> dict[str, str]:
    """Every target of docker/Dockerfile, built; their names."""
    for target, image in IMAGES.items():
        build(docker, built_on, target, image)
    return IMAGES


def build(docker: Engine, built_on: Bases, target: str, image: str, *more: str) -> None:
    """Build a target; what it took is told now and at the end."""
    print(f"\nBuilding {target} {' '.join(more)}…", end=" ", flush=True)
    arguments = [*built_on.arguments, *more]
    if target.endswith("-baked"):
        arguments += ["--build-arg=WEIGHTS=random"]  # no hub is needed
    begun = time.monotonic()
    docker(
        *("build", "-f", ROOT / "docker" / "Dockerfile", "--target", target, "-t", image),
        *(*arguments, ROOT),
        seconds=1200,
    )
    took = f"{time.monotonic() - begun:.0f} s, {docker.size(image):.0f} MB"
    print(took, flush=True)
    told.append(f"{target}: {took}")


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

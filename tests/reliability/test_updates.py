"""vit-builder replaces a repository while it is served or loaded."""

import contextlib
import dataclasses
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import vit_builder
import vit_builder.repository
from conftest import BIN, GOLDENS, PHOTOS, serving
from processes import started
from vit_client import Client, Prediction
from vit_server.repository import snapshot

PHOTO = (PHOTOS / "coffee.jpg").read_bytes()
Versions = tuple[vit_builder.Checkpoint, vit_builder.Checkpoint]
SETTINGS = vit_builder.Settings(precision="fp32", max_batch_size=16, top_k=12)


@pytest.fixture(scope="module")
def versions(
    tmp_path_factory: pytest.TempPathFactory,
) -> Versions:
    """Two models that differ in labels and in scores, so that a mixture is detected: the second has
    the classes in reverse and other labels."""
    first = vit_builder.load(GOLDENS / "tiny.pt")
    state = dict(first.state)
    for name in ("classifier.weight", "classifier.bias"):
        state[name] = torch.flip(state[name], [0]) * 0.5
    labels = [f"second {label}" for label in reversed(first.labels)]
    return first, dataclasses.replace(first, state=state, labels=labels)


def answer(url: str) -> list[Prediction]:
    with Client(url, timeout=60) as client:
        return client.classify(PHOTO, top_k=12)


def same(a: list[Prediction], b: list[Prediction]) -> bool:
    scores = np.abs(np.array([p.score for p in a]) - [p.score for p in b]).max()
    return [(p.label, p.index) for p in a] == [(p.label, p.index) for p in b] and scores < 1e-4


@pytest.fixture(scope="module")
def answers(
    versions: Versions,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[list[Prediction]]:
    """The results of each version, served alone."""
    found = []
    for number, version in enumerate(versions):
        folder = tmp_path_factory.mktemp(f"version{number}") / "models"
        vit_builder.build(version, SETTINGS, folder)
        with serving(folder) as server:
            found.append(answer(server.url))
    assert not same(*found)
    return found


def test_a_running_server_stays_with_what_it_started_with(
    versions: Versions,
    answers: list[list[Prediction]],
    tmp_path: Path,
) -> None:
    repository = tmp_path / "models"
    vit_builder.build(versions[0], SETTINGS, repository)
    with serving(repository) as server:
        seen: list[list[Prediction]] = []
        stop = threading.Event()

        def ask() -> None:
            with Client(server.url, timeout=60) as client:
                while not stop.is_set():
                    seen.append(client.classify(PHOTO, top_k=12))

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            for version in (versions[1], versions[0], versions[1]):
                vit_builder.build(version, SETTINGS, repository)
                time.sleep(1.5)  # Triton polls once a second
        finally:
            stop.set()
            asking.join()
        assert len(seen) > 10
        assert all(same(one, answers[0]) for one in seen)
    with serving(repository) as server:
        assert same(answer(server.url), answers[1])


@contextlib.contextmanager
def being_replaced(repository: Path, builds: list[Path], pause: float) -> Iterator[list[int]]:
    """Replace the repository repeatedly, like vit-builder; yields the count so far."""
    count = [0]
    stop = threading.Event()

    def replace() -> None:
        while not stop.wait(pause):
            with vit_builder.repository.replacing(repository) as folder:
                shutil.copytree(builds[count[0] % 2], folder, dirs_exist_ok=True)
            count[0] += 1

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        yield count
    finally:
        stop.set()
        thread.join()


@pytest.fixture
def builds(versions: Versions, tmp_path: Path) -> list[Path]:
    folders = [tmp_path / "first", tmp_path / "second"]
    for version, folder in zip(versions, folders, strict=True):
        vit_builder.build(version, SETTINGS, folder)
    return folders


def content(folder: Path) -> dict[str, bytes]:
    files = [p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_what_is_copied_is_one_version(builds: list[Path], tmp_path: Path) -> None:
    repository = tmp_path / "models"
    shutil.copytree(builds[0], repository)
    whole = [content(folder) for folder in builds]
    taken = [0, 0]
    with being_replaced(repository, builds, 0.005) as replaced:
        while min(taken) < 10 or replaced[0] < 50:
            snapshot(repository, tmp_path / "copy")
            taken[whole.index(content(tmp_path / "copy"))] += 1
            shutil.rmtree(tmp_path / "copy")
    print(f"{sum(taken)} copies while it was replaced {replaced[0]} times")


def test_a_server_that_starts_meanwhile_serves_one_version(
    builds: list[Path], answers: list[list[Prediction]], tmp_path: Path
) -> None:
    repository = tmp_path / "models"
    shutil.copytree(builds[0], repository)
    with being_replaced(repository, builds, 0.2) as replaced, serving(repository) as server:
        found = answer(server.url)
        assert replaced[0] > 5
    assert any(same(found, one) for one in answers)


def test_a_bad_new_version_leaves_the_old_one(
    versions: Versions,
    answers: list[list[Prediction]],
    tmp_path: Path,
) -> None:
    repository, bad = tmp_path / "models", tmp_path / "bad.pt"
    vit_builder.build(versions[0], SETTINGS, repository)
    before = content(repository)
    bad.write_bytes((GOLDENS / "tiny.pt").read_bytes()[:-50_000])
    command = [BIN / "vit-builder", "--checkpoint", bad, "--output", repository]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1
    assert "truncated or damaged" in result.stderr
    command = [BIN / "vit-builder", "--checkpoint", GOLDENS / "tiny.pt", "--output", repository]
    with started(command, stderr=subprocess.PIPE) as builder:
        for line in builder.stderr or ():
            if line.startswith("Comparing"):
                break
        builder.kill()  # midway
    assert content(repository) == before
    with serving(repository) as server:
        assert same(answer(server.url), answers[0])

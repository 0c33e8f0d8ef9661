"""What type checkers infer for code that uses the client."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
from pathlib import Path

import numpy as np
import numpy.typing as npt
from typing import NamedTuple

from typing_extensions import assert_type
from vit_client import Analysis, AsyncClient, Client, Prediction

Array = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]


class Card(NamedTuple):
    probabilities: Array
    embedding: Array


def program(client: Client, paths: list[Path], pixels: Pixels) -> None:
    assert_type(client.classify("a.jpg"), list[Prediction])
    assert_type(client.classify(["a.jpg", b"b"]), list[list[Prediction]])
    assert_type(client.classify(paths), list[list[Prediction]])
    assert_type(client.embed(pixels), Array)
    assert_type(client.probabilities(iter(paths)), Array)
    assert_type(client.features(path for path in paths), dict[str, Array])
    for item in client.stream(paths, task="classify", top_k=3):
        assert_type(item.result, list[Prediction])
    for other in client.stream(paths):
        assert_type(other.result, Array)
    assert_type(client.analyze("a.jpg"), Analysis)
    assert_type(client.analyze(paths, top_k=3)[0].predictions, list[Prediction])
    assert_type(client.analyze(pixels, into=Card), Card)
    assert_type(client.analyze(paths, into=Card)[0].probabilities, Array)
    for labels, vector in client.analyze(["a.jpg"]):
        assert_type(labels, list[Prediction])
        assert_type(vector, Array)
    for analysed in client.stream(paths, task="analyze"):
        assert_type(analysed.result.embedding, Array)
    for card in client.stream(paths, task="analyze", into=Card):
        assert_type(card.result, Card)


async def concurrent_program(client: AsyncClient) -> None:
    async with client as same:
        assert_type(same, AsyncClient)
    assert_type(await client.classify("a.jpg"), list[Prediction])
    assert_type(await client.analyze(["a.jpg"], into=Card), list[Card])
    async for item in client.stream(["a.jpg"], task="features"):
        assert_type(item.result, dict[str, Array])
"""

MISTAKES = """
from vit_client import Client

client = Client(port=8001)
client.classify(7)
client.stream(["a.jpg"], task="detect")
client.embed("a.jpg", top_k=3)
client.analyze("a.jpg").neck
client.stream(["a.jpg"], task="embed", into=tuple)
"""


def mypy(folder: Path, program: str) -> list[str]:
    file = folder / "program.py"
    file.write_text(program)
    ran = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", str(file)],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    return [line for line in ran.stdout.splitlines() if "error:" in line] + ran.stderr.splitlines()


def test_answers_are_typed(tmp_path: Path) -> None:
    assert mypy(tmp_path, PROGRAM) == []


def test_mistakes_are_seen(tmp_path: Path) -> None:
    lines = [int(line.split(":")[1]) for line in mypy(tmp_path, MISTAKES)]
    assert sorted(set(lines)) == [4, 5, 6, 7, 8, 9]

"""Results as text, JSON lines and CSV."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..types import Analysis
from ._common import escaped

Array = npt.NDArray[np.float32]


class Show(Protocol):
    """Writes one result to standard output."""

    def __call__(self, name: str, result: Any) -> None: ...


def as_text(task: str) -> Show:
    """Readable text."""
    describe: dict[str, Callable[[str, Any], str]] = {
        "classify": _classify_text,
        "probabilities": _probabilities_text,
        "embed": _embed_text,
        "features": _features_text,
        "analyze": _analyze_text,
    }
    return lambda name, result: print(describe[task](name, result))


def as_json(task: str, version: str) -> Show:
    """One JSON object per line, each with the model's version."""

    def show(name: str, result: Any) -> None:
        fields = _json_fields(task, result)
        print_json({"image": escaped(name), **fields, "model_version": version})

    return show


def print_json(fields: dict[str, Any]) -> None:
    """Print one line; escaped to ASCII unless standard output can encode all characters."""
    print(json.dumps(fields, ensure_ascii=sys.stdout.encoding != "utf-8"))


def as_csv(task: str) -> Show:
    """A table with a header. `classify` has a row per prediction."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    headed = False

    def show(name: str, result: Any) -> None:
        nonlocal headed
        if not headed:
            columns = (
                ["rank", "label", "index", "score"] if task == "classify" else range(len(result))
            )
            writer.writerow(["image", *columns])
            headed = True
        if task == "classify":
            for rank, guess in enumerate(result, 1):
                writer.writerow([name, rank, guess.label, guess.index, guess.score])
        else:
            writer.writerow([name, *_numbers(result)])

    return show


def _json_fields(task: str, result: Any) -> dict[str, Any]:
    if task == "classify":
        return {"predictions": [asdict(guess) for guess in result]}
    if task == "analyze":
        return {
            **_json_fields("classify", result.predictions),
            **_json_fields("embed", result.embedding),
        }
    if task == "features":
        return {key: _numbers(value) for key, value in result.items()}
    return {"embedding" if task == "embed" else "probabilities": _numbers(result)}


def _numbers(array: Array) -> list[Any]:
    """Numbers as float32 prints them: 0.1, not 0.10000000149011612."""
    numbers: list[Any] = array.astype(str).astype(float).tolist()
    return numbers


def _classify_text(name: str, result: Any) -> str:
    return "\n".join([name, *(f"  {guess.score:7.2%}  {guess.label}" for guess in result)])


def _probabilities_text(name: str, result: Array) -> str:
    best = int(result.argmax())
    bits = -float(np.sum(result * np.log2(np.maximum(result, 1e-30))))
    return (
        f"{name}  {len(result)} probabilities, highest {result[best]:.2%} at index {best}, "
        f"entropy {bits:.2f} bits"
    )


def _embed_text(name: str, result: Array) -> str:
    return f"{name}  {_vector(result)}"


def _vector(vector: Array) -> str:
    first = ", ".join(f"{number:.3f}" for number in vector[:4])
    return f"[{first}, …]  {len(vector)} numbers, length {np.linalg.norm(vector):.3f}"


def _analyze_text(name: str, result: Analysis) -> str:
    return f"{_classify_text(name, result.predictions)}\n  {_vector(result.embedding)}"


def _features_text(name: str, result: dict[str, Array]) -> str:
    return "\n".join(
        f"{name}  {key} {' × '.join(map(str, value.shape))}, "
        f"mean {value.mean():.3f}, standard deviation {value.std():.3f}"
        for key, value in result.items()
    )

"""What is asked about each image, and what the caller gets of the answers."""

from __future__ import annotations

import inspect
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .types import Analysis, Model, Task

ANSWERS = ("predictions", "probabilities", "embedding", "neck")
_OF_TASK = {
    "classify": ("predictions",),
    "probabilities": ("probabilities",),
    "embed": ("embedding",),
    "features": ("neck",),
}


@dataclass(frozen=True)
class Question:
    """One task, and the answers to an image that it asks for."""

    task: Task
    answers: tuple[str, ...]
    """Some of ANSWERS."""
    top_k: int
    """How many predictions; 0 where none are asked for."""
    into: Callable[..., Any] | None
    """What `analyze` makes of the answers, by their names."""
    request_id: str
    """Of the call, which may take several requests."""
    model_version: str = ""
    """Which model is to answer; "" where any will do."""
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1), compare=False)

    def of_model(self, version: str) -> Question:
        """The same, for this model only; its requests are numbered on."""
        return replace(self, model_version=version)

    def next_id(self) -> str:
        """For its next request: its own, and after the first one with a number, "abc-2"."""
        number = next(self._numbers)
        return self.request_id if number == 1 else f"{self.request_id}-{number}"

    @property
    def ensemble(self) -> str:
        """The one to ask. Of the two for several answers, `analyze` costs the server less."""
        return "everything" if self.into and "neck" in self.answers else self.task

    def answer_bytes(self, model: Model) -> int:
        """About how many bytes the answers to one image have."""
        sizes = {
            "predictions": 64 * model.max_top_k,
            "probabilities": 4 * model.classes,
            "embedding": 4 * model.embedding_size,
            "neck": 4 * int(np.prod(model.feature_shape)),
        }
        return sum(sizes[name] for name in self.answers)

    def one(self, answers: Mapping[str, Any]) -> Any:
        """The result for one image, writable, and without the rest of its response."""
        return self._result(
            {
                name: answer.copy() if isinstance(answer, np.ndarray) else answer
                for name, answer in answers.items()
            }
        )

    def several(self, rows: list[dict[str, Any]], model: Model) -> Any:
        """The result for a list of images, from the answers to each."""
        if self.into or "predictions" in self.answers:
            return [self.one(answers) for answers in rows]
        shapes = {
            "probabilities": (model.classes,),
            "embedding": (model.embedding_size,),
            "neck": model.feature_shape,
        }
        return self._result(
            {
                name: np.stack([answers[name] for answers in rows])
                if rows
                else np.empty((0, *shapes[name]), np.float32)
                for name in self.answers
            }
        )

    def _result(self, answers: dict[str, Any]) -> Any:
        if self.into:
            return self.into(**answers)
        if self.task == "features":
            return answers
        (answer,) = answers.values()
        return answer


def question(
    task: Task,
    top_k: int = 0,
    into: Callable[..., Any] | None = None,
    *,
    request_id: str | None = None,
    model_version: str | None = None,
) -> Question:
    """Raises ValueError where `into` does not go with the task, or has fields of other names; or
    an id or a version is none."""
    if task == "analyze":
        into = into or Analysis
        answers = _fields(into)
    elif into:
        raise ValueError(f"into goes with the task 'analyze', not with {task!r}")
    else:
        answers = _OF_TASK[task]
    return Question(
        task,
        answers,
        top_k if "predictions" in answers else 0,
        into,
        os.urandom(8).hex() if request_id is None else _checked(request_id),
        check_version(model_version),
    )


def check_version(version: Any) -> str:
    """The version, or "" for None; raises ValueError where it is none."""
    if version is None:
        return ""
    if isinstance(version, str) and re.fullmatch(r"[1-9]\d{0,17}", version):
        return version
    raise ValueError(f"model_version must be a number as text, not {version!r}")


def _checked(request_id: Any) -> str:
    if isinstance(request_id, str) and re.fullmatch(r"[!-~]{1,128}", request_id):
        return request_id
    raise ValueError(
        f"request_id must be 1 to 128 visible ASCII characters without spaces, not {request_id!r}"
    )


def _fields(into: Callable[..., Any]) -> tuple[str, ...]:
    try:
        fields = tuple(inspect.signature(into).parameters)
    except (TypeError, ValueError):  # no class, or a builtin that tells none
        fields = ()
    if not fields or not set(fields) <= set(ANSWERS):
        name = getattr(into, "__name__", repr(into))
        raise ValueError(
            f"into must be a NamedTuple or dataclass with the fields {', '.join(ANSWERS)}, "
            f"or some of them; {name} has {', '.join(fields) or 'none'}"
        )
    return fields

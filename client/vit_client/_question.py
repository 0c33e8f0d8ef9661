"""What to request for each image, and how to build the caller's result from the answers."""

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
    """One task, and the answers that it requests for each image."""

    task: Task
    answers: tuple[str, ...]
    """A subset of ANSWERS."""
    top_k: int
    """Number of predictions; 0 if none are requested."""
    into: Callable[..., Any] | None
    """What `analyze` calls with the answers as keyword arguments."""
    request_id: str
    """Id of the call, which may take several requests."""
    model_version: str = ""
    """The required model version; "" for any."""
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1), compare=False)

    def of_model(self, version: str) -> Question:
        """The same, for this model version only; request numbers continue."""
        return replace(self, model_version=version)

    def next_id(self) -> str:
        """The id of its next request: "abc", then "abc-2", and so on."""
        number = next(self._numbers)
        return self.request_id if number == 1 else f"{self.request_id}-{number}"

    @property
    def ensemble(self) -> str:
        """The ensemble to call. Of the two with several answers, `analyze` is cheaper."""
        return "everything" if self.into and "neck" in self.answers else self.task

    def answer_bytes(self, model: Model) -> int:
        """Approximate bytes of the answers for one image."""
        sizes = {
            "predictions": 64 * model.max_top_k,
            "probabilities": 4 * model.classes,
            "embedding": 4 * model.embedding_size,
            "neck": 4 * int(np.prod(model.feature_shape)),
        }
        return sum(sizes[name] for name in self.answers)

    def one(self, answers: Mapping[str, Any]) -> Any:
        """The result for one image, writable, and not keeping its whole response in memory."""
        return self._result(
            {
                name: answer.copy() if isinstance(answer, np.ndarray) else answer
                for name, answer in answers.items()
            }
        )

    def several(self, rows: list[dict[str, Any]], model: Model) -> Any:
        """The result for a list of images, from the answers for each."""
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
    """Raises ValueError if `into` does not go with the task or has other fields, or if the id or
    the version is invalid."""
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
    """The version, or "" for None; raises ValueError if it is invalid."""
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
    except (TypeError, ValueError):  # not a class, or a builtin without a signature
        fields = ()
    if not fields or not set(fields) <= set(ANSWERS):
        name = getattr(into, "__name__", repr(into))
        raise ValueError(
            f"into must be a NamedTuple or dataclass with the fields {', '.join(ANSWERS)}, "
            f"or some of them; {name} has {', '.join(fields) or 'none'}"
        )
    return fields

"""Results of one model for a whole list, even if the model is replaced during the call."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import Counter
from typing import Any

from ._engine import Engine
from ._question import Question
from .errors import BadImage, ModelChanged
from .types import Item


async def ask(engine: Engine, asked: Question, images: Any, timeout: float) -> list[Item[Any]]:
    """Items of all images, in order, all of one model.

    During a rolling update the first rows may be from one model and the last from another. Then
    the model with the most rows gets the images of the other rows; if it is gone, the next one;
    and if all are gone, all images are sent again to any model.

    Raises:
        ModelChanged: The rows are still from several models after `timeout` more seconds.
    """
    items = [item async for batch in engine.batches(asked, images, timeout) for item in batch]
    deadline = time.monotonic() + timeout
    while len(set(versions := [item.model_version for item in items if not item.error])) > 1:
        if time.monotonic() >= deadline:
            raise ModelChanged(
                f"{engine.connection.settings.target} answers with several models (versions "
                f"{', '.join(sorted(set(versions)))}), as during a rolling update; "
                f"{timeout:g} s were not enough to have all answers from one of them",
                task=asked.task,
            )
        for version, _ in Counter(versions).most_common():
            others = [item for item in items if not item.error and item.model_version != version]
            with contextlib.suppress(ModelChanged):
                await _again(engine, asked.of_model(version), items, others, timeout)
                break
        else:
            await _again(engine, asked, items, list(items), timeout)
    return items


async def _again(
    engine: Engine, asked: Question, items: list[Item[Any]], these: list[Item[Any]], timeout: float
) -> None:
    """Replace the items `these` by new ones."""
    old = iter(these)
    images = [item._sent or item.image for item in these]
    async for batch in engine.batches(asked, images, timeout):
        for item, place in zip(batch, old, strict=False):
            items[place.index] = _moved(item, place.index)


def _moved(item: Item[Any], index: int) -> Item[Any]:
    error = item.error
    if error is not None:
        error = BadImage(
            error.reason,
            index=index,
            name=error.name,
            task=error.task,
            details=error.details,
            request_id=error.request_id,
        )
    return dataclasses.replace(item, index=index, error=error)

"""classify, probabilities, embed, features and analyze: a result for each image."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import shortened
from ..types import Item
from . import _show
from ._common import IMAGES_FAILED, OK, connect, progress, warn_if_untrained
from ._inputs import Images, expand
from ._pictures import check_picture
from ._report import error
from ._sheet import Sheet

# Classes shown under a thumbnail.
_BEST = 3


def answer(options: Namespace) -> int:
    """Print the results; returns the exit code."""
    names, failed = expand(options)
    sheet = _sheet(options, names)
    with connect(options) as client:
        warn_if_untrained(client)
        # All output is from one model, even if it is replaced during the run.
        version = client.model().version
        show = _shower(options, version)
        stream = client.stream(
            Images(names, kept=sheet is not None),
            task=options.task,
            top_k=getattr(options, "top_k", 5),
            on_error="return",
            progress=progress(),
            model_version=version or None,
        )
        for item, name in zip(stream, names, strict=True):
            if item.error is None:
                show(name, item.result)
            else:
                error(f"{shortened(name)}: {item.error.reason}")
                failed = True
            if sheet:
                _draw(sheet, item)
    if sheet:
        sheet.save()
    return IMAGES_FAILED if failed else OK


def _sheet(options: Namespace, names: Sequence[str]) -> Sheet | None:
    if getattr(options, "sheet", None) is None:
        return None
    path = Path(options.sheet)
    # The sheet of an earlier run may be among the images.
    hint = f"choose another name, or leave it out of its folder with --exclude {path.name}"
    check_picture(path, names, hint)
    return Sheet(path, names, min(options.top_k, _BEST))


def _draw(sheet: Sheet, item: Item[Any]) -> None:
    if item.error:
        sheet.add(item.image, problem=item.error.reason)
    else:
        best = item.result[:_BEST]
        sheet.add(item.image, [(guess.label, f"{guess.score:.1%}") for guess in best])


def _shower(options: Namespace, version: str) -> _show.Show:
    if options.json:
        return _show.as_json(options.task, version)
    if getattr(options, "csv", False):
        return _show.as_csv(options.task)
    return _show.as_text(options.task)

"""classify, probabilities, embed, features and analyze: an answer for each image."""

from __future__ import annotations

from argparse import Namespace

from ..errors import shortened
from . import _show
from ._common import IMAGES_FAILED, OK, connect, progress, warn_if_untrained
from ._inputs import Images, expand
from ._report import error


def answer(options: Namespace) -> int:
    """Print the answers; returns the exit code."""
    names, failed = expand(options)
    with connect(options) as client:
        warn_if_untrained(client)
        # What comes out is of one model, though another may take its place meanwhile.
        version = client.model().version
        show = _shower(options, version)
        stream = client.stream(
            Images(names),
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
    return IMAGES_FAILED if failed else OK


def _shower(options: Namespace, version: str) -> _show.Show:
    if options.json:
        return _show.as_json(options.task, version)
    if getattr(options, "csv", False):
        return _show.as_csv(options.task)
    return _show.as_text(options.task)

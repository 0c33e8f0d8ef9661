"""What the commands do. Each returns how many images failed."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from importlib.util import find_spec

from .._progress import Progress
from .._sync import Client
from ..types import ImageLike
from . import _show
from ._inputs import expand, image
from ._report import error, warning


def connect(options: Namespace) -> Client:
    """A client as the options ask for."""
    return Client(options.url, timeout=options.timeout)


def answer(options: Namespace) -> int:
    """classify, probabilities, embed, features: print an answer for each image."""
    names = expand(options.images)
    show = _shower(options)
    failed = 0
    with connect(options) as client:
        warn_if_untrained(client)
        stream = client.stream(
            Images(names),
            task=options.task,
            top_k=getattr(options, "top_k", 5),
            on_error="return",
            progress=progress(),
        )
        for item, name in zip(stream, names, strict=True):
            if item.error is None:
                show(name, item.result)
            else:
                error(f"{name}: {item.error.reason}")
                failed += 1
    return failed


class Images(Iterable[ImageLike]):
    """The images of a list of names, with a length for the progress bar."""

    def __init__(self, names: list[str]) -> None:
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[ImageLike]:
        return map(image, self._names)


def warn_if_untrained(client: Client) -> None:
    """Numbers of a random model look like any others."""
    if not client.model().trained:
        warning("untrained weights: labels mean nothing")


def progress() -> Progress:
    """A bar where someone is watching, and the answers do not go to the same terminal."""
    return sys.stderr.isatty() and not sys.stdout.isatty() and find_spec("tqdm") is not None


def _shower(options: Namespace) -> _show.Show:
    if options.json:
        return _show.as_json(options.task)
    if getattr(options, "csv", False):
        return _show.as_csv(options.task)
    return _show.as_text(options.task)

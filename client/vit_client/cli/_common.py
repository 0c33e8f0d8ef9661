"""What several commands need."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec

from .._progress import Progress
from .._sync import Client
from ..types import ImageLike
from ._inputs import image
from ._report import warning

# Exit codes; main maps errors to the others.
OK, IMAGES_FAILED, USAGE, NO_ANSWER, REFUSED, UNWRITABLE, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130


class CannotWrite(Exception):
    """The output cannot be written: a full disk, no permission."""


def reason(error: OSError) -> str:
    """What went wrong, without the name of the file that it went wrong with."""
    return os.strerror(error.errno).lower() if error.errno else str(error)


def escaped(name: str) -> str:
    """A file name that every format can hold. Not all bytes of a name need be UTF-8: Python has
    surrogates for the others, which are not text."""
    return name.encode("utf-8", "backslashreplace").decode()


def connect(options: Namespace) -> Client:
    """A client as the options ask for."""
    return Client(options.url, timeout=options.timeout)


class Images(Iterable[ImageLike]):
    """The images of a list of names, with a length for the progress bar."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[ImageLike]:
        return map(image, self._names)


def warn_if_untrained(client: Client) -> None:
    """The numbers of a random model look like any others."""
    if not client.model().trained:
        warning("untrained weights: labels mean nothing")


def progress(*, output_on_stdout: bool = True) -> Progress:
    """A bar where someone is watching, unless the answers go to the same terminal."""
    hidden = output_on_stdout and sys.stdout.isatty()
    return sys.stderr.isatty() and not hidden and find_spec("tqdm") is not None

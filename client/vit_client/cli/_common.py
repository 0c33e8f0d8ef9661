"""What several commands need."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from importlib.util import find_spec

from .._progress import Progress
from .._sync import Client
from ._report import warning

# Exit codes; main maps errors to the others.
OK, IMAGES_FAILED, USAGE, NO_ANSWER, REFUSED, UNWRITABLE, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130


class CannotWrite(Exception):
    """The output cannot be written: a full disk, no permission."""


class NothingLeft(Exception):
    """There is nothing to ask about, and why has been told.

    Attributes:
        code: the exit code.
    """

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


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


def warn_if_untrained(client: Client) -> None:
    """The numbers of a random model look like any others."""
    if not client.model().trained:
        warning("untrained weights: labels are meaningless")


def progress(*, output_on_stdout: bool = True) -> Progress:
    """A bar where someone is watching, unless the answers go to the same terminal."""
    hidden = output_on_stdout and sys.stdout.isatty()
    return sys.stderr.isatty() and not hidden and find_spec("tqdm") is not None

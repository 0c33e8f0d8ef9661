"""Helpers shared by several commands."""

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
    """There are no images to process; the reason has been reported.

    Attributes:
        code: the exit code.
    """

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def reason(error: OSError) -> str:
    """What went wrong, without the file name."""
    return os.strerror(error.errno).lower() if error.errno else str(error)


def escaped(name: str) -> str:
    """A file name that every format can hold. The bytes of a name need not be UTF-8: Python decodes
    the others to surrogates, which are not valid text."""
    return name.encode("utf-8", "backslashreplace").decode()


def connect(options: Namespace) -> Client:
    """A client configured by the options."""
    return Client(options.url, timeout=options.timeout)


def warn_if_untrained(client: Client) -> None:
    """Warn, because the output of a random model looks like any other."""
    if not client.model().trained:
        warning("untrained weights: labels are meaningless")


def progress(*, output_on_stdout: bool = True) -> Progress:
    """A progress bar if standard error is a terminal, unless the results go to a terminal too."""
    hidden = output_on_stdout and sys.stdout.isatty()
    return sys.stderr.isatty() and not hidden and find_spec("tqdm") is not None

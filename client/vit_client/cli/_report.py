"""What goes to standard error."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from typing import TextIO


def drop(stream: TextIO) -> None:
    """Forget what could not be written: Python tries again at exit, and fails for it."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def note(message: str) -> None:
    """Something to know."""
    # On a terminal, over the progress bar, which then draws itself anew below.
    clear = "\r\033[K" if sys.stderr.isatty() else ""
    try:
        print(f"{clear}vit-client: {message}", file=sys.stderr, flush=True)
    except OSError:  # a full disk, or nobody reads it: the answers still count
        drop(sys.stderr)


def error(message: str) -> None:
    """Something failed."""
    note(message)


def warning(message: str) -> None:
    """Something is not as it should be, but the answer stands."""
    note(f"warning: {message}")


class Warnings(logging.Handler):
    """What the SDK warns of, as the command's own warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        warning(record.getMessage())

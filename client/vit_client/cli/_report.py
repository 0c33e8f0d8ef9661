"""Messages on standard error."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from typing import TextIO


def drop(stream: TextIO) -> None:
    """Discard unwritten output, which Python would otherwise flush, and fail on, at exit."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def note(message: str) -> None:
    """Report something worth knowing."""
    # On a terminal, overwrite the progress bar, which redraws itself below.
    clear = "\r\033[K" if sys.stderr.isatty() else ""
    try:
        print(f"{clear}vit-client: {message}", file=sys.stderr, flush=True)
    except OSError:  # a full disk or a closed pipe: the results still count
        drop(sys.stderr)


def error(message: str) -> None:
    """Report a failure."""
    note(message)


def warning(message: str) -> None:
    """Report a problem that does not affect the result."""
    note(f"warning: {message}")


class Warnings(logging.Handler):
    """Reports the SDK's warnings as the command's own."""

    def emit(self, record: logging.LogRecord) -> None:
        warning(record.getMessage())

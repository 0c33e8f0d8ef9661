"""Setup and errors of standard input, output and error."""

from __future__ import annotations

import io
import os
import sys
from typing import TextIO

from ._common import CannotWrite, reason
from ._report import drop


class Enough(Exception):
    """The reader of standard output has closed the pipe, like `| head`."""


class CannotPrint(CannotWrite):
    """Standard output cannot be written."""


class Output(io.TextIOBase):
    """Standard output, with errors that are distinct from those of files."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """See io.TextIOBase."""
        try:
            return self._stream.write(text)
        except OSError as error:
            raise self._told(error) from None

    def flush(self) -> None:
        """See io.TextIOBase."""
        try:
            self._stream.flush()
        except OSError as error:
            raise self._told(error) from None

    def isatty(self) -> bool:
        """See io.TextIOBase."""
        return self._stream.isatty()

    @property
    def encoding(self) -> str:  # type: ignore[override]  # a plain attribute there
        """See io.TextIOBase."""
        return self._stream.encoding

    def _told(self, error: OSError) -> Exception:
        drop(self._stream)
        if isinstance(error, BrokenPipeError):
            return Enough()
        return CannotPrint(f"standard output cannot be written ({reason(error)})")


def prepare() -> None:
    """Make every file name printable, and replace closed streams by /dev/null."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: PTH123, SIM115
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

"""Standard input, output and error, as the command needs them."""

from __future__ import annotations

import io
import os
import sys
from typing import TextIO

from ._common import CannotWrite, reason
from ._report import drop


class Enough(Exception):
    """Whoever reads standard output has seen enough, like `| head`."""


class CannotPrint(CannotWrite):
    """Standard output cannot be written."""


class Output(io.TextIOBase):
    """Standard output, whose errors are told apart from those of files."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """As of any stream."""
        try:
            return self._stream.write(text)
        except OSError as error:
            raise self._told(error) from None

    def flush(self) -> None:
        """As of any stream."""
        try:
            self._stream.flush()
        except OSError as error:
            raise self._told(error) from None

    def isatty(self) -> bool:
        """As of any stream."""
        return self._stream.isatty()

    @property
    def encoding(self) -> str:  # type: ignore[override]  # a plain attribute there
        """As of any stream."""
        return self._stream.encoding

    def _told(self, error: OSError) -> Exception:
        drop(self._stream)
        if isinstance(error, BrokenPipeError):
            return Enough()
        return CannotPrint(f"standard output cannot be written ({reason(error)})")


def prepare() -> None:
    """No name is unprintable, and a stream that is closed is as good as /dev/null."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: PTH123, SIM115
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

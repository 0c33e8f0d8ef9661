"""The images named on the command line."""

from __future__ import annotations

import glob
import os
import re
import stat
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import BinaryIO, cast

from ..errors import ConfigurationError, shortened
from ..types import ImageLike
from ._common import IMAGES_FAILED, USAGE, NothingLeft, reason
from ._folders import images_below, what_was_skipped
from ._report import error, note

STDIN = "-"

_LIST_BYTES = 1 << 28  # maximum size of a list of names: some millions

# Never a glob pattern, whatever it contains: the client reports what to do instead.
_URL = re.compile(r"[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)


def expand(options: Namespace) -> tuple[list[str], bool]:
    """Names of all requested images: files, the images below folders, the matches of patterns, and
    the names in a list; in order, without duplicates. A file that does not exist is kept, to be
    reported later like any other unreadable one. All other errors are reported here.

    Returns:
        The names, and whether an error was reported.

    Raises:
        NothingLeft: There are no images to process; the reason has been reported.
        ConfigurationError: The list of names cannot be used.
    """
    if STDIN in options.images and options.files_from == STDIN:
        raise ConfigurationError("standard input is either an image or a list of names, not both")
    listed = _listed(options.files_from, null=options.null) if options.files_from else []
    if not listed and not options.images:
        raise ConfigurationError(f"{_shown(options.files_from)}: it contains no names")
    asked = _Asked()
    for argument in options.images:
        asked.add(argument, options.exclude)
    asked.names.update(dict.fromkeys(listed))
    if not asked.names:
        raise NothingLeft(IMAGES_FAILED if asked.unreadable else USAGE)
    return list(asked.names), asked.unreadable or asked.mistaken


class _Asked:
    def __init__(self) -> None:
        self.names: dict[str, None] = {}
        self.unreadable = False
        self.mistaken = False

    def add(self, argument: str, exclude: Sequence[str]) -> None:
        exists = os.path.lexists(argument)  # Path's method raises for a name that is too long
        if not argument:
            self._tell_mistake("''", "an empty name: is a variable of your shell unset?")
        elif os.path.isdir(argument):  # noqa: PTH112
            self._add_folder(argument, exclude)
        elif glob.has_magic(argument) and not exists and not _URL.match(argument):
            self._add_matches(argument)
        else:
            self.names[argument] = None

    def _add_folder(self, folder: str, exclude: Sequence[str]) -> None:
        found = images_below(folder, exclude)
        if skipped := what_was_skipped(found):
            note(f"skipped in {shortened(folder)}: {skipped}")
        for name, why in found.unreadable:
            error(f"{shortened(name)}: {why}")
            self.unreadable = True
        if not found.images and not found.unreadable:
            self._tell_mistake(folder, "no images in this folder")
        self.names.update(dict.fromkeys(found.images))

    def _add_matches(self, pattern: str) -> None:
        matches = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207  # absolute too
        matches = [match for match in matches if not os.path.isdir(match)]  # noqa: PTH112
        if "**" in pattern:
            matches = [match for match in matches if not _goes_in_circles(match)]
        if not matches:
            self._tell_mistake(pattern, "no file matches this pattern")
        self.names.update(dict.fromkeys(matches))

    def _tell_mistake(self, name: str, why: str) -> None:
        error(f"{shortened(name)}: {why}")
        self.mistaken = True


def _goes_in_circles(path: str) -> bool:
    """Whether a link in the path points back to a folder in it: `**` follows it 40 times."""
    real = [os.path.realpath(folder) for folder in Path(path).parents]
    return len(set(real)) < len(real)


def _listed(file: str, *, null: bool) -> list[str]:
    """The names in `file`, one per line or NUL-terminated."""
    shown = _shown(file)
    try:
        with _stdin("a list of names") if file == STDIN else Path(file).open("rb") as opened:
            data = _read_up_to(opened, _LIST_BYTES + 1)
    except OSError as failure:
        raise ConfigurationError(f"{shown}: {reason(failure)}") from None
    if len(data) > _LIST_BYTES:
        raise ConfigurationError(
            f"{shown}: more than {_LIST_BYTES >> 20} MiB: is it a list of names?"
        )
    if not null and b"\0" in data:
        raise ConfigurationError(
            f"{shown}: it contains NULs: add -0 if they end the names, or is it not a list "
            "of names?"
        )
    if null and b"\0" not in data and b"\n" in data:
        raise ConfigurationError(f"{shown}: it has one name per line: leave out -0")
    if null:
        names = data.split(b"\0")
    else:  # Windows: a byte-order mark, and lines that end with \r\n
        lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        names = [line.removesuffix(b"\r") for line in lines]
    # In a list, "-" is a file of that name, so "./-"; "-" alone would be standard input.
    return [os.fsdecode(name) if name != b"-" else "./-" for name in names if name.strip()]


def _shown(file: str) -> str:
    return "standard input" if file == STDIN else shortened(file)


def _read_up_to(file: BinaryIO | FileIO, most: int) -> bytes:
    parts: list[bytes] = []
    while most > 0 and (part := file.read(min(most, 1 << 20))):
        parts.append(part)
        most -= len(part)
    return b"".join(parts)


def image(name: str, *, kept: bool = False) -> ImageLike:
    """The value to pass to the client for a name from `expand`. If `kept`, files that can be read
    only once, like a pipe, are a Source too."""
    once = name == STDIN or (kept and _is_pipe(name))
    return cast("BinaryIO", Source(name)) if once else name


def _is_pipe(name: str) -> bool:
    try:
        return stat.S_ISFIFO(Path(name).stat().st_mode)
    except (OSError, ValueError):  # it does not exist; or a NUL in the name
        return False


class Source:
    """Standard input or a file, as a file object that keeps what the client reads."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._file: FileIO | None = None
        self._parts: list[bytes] = []

    @property
    def data(self) -> bytes:
        """The bytes read so far."""
        return b"".join(self._parts)

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes. Opens the file first, which may block forever for a pipe."""
        try:
            if self._file is None:
                self._file = _stdin("an image") if self.name == STDIN else FileIO(self.name)
            part: bytes = self._file.read(size)
        except OSError as failure:
            raise OSError(reason(failure)) from None  # without the name
        if not part:
            self._file.close()
        self._parts.append(part)
        return part

    def tell(self) -> int:
        """Always 0, because it cannot seek back."""
        return 0


def _stdin(what: str) -> FileIO:
    """Standard input. Not sys.stdin.buffer: Python cannot exit while a thread blocks in it."""
    if sys.stdin.isatty():
        raise ConfigurationError(f"'-' reads {what} from standard input, which is a terminal")
    return FileIO(sys.stdin.fileno(), closefd=False)


class Images(Iterable[ImageLike]):
    """The images for a list of names, with a length for the progress bar."""

    def __init__(self, names: Sequence[str], *, kept: bool = False) -> None:
        self._names = names
        self._kept = kept

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[ImageLike]:
        return (image(name, kept=self._kept) for name in self._names)

"""The images that a command line names."""

from __future__ import annotations

import glob
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigurationError
from ..types import ImageLike

STDIN = "-"

_SUFFIXES = tuple(
    f".{name}"
    for name in (
        *("avif", "bmp", "gif", "heic", "heif", "jfif", "jp2", "jpe", "jpeg", "jpg", "pbm"),
        *("pgm", "png", "pnm", "ppm", "qoi", "tga", "tif", "tiff", "webp"),
    )
)


def expand(arguments: Sequence[str]) -> list[str]:
    """Names of all images: a file as it is, the images below a folder, the matches of a pattern,
    in order and each once. A file that does not exist stays, to be reported like any other that
    cannot be read.

    Raises:
        ConfigurationError: A folder has no images, or a pattern no match.
    """
    names: dict[str, None] = {}
    for argument in arguments:
        path = Path(argument)
        if argument == STDIN or path.is_file():
            found = [argument]
        elif path.is_dir():
            found = _below(path)
            if not found:
                raise ConfigurationError(f"no images in folder {argument}")
        elif glob.has_magic(argument):
            matches = sorted(glob.glob(argument, recursive=True))  # noqa: PTH207  # absolute too
            found = [match for match in matches if Path(match).is_file()]
            if not found:
                raise ConfigurationError(f"no file matches {argument}")
        else:
            found = [argument]
        names.update(dict.fromkeys(found))
    return list(names)


def image(name: str) -> ImageLike:
    """What to give to the client for a name from `expand`."""
    if name != STDIN:
        return name
    if sys.stdin.isatty():
        raise ConfigurationError("'-' reads an image from standard input, which is a terminal")
    return sys.stdin.buffer.read()


def _below(folder: Path) -> list[str]:
    return sorted(
        str(path)
        for path in folder.rglob("*")
        if path.name.lower().endswith(_SUFFIXES)
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )

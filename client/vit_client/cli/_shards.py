"""The shards that are named, and what is in them."""

from __future__ import annotations

import glob
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from ..errors import ConfigurationError, shortened
from . import _arrow, _tar
from ._remote import is_url, matches, opened
from ._sample import Sample
from ._tables import pyarrow

_TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_TABLES = (".parquet", ".arrow", ".feather")

# Bytes at either end of a shard that tell it from others.
_ENDS = 1 << 16

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def is_shard(name: str) -> bool:
    """Whether it is one by its name."""
    return name.lower().endswith((*_TARS, *_TABLES))


def expand(arguments: Sequence[str]) -> list[str]:
    """The shards that are named, without duplicates: {00..99} is expanded, then patterns.

    Raises:
        ConfigurationError: A name is no shard's, or a pattern has no match; or two shards have the
            same file name, and so would their parts.
    """
    names: dict[str, None] = {}
    for argument in arguments:
        for name in [argument] if os.path.lexists(argument) else _braces(argument):
            found = [name]
            if os.path.lexists(name):  # even if it has brackets
                pass
            elif glob.has_magic(name) and not is_url(name):
                found = sorted(glob.glob(name, recursive=True))  # noqa: PTH207
            elif glob.has_magic(name):
                found = matches(name)
            if not found:
                raise ConfigurationError(f"{shortened(name)}: no file matches this pattern")
            names.update(dict.fromkeys(found))
    seen: dict[str, str] = {}
    for name in names:
        if not is_shard(name):
            raise ConfigurationError(
                f"{shortened(name)} is no shard ({', '.join((*_TARS, *_TABLES))}); for images and "
                "folders, -o FILE writes one file"
            )
        if (other := seen.setdefault(stem(name), name)) != name:
            raise ConfigurationError(
                f"{shortened(other)} and {shortened(name)} would have parts of the same name: give "
                "each a folder of its own, in two runs"
            )
    return list(names)


def stem(shard: str) -> str:
    """The file name without what says that it is a shard."""
    name = shard.rpartition("/")[2]
    suffix = next(s for s in sorted((*_TARS, *_TABLES), key=len)[::-1] if name.lower().endswith(s))
    return name[: -len(suffix)]


def _braces(text: str) -> Iterator[str]:
    """Like a shell's: {00000..00099} and {a,b}."""
    parts: list[list[str]] = []
    end = 0
    for found in _BRACES.finditer(text):
        parts.append([text[end : found.start()]])
        parts.append(_choices(found[1]) or [found[0]])
        end = found.end()
    parts.append([text[end:]])
    return ("".join(chosen) for chosen in product(*parts))


def _choices(inside: str) -> list[str]:
    if numbers := _RANGE.fullmatch(inside):
        first, last = int(numbers[1]), int(numbers[2])
        width = len(numbers[1]) if numbers[1].startswith("0") else 0
        step = 1 if last >= first else -1
        return [f"{number:0{width}}" for number in range(first, last + step, step)]
    return inside.split(",") if "," in inside else []


def samples(
    shard: str, keep: Sequence[str], image_column: str | None, most: int
) -> Iterator[Sample]:
    """The samples of a shard, in order, a few at a time in memory.

    Args:
        keep: fields of a tar (by suffix: "json") or columns of a table to keep.
        image_column: the column of images in a table; found by its type if not given.
        most: bytes of an image; larger ones in a tar are not read.

    Raises:
        CutShort: The shard is damaged from here on.
        ConfigurationError: It cannot be opened, or has no such columns.
    """
    with opened(shard) as file:
        if shard.lower().endswith(_TARS):
            yield from _tar.samples(file, keep, most)
        else:
            yield from _arrow.samples(shard, file, keep, image_column)


def column_type(shard: str, name: str) -> Any:
    """The Arrow type in which a kept field is written: a table's own; text or bytes of a tar."""
    if not shard.lower().endswith(_TARS):
        return _arrow.column_type(shard, name)
    pa = pyarrow()
    return pa.string() if name in _tar.TEXTS else pa.binary()


def fingerprint(shard: str) -> str:
    """Its size, and a checksum of its first and last bytes: another shard has another one.

    Raises:
        ConfigurationError: It cannot be opened.
    """
    with opened(shard) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        ends = file.read(_ENDS)
        file.seek(max(0, size - _ENDS))
        return f"{size} {zlib.crc32(ends + file.read(_ENDS)):08x}"

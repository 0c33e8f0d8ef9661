"""Samples of tar shards (WebDataset) and of Parquet and Arrow files, one after the other."""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from itertools import product
from pathlib import Path, PurePosixPath
from typing import IO, Any

from ..errors import ConfigurationError, Unavailable, VitClientError, shortened
from ._common import reason
from ._folders import SUFFIXES
from ._tables import pyarrow

_TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_TABLES = (".parquet", ".arrow", ".feather")

# Fields of tar shards that are text; others are kept as bytes.
_TEXTS = frozenset(("cls", "caption", "html", "id", "json", "label", "md", "txt", "url", "xml"))

# Bytes at either end of a shard that tell it from others.
_ENDS = 1 << 16

# Rows of a table that are in memory at a time.
_ROWS = 8

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


@dataclass
class Sample:
    """One image of a shard, or why there is none."""

    key: str
    image: bytes | Unusable
    kept: dict[str, Any] = field(default_factory=dict)
    """The chosen fields or columns, by name."""


class Unusable:
    """Stands for an image that cannot be had: the client reports its reason."""

    def __init__(self, why: str) -> None:
        self._why = why

    def read(self, _: int = -1) -> bytes:
        """Always fails."""
        raise OSError(self._why)


class CutShort(Exception):
    """The shard is damaged from here on; what was whole has been yielded.

    Attributes:
        told: whether a sample with the reason has been yielded, too.
    """

    def __init__(self, why: str, *, told: bool = False) -> None:
        super().__init__(why)
        self.told = told


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
                found = _remote_matches(name)
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
    with _opened(shard) as file:
        if shard.lower().endswith(_TARS):
            yield from _tar(file, keep, most)
        else:
            yield from _table(shard, file, keep, image_column)


@contextmanager
def _opened(shard: str) -> Iterator[IO[bytes]]:
    if not is_url(shard):
        try:
            file: IO[bytes] = Path(shard).open("rb")  # noqa: SIM115
        except OSError as failure:
            raise ConfigurationError(f"{shortened(shard)}: {reason(failure)}") from None
        with file:
            yield file
        return
    with remote_errors(shard), filesystem(shard).open(shard) as file:
        yield file


def is_url(name: str) -> bool:
    """Whether it is an address for fsspec, and not a file of this machine."""
    return bool(_URL.match(name))


@contextmanager
def remote_errors(url: str) -> Iterator[None]:
    """The errors of fsspec's packages are of any kind.

    Raises:
        ConfigurationError: There is no such file.
        Unavailable: Anything else.
    """
    try:
        yield
    except (CutShort, VitClientError, GeneratorExit):
        raise
    except FileNotFoundError:
        raise ConfigurationError(f"{shortened(url)}: no such file or bucket") from None
    except Exception as failure:
        why = str(failure) or type(failure).__name__
        raise Unavailable(f"{shortened(url)}: {shortened(why)}") from failure


def filesystem(url: str) -> Any:
    """What fsspec opens this URL with; it takes credentials from where its packages look for them.

    Raises:
        ConfigurationError: fsspec or the package for this kind is not installed.
    """
    try:
        fsspec = import_module("fsspec")
        return fsspec.core.url_to_fs(url)[0]
    except (ImportError, ValueError) as error:
        raise ConfigurationError(
            f"{shortened(url)}: needs fsspec and its package for this kind of address: pip install "
            f'"vit-client[remote]" s3fs (or gcsfs, …) ({error})'
        ) from None


def _remote_matches(url: str) -> list[str]:
    files = filesystem(url)
    with remote_errors(url):
        return sorted(files.unstrip_protocol(match) for match in files.glob(url))


# -- tar ---------------------------------------------------------------------------------------


def _tar(file: IO[bytes], keep: Sequence[str], most: int) -> Iterator[Sample]:
    """By WebDataset's rule: neighbours whose path up to the first dot of the file name is the same
    are one sample, and the rest of the name tells its field."""
    key = ""
    fields: dict[str, bytes | Unusable] = {}
    at = ""  # the file that is being read
    try:
        with tarfile.open(fileobj=_unpacked(file), mode="r|", tarinfo=_Member) as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # it would keep all of them
                base, name = _split(member.name)
                link = (member.issym() or member.islnk()) and _is_image(name)
                if not (member.isfile() or link) or _is_litter(member.name):
                    continue
                at = member.name
                if fields and (base != key or name in fields):
                    yield _sample(key, fields, keep)
                    fields = {}
                key = base
                if link:
                    fields[name] = Unusable(f"is a link, to {member.linkname}")
                elif _is_image(name) and member.size > most:
                    fields[name] = Unusable(
                        f"is {member.size >> 20} MiB, too large (the server accepts {most >> 20})"
                    )
                elif _is_image(name) or name in keep:
                    opened = archive.extractfile(member)
                    fields[name] = _whole(opened.read() if opened else b"", member.size)
                else:
                    fields.setdefault(name, b"")
                at = ""
            _only_zeros(archive.fileobj)
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError, _Short) as failure:
        if isinstance(failure, OSError) and failure.errno:  # the disk's or network's
            raise
        if at:
            yield Sample(key, Unusable(f"the shard is cut short or damaged in {at}"))
            raise CutShort(f"is cut short or damaged in {at}", told=True) from None
        if fields:
            yield _sample(key, fields, keep)
        where = f"after {key}" if key else "at its beginning, or is no tar archive"
        raise CutShort(f"is cut short or damaged {where}") from None
    if fields:
        yield _sample(key, fields, keep)


def _unpacked(file: Any) -> Any:
    """What a compressed file contains; of all streams in it, and with their checksums checked,
    which tarfile does not do."""
    buffered = file if hasattr(file, "peek") else io.BufferedReader(file)
    begin = buffered.peek(6)
    for magic, opened in ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ", lzma.open)):
        if begin.startswith(magic):
            return opened(buffered)
    return buffered


def _only_zeros(file: Any) -> None:
    """Nothing comes after the end of an archive: what looks like it may be a hole."""
    while part := file.read(1 << 20):
        if part.strip(b"\0"):
            raise _Short


class _Short(Exception):
    """The archive ends where it should not."""


class _Member(tarfile.TarInfo):
    """A file of an archive. tarfile takes anything that is not one for the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _Member:
        """See tarfile.TarInfo."""
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the zeros at the end
            raise
        except tarfile.HeaderError as failure:
            raise _Short from failure


def _whole(data: bytes, size: int) -> bytes:
    if len(data) < size:
        raise _Short
    return data


def _is_litter(name: str) -> bool:
    """Files that say something of the shard, or that an operating system has put there."""
    file = PurePosixPath(name).name
    return file.startswith("._") or (file.startswith("__") and file.endswith("__"))


def _split(path: str) -> tuple[str, str]:
    folder, slash, file = path.rpartition("/")
    base, _, name = file.partition(".")
    return f"{folder}{slash}{base}", name.lower()


def _is_image(name: str) -> bool:
    return f".{name.rpartition('.')[2]}" in SUFFIXES


def _sample(key: str, fields: dict[str, bytes | Unusable], keep: Sequence[str]) -> Sample:
    kept = {}
    for name in keep:
        data = fields.get(name)
        if isinstance(data, bytes):
            kept[name] = data.decode("utf-8", "backslashreplace") if name in _TEXTS else data
    images = [name for name in fields if _is_image(name)]
    if not images:
        found = ", ".join(sorted(fields))
        return Sample(key, Unusable(f"has no image, but {found}"), kept)
    return Sample(key, fields[images[0]], kept)


# -- tables ------------------------------------------------------------------------------------


def _table(
    shard: str, file: IO[bytes], keep: Sequence[str], image_column: str | None
) -> Iterator[Sample]:
    pa = pyarrow()
    try:
        schema, batches = _batches(shard, file)
    except (pa.ArrowException, OSError) as failure:
        if isinstance(failure, OSError) and failure.errno:
            raise
        raise CutShort(f"cannot be read ({failure})") from None
    column = image_column or _image_column(shard, schema)
    if missing := [name for name in (column, *keep) if name not in schema.names]:
        raise ConfigurationError(
            f"{shortened(shard)} has no column {missing[0]!r}, but {', '.join(schema.names)}"
        )
    if not _has_images(kind := schema.field(column).type):
        raise ConfigurationError(
            f"{shortened(shard)}: column {column!r} is of {kind}, not bytes, or a struct of them"
        )
    row = 0
    try:
        for batch in batches:
            for values in batch.select(list(dict.fromkeys([column, *keep]))).to_pylist():
                image: Any = values[column]
                path = image.get("path") if isinstance(image, dict) else None
                image = image.get("bytes") if isinstance(image, dict) else image
                data = image if isinstance(image, bytes) and image else Unusable("has no bytes")
                yield Sample(path or str(row), data, {name: values[name] for name in keep})
                row += 1
    except (pa.ArrowException, OSError) as failure:
        if isinstance(failure, OSError) and failure.errno:
            raise
        raise CutShort(f"is cut short or damaged after row {row} ({failure})") from None


def _batches(shard: str, file: IO[bytes]) -> tuple[Any, Iterator[Any]]:
    """The schema, and record batches of a few rows."""
    pa = pyarrow()
    if shard.lower().endswith(".parquet"):
        # Through a buffer, page by page: a row group may have gigabytes of images.
        parquet = pyarrow("parquet").ParquetFile(file, buffer_size=1 << 20)
        return parquet.schema_arrow, parquet.iter_batches(batch_size=_ROWS)
    if not is_url(shard):
        file = pa.memory_map(shard)
    try:
        stored = pa.ipc.open_file(file)
        whole = (stored.get_batch(number) for number in range(stored.num_record_batches))
    except pa.ArrowInvalid:  # Hugging Face's datasets are streams
        file.seek(0)
        stored = whole = pa.ipc.open_stream(file)
    return stored.schema, (
        batch.slice(start, _ROWS) for batch in whole for start in range(0, len(batch), _ROWS)
    )


def column_type(shard: str, name: str) -> Any:
    """The Arrow type in which a kept field is written: a table's own; text or bytes of a tar."""
    pa = pyarrow()
    if shard.lower().endswith(_TARS):
        return pa.string() if name in _TEXTS else pa.binary()
    try:
        with _opened(shard) as file:
            schema, _ = _batches(shard, file)
    except (pa.ArrowException, OSError):  # told when its rows are read
        return pa.null()
    return schema.field(name).type if name in schema.names else pa.null()


def _image_column(shard: str, schema: Any) -> str:
    """The one column of bytes, or of Hugging Face's structs of bytes and path."""
    found: list[str] = [each.name for each in schema if _has_images(each.type)]
    if "image" in found:
        return "image"
    if len(found) != 1:
        which = f"several ({', '.join(found)})" if found else f"none ({', '.join(schema.names)})"
        raise ConfigurationError(
            f"{shortened(shard)}: which column has the images? By their types {which} could: "
            "choose with --image-column"
        )
    return found[0]


def _has_images(kind: Any) -> bool:
    types = pyarrow("types")
    if types.is_struct(kind):
        return any(each.name == "bytes" and _has_images(each.type) for each in kind)
    if types.is_dictionary(kind):
        return _has_images(kind.value_type)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def fingerprint(shard: str) -> str:
    """Its size, and a checksum of its first and last bytes: another shard has another one.

    Raises:
        ConfigurationError: It cannot be opened.
    """
    with _opened(shard) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        ends = file.read(_ENDS)
        file.seek(max(0, size - _ENDS))
        return f"{size} {zlib.crc32(ends + file.read(_ENDS)):08x}"

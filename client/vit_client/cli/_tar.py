"""Tar shards, by WebDataset's rule."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import IO, Any

from ._folders import SUFFIXES
from ._sample import CutShort, Sample, Unusable

# Fields that are text; others are kept as bytes.
TEXTS = frozenset(("cls", "caption", "html", "id", "json", "label", "md", "txt", "url", "xml"))


def samples(file: IO[bytes], keep: Sequence[str], most: int) -> Iterator[Sample]:
    """Neighbours whose path up to the first dot of the file name is the same
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
            kept[name] = data.decode("utf-8", "backslashreplace") if name in TEXTS else data
    images = [name for name in fields if _is_image(name)]
    if not images:
        found = ", ".join(sorted(fields))
        return Sample(key, Unusable(f"has no image, but {found}"), kept)
    return Sample(key, fields[images[0]], kept)

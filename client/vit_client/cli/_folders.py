"""Finds the images below a folder, and reports what was skipped."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from ._common import reason

# What the server can read (FORMATS in its preprocess/1/decode.py).
SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("apng", "avif", "bmp", "gif", "jfif", "jpe", "jpeg", "jpg", "pbm", "pgm", "png", "pnm"),
        *("ppm", "tif", "tiff", "webp"),
    )
)
# Images as well, but the server cannot read them.
_UNSUPPORTED = frozenset(
    f".{name}"
    for name in (
        *("heic", "heif", "hif", "jxl", "jp2", "psd", "qoi", "svg", "tga", "ico"),
        *("arw", "cr2", "cr3", "dng", "nef", "orf", "raf", "rw2"),  # cameras' raw data
    )
)
# Folders with files that no user put there: thumbnails, deleted files, snapshots. Hidden ones, such
# as .thumbnails, and the ._* files of macOS are left out anyway.
_LITTER = frozenset(
    (
        *("@eadir", "#recycle", "#snapshot"),  # Synology
        *("@recycle", "@recently-snapshot"),  # QNAP
        *("$recycle.bin", "system volume information"),  # Windows
        *("__macosx", "lost+found"),
    )
)
_Identity = tuple[int, int]

# Maximum suffixes listed in the summary of skipped files.
_TOLD = 6


@dataclass
class Found:
    """The contents of a folder."""

    images: list[str] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    """Possible images and folders that cannot be read, each with the reason."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Number of other files, by lower-case suffix."""
    litter: Counter[str] = field(default_factory=Counter)
    """Number of folders left out, by name."""


def images_below(folder: str, exclude: Sequence[str]) -> Found:
    """Search `folder` and all its subfolders.

    Links are followed. A folder that is reached by several paths is searched once, under its real
    path if that is below `folder`. Hidden files and folders, known litter and whatever matches a
    pattern of `exclude` (by name, or by path relative to `folder`) are left out.
    """
    return _Walk(folder, exclude).run()


class _Walk:
    def __init__(self, folder: str, exclude: Sequence[str]) -> None:
        self._root = folder
        self._exclude = [pattern.rstrip("/") for pattern in exclude]
        self._found = Found()
        self._folders = [""]  # to be searched; all paths are relative to the root
        self._links: list[tuple[str, _Identity]] = []  # links to folders, to be followed
        self._seen = set(_own_and_parents(folder))

    def run(self) -> Found:
        while self._folders or self._links:
            while self._folders:
                self._look_through(self._folders.pop())
            # Only now, so that a folder is listed under its real path rather than a link's.
            self._links.sort(reverse=True)
            if self._links:
                self._enter(*self._links.pop())
        self._found.images.sort()
        self._found.unreadable.sort()
        return self._found

    def _look_through(self, folder: str) -> None:
        try:
            with os.scandir(self._named(folder)) as entries:
                inside = list(entries)
        except OSError as error:
            self._found.unreadable.append((self._named(folder), reason(error)))
            return
        for entry in inside:
            path = os.path.join(folder, entry.name)  # noqa: PTH118
            try:
                self._take(entry, path)
            except OSError as error:
                self._found.unreadable.append((self._named(path), reason(error)))

    def _take(self, entry: os.DirEntry[str], path: str) -> None:
        if entry.name.startswith(".") or self._excludes(entry.name, path):
            return
        if entry.name.lower() in _LITTER:
            self._found.litter[entry.name] += 1
        elif entry.is_symlink():
            self._take_link(path)
        elif entry.is_dir(follow_symlinks=False):
            self._enter(path, _identity(Path(self._named(path)).stat()))
        elif entry.is_file(follow_symlinks=False):
            self._take_file(path)
        else:
            self._take_special(path)

    def _take_link(self, path: str) -> None:
        try:
            status = Path(self._named(path)).stat()
        except OSError as error:
            if _may_be_wanted(path):
                why = "a broken link" if isinstance(error, FileNotFoundError) else "a link"
                self._found.unreadable.append((self._named(path), f"{why} ({reason(error)})"))
            else:
                self._skip(path)
            return
        if stat.S_ISDIR(status.st_mode):
            self._links.append((path, _identity(status)))
        elif stat.S_ISREG(status.st_mode):
            self._take_file(path)
        else:
            self._take_special(path)

    def _take_file(self, path: str) -> None:
        if _suffix(path) in SUFFIXES:
            self._found.images.append(self._named(path))
        else:
            self._skip(path)

    def _take_special(self, path: str) -> None:
        if _suffix(path) in SUFFIXES:
            self._found.unreadable.append(
                (self._named(path), "a pipe, socket or device, not a file")
            )

    def _skip(self, path: str) -> None:
        self._found.skipped[_suffix(path)] += 1

    def _enter(self, path: str, identity: _Identity) -> None:
        if identity not in self._seen:
            self._seen.add(identity)
            self._folders.append(path)

    def _excludes(self, name: str, path: str) -> bool:
        return any(fnmatchcase(name, each) or fnmatchcase(path, each) for each in self._exclude)

    def _named(self, path: str) -> str:
        return str(Path(self._root, path))


def _identity(status: os.stat_result) -> _Identity:
    return status.st_dev, status.st_ino


def _own_and_parents(folder: str) -> Iterator[_Identity]:
    """The folder and its parents: a link to any of them is a cycle."""
    real = Path(os.path.realpath(folder))
    for path in (real, *real.parents):
        with contextlib.suppress(OSError):
            yield _identity(path.stat())


def _suffix(path: str) -> str:
    return Path(path).suffix.lower()


def _may_be_wanted(link: str) -> bool:
    """Whether a dead link, by its suffix or lack of one, may have pointed to an image or a
    folder."""
    suffix = _suffix(link)
    return suffix in SUFFIXES or not re.fullmatch(r"\.[a-z][a-z0-9]{0,4}", suffix)


def what_was_skipped(found: Found) -> str:
    """The skipped files and folders as one line; "" if there are none."""
    parts = []
    images = [kind for kind in found.skipped if kind in _UNSUPPORTED]
    if images:
        parts.append(
            _counts(found.skipped, images) + " (not supported by the server: convert them)"
        )
    if without := found.skipped[""]:
        parts.append(f"{without} without a suffix")
    if others := [kind for kind in found.skipped if kind and kind not in images]:
        parts.append(_counts(found.skipped, others))
    parts += [f"{count} {name}/" for name, count in found.litter.most_common()]
    return ", ".join(parts)


def _counts(counter: Counter[str], keys: Sequence[str]) -> str:
    ordered = sorted(keys, key=lambda key: (-counter[key], key))
    told = [f"{counter[key]} {key}" for key in ordered[:_TOLD]]
    if rest := sum(counter[key] for key in ordered[_TOLD:]):
        told.append(f"{rest} of other kinds")
    return ", ".join(told)

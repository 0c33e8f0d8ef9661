"""The folder of parts: on this machine, or at an address that fsspec opens."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import IO, Any

from ..errors import shortened
from ._common import CannotWrite
from ._remote import filesystem, is_url

_PARTIAL = ".vit-client-partial-"


class PartFolder:
    """Where the parts go: a folder of this machine, or an address that fsspec opens."""

    def __init__(self, name: str) -> None:
        self.name = name.rstrip("/")
        self._remote: Any = filesystem(name) if is_url(name) else None
        if self._remote is None:
            Path(name).mkdir(parents=True, exist_ok=True)
            for left in Path(name).glob(f"{_PARTIAL}*"):  # by runs that were killed
                with contextlib.suppress(OSError), left.open("rb") as file:
                    _lock(file.fileno(), wait=False)  # fails where somebody is writing it
                    left.unlink()
        else:
            self._try()
        self._place = None if self._remote else name

    def partial(self) -> Path:
        """A new file of this machine, for a part that is being written; locked, so that no other
        run takes it for one that a killed run has left."""
        while True:
            self._file, name = tempfile.mkstemp(prefix=_PARTIAL, dir=self._place)
            _lock(self._file, wait=True)
            if Path(name).exists():  # in the moment before it was locked, it may have been taken
                return Path(name)
            os.close(self._file)

    def drop(self, partial: Path) -> None:
        """Remove such a file, if it is still there."""
        with contextlib.suppress(OSError):
            partial.unlink()
        os.close(self._file)

    def _try(self) -> None:
        """Write a file there, and remove it: that it cannot be is to be known before an hour's
        work."""
        place = f"{self.name}/.vit-client"
        try:
            self._remote.pipe_file(place, b"vit-client")
        except Exception as failure:  # fsspec's packages raise anything
            raise self._cannot_write(place, failure) from failure
        with contextlib.suppress(Exception):
            self._remote.rm_file(place)

    def _cannot_write(self, place: str, failure: Exception) -> CannotWrite:
        why = shortened(str(failure) or type(failure).__name__)
        return CannotWrite(f"{shortened(place)} cannot be written ({why})")

    def has(self, part: str) -> bool:
        """Whether a part is there; it is complete then."""
        place = f"{self.name}/{part}"
        return bool(self._remote.isfile(place) if self._remote else Path(place).is_file())

    def open(self, part: str) -> IO[bytes]:
        """A part, for reading."""
        place = f"{self.name}/{part}"
        return self._remote.open(place) if self._remote else Path(place).open("rb")

    def publish(self, partial: Path, part: str) -> None:
        """Give such a file its name."""
        if self._remote:
            try:
                self._remote.put_file(str(partial), f"{self.name}/{part}")
            except Exception as failure:  # fsspec's packages raise anything
                raise self._cannot_write(f"{self.name}/{part}", failure) from failure
            self.drop(partial)
            return
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)  # mkstemp's is for its owner only
        partial.replace(Path(self.name, part))
        os.close(self._file)


def _lock(file: int, *, wait: bool) -> None:
    try:
        import fcntl
    except ImportError:  # Windows, where a file that somebody has open cannot be removed
        return
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))

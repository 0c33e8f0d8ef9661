"""What a server keeps outside its own folder, in /tmp and /dev/shm, and what killed ones left."""

import fcntl
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .tritonserver import ServerError

_TMP, _SHM = Path("/tmp"), Path("/dev/shm")
_FOLDER = "vit-server-"  # in /tmp; pid and token follow
_SEGMENTS = "vit_server_"  # in /dev/shm, the same
_LOCK = "lock"


@dataclass(frozen=True)
class Workspace:
    """This server's own; both are gone at the end."""

    folder: Path
    shm_prefix: str  # of the names of its segments in /dev/shm


@contextmanager
def workspace() -> Iterator[Workspace]:
    """A folder and a prefix for segments, which nobody else takes for what a killed server left.

    Whoever holds the lock of either lives: pids say nothing, where containers share folders.

    Raises:
        ServerError: no folder can be written.
    """
    temporary = _temporary()
    _clear_after_the_killed(temporary)
    name = f"{os.getpid()}_{secrets.token_hex(4)}"
    folder = temporary / f"{_FOLDER}{name.replace('_', '-')}"
    segments = _SHM / f"{_SEGMENTS}{name}_{_LOCK}"
    locks = []
    try:  # before they are made: a signal may come at any moment
        try:
            # What clears old files from /tmp (systemd-tmpfiles) passes by a locked folder, too.
            locks.append(_locked(folder, partial(Path.mkdir, mode=0o700, exist_ok=True)))
            locks.append(_locked(segments, Path.touch))
        except OSError as e:
            raise ServerError(f"{e.filename} cannot be written: {e.strerror}") from e
        yield Workspace(folder, f"{_SEGMENTS}{name}_")
    finally:
        _remove_segments(segments)
        shutil.rmtree(folder, ignore_errors=True)
        for lock in locks:
            os.close(lock)


def _temporary() -> Path:
    if not os.access(_TMP, os.W_OK):
        raise ServerError(
            f"{_TMP} cannot be written, and Triton's Python backend creates a folder there, "
            f"whatever TMPDIR says: mount one (docker run --tmpfs {_TMP}:exec)"
        )
    temporary = Path(tempfile.gettempdir())
    # Triton hands the path to a shell, unquoted, and to Python as ASCII.
    return temporary if re.fullmatch(r"[\w/.-]+", str(temporary), re.ASCII) else _TMP


def _locked(path: Path, make: Callable[[Path], None]) -> int:
    """Made and locked; again, where another server cleared it up between the two."""
    while True:
        make(path)
        with suppress(FileNotFoundError):
            file = os.open(path, os.O_RDONLY)
            fcntl.flock(file, fcntl.LOCK_EX)
            if path.exists():
                return file
            os.close(file)


def _clear_after_the_killed(temporary: Path) -> None:
    """Remove what servers left that could not do it themselves."""
    for left in (*temporary.glob(f"{_FOLDER}*"), *_SHM.glob(f"{_SEGMENTS}*_{_LOCK}")):
        with suppress(OSError):  # another user's, or locked by a server that runs
            lock = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if left.is_dir():
                    shutil.rmtree(left)
                else:
                    _remove_segments(left)
            finally:
                os.close(lock)


def _remove_segments(lock: Path) -> None:
    """The lock last: as long as it is there, somebody will remove the others."""
    for segment in _SHM.glob(f"{lock.name.removesuffix(_LOCK)}*"):
        if segment != lock:
            segment.unlink(missing_ok=True)
    lock.unlink(missing_ok=True)

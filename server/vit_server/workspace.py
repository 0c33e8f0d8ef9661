"""A server's files in /tmp and /dev/shm, and the removal of those that killed servers left."""

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
_FOLDER = "vit-server-"  # in /tmp; followed by pid and token
_SEGMENTS = "vit_server_"  # in /dev/shm; likewise
_LOCK = "lock"


@dataclass(frozen=True)
class Workspace:
    """This server's files; all are removed at exit."""

    folder: Path
    shm_prefix: str  # of its segments' names in /dev/shm


@contextmanager
def workspace() -> Iterator[Workspace]:
    """Provide a folder and a prefix for segments, locked so that no other server removes them.

    A held lock shows that the owner is alive; a pid does not, if containers share folders.

    Raises:
        ServerError: the folder or the lock file cannot be created.
    """
    temporary = _temporary()
    _clear_after_the_killed(temporary)
    name = f"{os.getpid()}_{secrets.token_hex(4)}"
    folder = temporary / f"{_FOLDER}{name.replace('_', '-')}"
    segments = _SHM / f"{_SEGMENTS}{name}_{_LOCK}"
    locks = []
    try:  # before they are created: a signal may arrive at any moment
        try:
            # systemd-tmpfiles, which removes old files from /tmp, skips locked folders too.
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
    # Triton passes the path to a shell, unquoted, and to Python as ASCII.
    return temporary if re.fullmatch(r"[\w/.-]+", str(temporary), re.ASCII) else _TMP


def _locked(path: Path, make: Callable[[Path], None]) -> int:
    """Create and lock `path`; retry if another server removed it in between."""
    while True:
        make(path)
        with suppress(FileNotFoundError):
            file = os.open(path, os.O_RDONLY)
            fcntl.flock(file, fcntl.LOCK_EX)
            if path.exists():
                return file
            os.close(file)


def _clear_after_the_killed(temporary: Path) -> None:
    """Remove the files that killed servers left."""
    for left in (*temporary.glob(f"{_FOLDER}*"), *_SHM.glob(f"{_SEGMENTS}*_{_LOCK}")):
        with suppress(OSError):  # another user's, or locked by a running server
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
    """Remove a server's segments, the lock file last: while it exists, the rest can be found."""
    for segment in _SHM.glob(f"{lock.name.removesuffix(_LOCK)}*"):
        if segment != lock:
            segment.unlink(missing_ok=True)
    lock.unlink(missing_ok=True)

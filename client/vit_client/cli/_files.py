"""Atomic writing of files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import ConfigurationError, shortened
from ._common import CannotWrite, reason


def check_place(path: Path) -> None:
    """Check that a file can be created at `path`, before an hour's work rather than after.

    Raises:
        ConfigurationError: The folder does not exist, or `path` is a folder.
        CannotWrite: The folder is not writable.
    """
    # os.path, because Path's methods raise for a name that is too long.
    if not os.path.isdir(path.parent):  # noqa: PTH112
        raise ConfigurationError(f"{shortened(path)}: no such folder {shortened(path.parent)}")
    if os.path.isdir(path):  # noqa: PTH112
        raise ConfigurationError(f"{shortened(path)} is a folder")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise CannotWrite(f"{shortened(path)} cannot be written (permission denied)")
    try:
        _beside(path).lstat()
    except FileNotFoundError:
        pass
    except OSError as error:  # the name is too long
        raise ConfigurationError(f"{shortened(path)}: {reason(error)}") from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that replaces `path` on success, and is removed otherwise.

    Raises:
        CannotWrite: Any OSError; the message names `path`.
    """
    temporary = _beside(path)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except OSError as error:
        raise CannotWrite(f"{shortened(path)} cannot be written ({reason(error)})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")

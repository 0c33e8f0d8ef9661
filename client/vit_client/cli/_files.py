"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import ConfigurationError, shortened
from ._common import CannotWrite, reason


def check_place(path: Path) -> None:
    """Say now, rather than after an hour's work, that no file of the name `path` can be made.

    Raises:
        ConfigurationError: No such folder, or a folder is in the way.
        CannotWrite: The folder is not writable.
    """
    # Path's own methods raise for a name that is too long.
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
    """A temporary file that takes the place of `path` when all went well, and else vanishes.

    Raises:
        CannotWrite: Any OSError, told of `path`.
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

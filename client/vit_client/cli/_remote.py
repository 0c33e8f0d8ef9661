"""Files by their name or, through fsspec, by their address."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from ..errors import ConfigurationError, Unavailable, VitClientError, shortened
from ._common import reason
from ._sample import CutShort

_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


@contextmanager
def opened(shard: str) -> Iterator[IO[bytes]]:
    """A file or address, for reading. Raises like `remote_errors`."""
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


def matches(url: str) -> list[str]:
    """The files that an address with a pattern matches."""
    files = filesystem(url)
    with remote_errors(url):
        return sorted(files.unstrip_protocol(match) for match in files.glob(url))

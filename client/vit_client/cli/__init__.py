"""The command `vit-client`."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Sequence
from typing import TextIO, cast

from ..errors import BadImage, ConfigurationError, DeadlineExceeded, VitClientError, shortened
from . import _interrupt, _streams
from ._common import (
    IMAGES_FAILED,
    INTERRUPTED,
    NO_ANSWER,
    OK,
    REFUSED,
    UNWRITABLE,
    USAGE,
    CannotWrite,
    NothingLeft,
    reason,
)
from ._parser import parse
from ._report import Warnings, error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; `--help` lists the codes."""
    _streams.prepare()
    _interrupt.end_at_second()
    logging.getLogger("vit_client").addHandler(Warnings(logging.WARNING))
    output = _streams.Output(sys.stdout)
    with contextlib.redirect_stdout(cast("TextIO", output)):
        code = _told(lambda: _run(arguments))
        return code or _told(output.flush)


def _run(arguments: Sequence[str] | None) -> int:
    options = parse(arguments)
    code: int = options.run(options)
    return code


def _told(work: Callable[[], int | None]) -> int:
    """Run `work`, report errors on standard error, and return the exit code."""
    try:
        return work() or OK
    except SystemExit as end:  # argparse has reported why
        return int(end.code or OK)
    except NothingLeft as failure:
        return failure.code
    except KeyboardInterrupt:
        error("interrupted")
        return INTERRUPTED
    except _streams.Enough:
        return OK
    except VitClientError as failure:
        error(str(failure))
        return _code_of(failure)
    except CannotWrite as failure:
        error(str(failure))
        return UNWRITABLE
    except OSError as failure:
        name = f"{shortened(failure.filename)}: " if failure.filename is not None else ""
        error(f"{name}{reason(failure)}")
        return USAGE
    except ValueError as failure:  # a top_k out of range
        error(str(failure))
        return USAGE


def _code_of(failure: VitClientError) -> int:
    if isinstance(failure, BadImage):
        return IMAGES_FAILED
    if isinstance(failure, ConfigurationError):
        return USAGE
    if failure.retryable or isinstance(failure, DeadlineExceeded):
        return NO_ANSWER
    return REFUSED

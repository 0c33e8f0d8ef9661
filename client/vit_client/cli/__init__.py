"""The command `vit-client`."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

from ..errors import BadImage, ConfigurationError, DeadlineExceeded, VitClientError
from ._common import (
    IMAGES_FAILED,
    INTERRUPTED,
    NO_ANSWER,
    OK,
    REFUSED,
    UNWRITABLE,
    USAGE,
    CannotWrite,
    reason,
)
from ._parser import parser
from ._report import error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; `--help` lists them."""
    _prepare_streams()
    options = parser().parse_args(arguments)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        error("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        _drop_output()  # whoever read it has seen enough, like `| head`
        return OK
    except VitClientError as failure:
        error(str(failure))
        return _code_of(failure)
    except CannotWrite as failure:
        error(str(failure))
        return UNWRITABLE
    except OSError as failure:
        if failure.filename is None:  # as all errors of `print` are
            _drop_output()
            error(f"standard output cannot be written ({reason(failure)})")
            return UNWRITABLE
        error(str(failure))
        return USAGE
    except ValueError as failure:  # a top_k out of range
        error(str(failure))
        return USAGE
    return code


def _prepare_streams() -> None:
    """No name is unprintable, and a stream that is closed is as good as /dev/null."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: PTH123, SIM115
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """Forget what could not be written. Python tries again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _code_of(failure: VitClientError) -> int:
    if isinstance(failure, BadImage):
        return IMAGES_FAILED
    if isinstance(failure, ConfigurationError):
        return USAGE
    if failure.retryable or isinstance(failure, DeadlineExceeded):
        return NO_ANSWER
    return REFUSED

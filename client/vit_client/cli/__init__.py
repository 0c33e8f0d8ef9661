"""The command `vit-client`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from ..errors import BadImage, ConfigurationError, DeadlineExceeded, VitClientError
from ._common import IMAGES_FAILED, INTERRUPTED, NO_ANSWER, OK, REFUSED, USAGE
from ._parser import parser
from ._report import error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; `--help` lists them."""
    options = parser().parse_args(arguments)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        error("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough, like `| head`. Python flushes again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except VitClientError as failure:
        error(str(failure))
        return _code_of(failure)
    except (OSError, ValueError) as failure:  # an unwritable output, a top_k out of range
        error(str(failure))
        return USAGE
    return code


def _code_of(failure: VitClientError) -> int:
    if isinstance(failure, BadImage):
        return IMAGES_FAILED
    if isinstance(failure, ConfigurationError):
        return USAGE
    if failure.retryable or isinstance(failure, DeadlineExceeded):
        return NO_ANSWER
    return REFUSED

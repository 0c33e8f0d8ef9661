"""The command `vit-client`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from ..errors import (
    ConfigurationError,
    DeadlineExceeded,
    VitClientError,
)
from ._parser import parser
from ._report import error

OK, IMAGES_FAILED, USAGE, NO_ANSWER, REFUSED, INTERRUPTED = 0, 1, 2, 3, 4, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; `--help` lists them."""
    options = parser().parse_args(arguments)
    try:
        failed: int = options.run(options)
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
        if isinstance(failure, ConfigurationError):
            return USAGE
        return NO_ANSWER if failure.retryable or isinstance(failure, DeadlineExceeded) else REFUSED
    except (OSError, ValueError) as failure:  # an unwritable output, a top_k out of range
        error(str(failure))
        return USAGE
    return IMAGES_FAILED if failed else OK

"""What goes to standard error."""

from __future__ import annotations

import sys


def error(message: str) -> None:
    """Something failed."""
    print(f"vit-client: {message}", file=sys.stderr, flush=True)


def warning(message: str) -> None:
    """Something is not as it should be, but the answer stands."""
    error(f"warning: {message}")

"""The yardsticks: what this machine can do at best, and what other servers make of it."""

import sys
from datetime import datetime


def say(text: str) -> None:
    """Progress, for the person who waits."""
    print(f"{datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)

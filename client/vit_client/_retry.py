"""Backoff, and budgets that prevent retry storms."""

from __future__ import annotations

import random
import time

_FIRST_DELAY = 0.25
_MAX_DELAY = 5.0

_BURST = 10.0


def backoff(attempt: int) -> float:
    """Seconds to wait after failed attempt number `attempt`, from 0. Doubles, with full jitter,
    so that clients that failed together do not retry together."""
    return random.uniform(0, min(_MAX_DELAY, _FIRST_DELAY * 2 ** min(attempt, 20)))


class RetryBudget:
    """Limits one client's retries of one kind, over all its calls, to a share of the successes,
    plus a rate per second, plus a burst of ten. However many calls fail, retries stay few; a call
    whose retry is not due before its deadline fails without it."""

    def __init__(self, *, per_success: float, per_second: float) -> None:
        self._per_success = per_success
        self._per_second = per_second
        self._tokens = _BURST
        self._updated = time.monotonic()

    def success(self) -> None:
        """Earn a fraction of a retry."""
        self._tokens = min(_BURST, self._tokens + self._per_success)

    def reserve(self) -> float:
        """Reserve one retry; returns the seconds until it may start."""
        now = time.monotonic()
        self._tokens = min(_BURST, self._tokens + (now - self._updated) * self._per_second) - 1
        self._updated = now
        return max(0.0, -self._tokens / self._per_second)

    def give_back(self) -> None:
        """Return a reserved retry that will not be used."""
        self._tokens = min(_BURST, self._tokens + 1)

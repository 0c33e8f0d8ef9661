"""The memory limit, and whether the kernel has killed a process because of it."""

import os
import re
from contextlib import suppress
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_COUNTERS = (_CGROUP / "memory.events", _CGROUP / "memory" / "memory.oom_control")  # cgroups v2, v1
_LIMITS = (_CGROUP / "memory.max", _CGROUP / "memory" / "memory.limit_in_bytes")
_SCORE = Path("/proc/self/oom_score_adj")
_FIRST = 300  # added to the OOM score, in thousandths of the limit


def limit() -> int:
    """Return this process's memory limit in bytes: its cgroup's, or the machine's memory."""
    for file in _LIMITS:
        with suppress(OSError, ValueError):  # no limit: "max" in v2, about 2⁶³ in v1
            return min(int(file.read_text()), _machine())
    return _machine()


def limited() -> bool:
    """Return whether the cgroup has a limit below the machine's memory."""
    return limit() < _machine()


def _machine() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def go_first() -> None:
    """Make the kernel kill this process before its parent, which can report the reason."""
    with suppress(OSError):
        _SCORE.write_text(str(min(1000, int(_SCORE.read_text()) + _FIRST)))


def oom_kills() -> int:
    """Return the OOM kills that this process's cgroup has counted; 0 if it has no counter."""
    for file in _COUNTERS:
        with suppress(OSError):
            if found := re.search(r"^oom_kill (\d+)", file.read_text(), re.MULTILINE):
                return int(found[1])
    return 0


_before = oom_kills()


def told() -> str:
    """Return a suffix for error messages if OOM kills since the start explain the failure."""
    if not (kills := oom_kills() - _before):
        return ""
    processes = "a process" if kills == 1 else f"{kills} processes"
    return f"; the memory limit was reached: the kernel killed {processes}"

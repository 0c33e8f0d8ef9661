"""The memory limit: what it is, and whether the kernel has killed a process for it."""

import os
import re
from contextlib import suppress
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_COUNTERS = (_CGROUP / "memory.events", _CGROUP / "memory" / "memory.oom_control")  # versions 2, 1
_LIMITS = (_CGROUP / "memory.max", _CGROUP / "memory" / "memory.limit_in_bytes")
_SCORE = Path("/proc/self/oom_score_adj")
_FIRST = 300  # thousandths of the limit


def limit() -> int:
    """Bytes that this process' cgroup may take: its limit, as in a container, or the machine's."""
    for file in _LIMITS:
        with suppress(OSError, ValueError):  # "max" in version 2; in version 1 some 2⁶³
            return min(int(file.read_text()), _machine())
    return _machine()


def limited() -> bool:
    """Whether it has a limit of its own."""
    return limit() < _machine()


def _machine() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def go_first() -> None:
    """Have the kernel kill this process before the one that started it, which can say why."""
    with suppress(OSError):
        _SCORE.write_text(str(min(1000, int(_SCORE.read_text()) + _FIRST)))


def oom_kills() -> int:
    """How many it was so far, as this process' cgroup has counted; 0 where none counts them."""
    for file in _COUNTERS:
        with suppress(OSError):
            if found := re.search(r"^oom_kill (\d+)", file.read_text(), re.MULTILINE):
                return int(found[1])
    return 0


_before = oom_kills()


def told() -> str:
    """What to add to a message of a failure, where kills since the start explain it."""
    if not (kills := oom_kills() - _before):
        return ""
    processes = "a process" if kills == 1 else f"{kills} processes"
    return f"; the memory limit was reached: the kernel killed {processes}"

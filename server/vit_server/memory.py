"""Whether the kernel has killed a process here because the memory limit was reached."""

import re
from contextlib import suppress
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_COUNTERS = (_CGROUP / "memory.events", _CGROUP / "memory" / "memory.oom_control")  # versions 2, 1


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
    return f"; the memory limit was reached: the kernel killed {processes} for it"

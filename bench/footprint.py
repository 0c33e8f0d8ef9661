"""Memory and file descriptors of each process of a running vit-server."""

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

MIB = 1 << 20


@dataclass(frozen=True)
class Usage:
    """Resources of one process."""

    private: float  # MiB (USS), freed when it exits
    descriptors: int


@dataclass(frozen=True)
class Footprint:
    """Resources of a server at one moment."""

    processes: dict[str, Usage]
    shared: float  # MiB in /dev/shm

    @property
    def total(self) -> float:
        return self.shared + sum(usage.private for usage in self.processes.values())

    def __str__(self) -> str:
        parts = [f"{name} {use.private:.0f}" for name, use in sorted(self.processes.items())]
        return f"{', '.join(parts)}, shared {self.shared:.0f} MiB"


def footprint(pid: int) -> Footprint:
    """Return the footprint of the vit-server with that process id."""
    usages = {}
    seen: Counter[str] = Counter()
    for process in family(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            name = name_of(process)
            seen[name] += 1  # a model may have several processes
            name = name if seen[name] == 1 else f"{name} {seen[name]}"
            usages[name] = Usage(process.memory_full_info().uss / MIB, process.num_fds())
    blocks = (file.stat().st_blocks for file in Path("/dev/shm").glob(f"vit_server_{pid}_*"))
    return Footprint(usages, sum(blocks) * 512 / MIB)


def family(pid: int) -> list[psutil.Process]:
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


def name_of(process: psutil.Process) -> str:
    """Return the model's name for a model's process, else the process's own name."""
    words = process.cmdline()
    if words and words[0].endswith("triton_python_backend_stub"):
        return Path(words[1]).parent.parent.name  # …/preprocess/1/model.py
    return process.name()


@contextlib.contextmanager
def peak(pid: int) -> Iterator[dict[str, float]]:
    """Fill the dictionary, on exit, with each process's peak in MiB, its /dev/shm included."""
    for process in family(pid):
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # reset the peak
    peaks: dict[str, float] = {}
    yield peaks
    for process in family(pid):
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        (kib,) = (int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
        name = name_of(process)
        peaks[name] = max(peaks.get(name, 0), kib / 1024)


def settled(pid: int) -> Footprint:
    """Return the smallest of a few footprints in a row: taken between requests, not during one."""
    seen = []
    for _ in range(5):
        seen.append(footprint(pid))
        time.sleep(0.2)
    return min(seen, key=lambda one: one.total)

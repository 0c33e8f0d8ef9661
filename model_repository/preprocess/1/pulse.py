"""Watchdog: kills a model's process that stalled, before it can answer.

Triton gives up on a Python model's process that has shown no sign of life for a second: stopped,
starved of CPU, swapped out, or the machine suspended. It fails that request, and takes the late
response for that of the next request, and so on from there (seen with Triton 2.51). So a process
that stalled exits instead of answering, and vit-server notices. Triton measures the second by the
wall clock: setting the clock forward may end it at once.
"""

import os
import re
import signal
import threading
import time
from pathlib import Path

HELD_UP = 0.7  # seconds; Triton checks once a second, and the sign of life comes every 0.3
SIGN = 0.3
WAITED = 5  # seconds that a request may have waited for a core after the process resumed
STEP = 0.25  # seconds, of the wall clock; STEP + HELD_UP must stay below Triton's second
SLEEPS = re.compile(r"^voluntary_ctxt_switches:\s*(\d+)", re.MULTILINE)


class Pulse:
    """Call `begun = now()` before working on requests, and `check(begun)` before responding."""

    def __init__(self, threads=None):
        """`threads` is the most that work at once, if not as many as the cores."""
        self.interval = interval(threads or cores())
        self.signs = Signs()
        self.last = now(), time.process_time(), 0
        self.offset = wall_clock()
        self.held_up = 0.0
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        while True:
            time.sleep(self.interval)
            self.beat()

    def beat(self):
        this = now(), time.process_time(), self.signs.count()
        silent, used, signs = (
            after - before for after, before in zip(this, self.last, strict=True)
        )
        # This thread may just have waited for the GIL, which another thread can hold for seconds
        # (over a file of 500 MB), working or waiting for a core. Triton's sign of life does not
        # need the GIL: if it came in the meantime, or CPU time was used, the process did not stall.
        offset = wall_clock()
        if silent - max(used, signs * SIGN) > HELD_UP or offset - self.offset > STEP:
            self.held_up = this[0]
        self.last, self.offset = this, offset

    def check(self, begun):
        if now() - self.last[0] > self.interval or wall_clock() - self.offset > STEP:
            self.beat()  # the thread may not have noticed yet
        # The request may have arrived before the work on it began.
        if self.held_up > begun - WAITED:
            os.kill(os.getpid(), signal.SIGKILL)


class Signs:
    """Counts Triton's signs of life, which come from a thread that sleeps for 0.3 s in a loop.

    That thread has no name, so it is identified by its rhythm, in the first seconds. Until then no
    sign is counted.
    """

    WATCHED = 3  # seconds, in which the thread goes to sleep 9 or 10 times

    def __init__(self):
        self.thread, self.since = None, 0
        self.begun, self.first = now(), self.sleeps()

    def count(self):
        if self.thread is None:
            self.look()
            return 0
        return sleeps(self.thread) - self.since

    def look(self):
        seconds = now() - self.begun
        if seconds < self.WATCHED:
            return
        counts = self.sleeps()
        gone = {thread: count - self.first.get(thread, count) for thread, count in counts.items()}
        found = [t for t, n in gone.items() if 0.8 * seconds / SIGN < n < seconds / SIGN + 1]
        if len(found) == 1:
            self.thread, self.since = found[0], counts[found[0]]
        self.begun, self.first = now(), counts

    @staticmethod
    def sleeps():
        """Return the count of sleeps of each thread that Python did not start."""
        ours = {str(thread.native_id) for thread in threading.enumerate()}
        names = {task.name for task in Path("/proc/self/task").iterdir()}
        return {name: sleeps(name) for name in names - ours}


def sleeps(thread):
    """Return a thread's voluntary context switches; 0 if it has exited."""
    try:
        return int(SLEEPS.search(Path(f"/proc/self/task/{thread}/status").read_text())[1])
    except OSError:
        return 0


def interval(threads):
    """Return the seconds between two beats, short because CPU time used by all threads in between
    can hide a stall of the same length.

    One more thread than `threads` is counted, for Python itself.
    """
    return min(0.1, 0.2 / min(threads + 1, len(os.sched_getaffinity(0))))


def cores():
    """Return the number of OpenMP threads: with a CPU limit, fewer than the machine's cores."""
    found = re.match(r"\s*(\d+)", os.environ.get("OMP_NUM_THREADS", ""))
    return int(found[1]) if found else len(os.sched_getaffinity(0))


def wall_clock():
    """Return how many seconds the wall clock is ahead of `now`, within 0.01."""
    while True:  # repeat if this thread was preempted between the clocks
        before, wall, after = now(), time.time(), now()
        if after - before < 0.01:
            return wall - after


def now():
    return time.clock_gettime(time.CLOCK_BOOTTIME)  # includes time suspended

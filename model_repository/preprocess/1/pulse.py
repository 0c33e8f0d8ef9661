"""A model's process that was held up must not answer.

Triton gives a Python model's process up when it has shown no sign of life for a second: stopped,
starved of CPU, swapped out, the machine suspended. It fails that request, and takes the answer that
comes late for the next request's, and so on from there (seen with Triton 2.51). So a process that
was held up ends instead of answering, and that is noticed. Triton's second is by the wall clock: it
may be over at once where that is set forward.
"""

import os
import re
import signal
import threading
import time
from pathlib import Path

HELD_UP = 0.7  # seconds: Triton looks once a second, and its own sign of life comes every 0.3
SIGN = 0.3
WAITED = 5  # seconds that a request may have waited for a core, after the process was let go on
STEP = 0.25  # of the wall clock; with 0.7 it would be a second at once
SLEEPS = re.compile(r"^voluntary_ctxt_switches:\s*(\d+)", re.MULTILINE)


class Pulse:
    """`begun = now()` before the work on requests, and `check(begun)` before an answer goes out."""

    def __init__(self, threads=None):
        """`threads`: that work at once at the most, if those are not as many as the cores."""
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
        # This thread may just have waited for Python's lock, which another one can keep for
        # seconds, over a file of 500 MB, at work or waiting for a core. Triton's sign of life needs
        # no lock: where it has come meanwhile, or a CPU was used, the process was not held up.
        offset = wall_clock()
        if silent - max(used, signs * SIGN) > HELD_UP or offset - self.offset > STEP:
            self.held_up = this[0]
        self.last, self.offset = this, offset

    def check(self, begun):
        if now() - self.last[0] > self.interval or wall_clock() - self.offset > STEP:
            self.beat()  # the thread has not come to see it yet
        # The request may have been there before the work on it began.
        if self.held_up > begun - WAITED:
            os.kill(os.getpid(), signal.SIGKILL)


class Signs:
    """Counts Triton's signs of life: a thread of its own that sleeps for 0.3 s, again and again.

    Nothing names that thread, so it is told by its rhythm, in the first seconds. Until then no sign
    is counted.
    """

    WATCHED = 3  # seconds, in which it goes to sleep 9 or 10 times

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
        """Of each thread that is not Python's."""
        ours = {str(thread.native_id) for thread in threading.enumerate()}
        names = {task.name for task in Path("/proc/self/task").iterdir()}
        return {name: sleeps(name) for name in names - ours}


def sleeps(thread):
    """How often it has gone to sleep, by itself; 0 where it has ended."""
    try:
        return int(SLEEPS.search(Path(f"/proc/self/task/{thread}/status").read_text())[1])
    except OSError:
        return 0


def interval(threads):
    """Seconds between two looks, in which all threads may use a core, and hide as much of a stop.

    One more than those is Python's own.
    """
    return min(0.1, 0.2 / min(threads + 1, len(os.sched_getaffinity(0))))


def cores():
    """As many as OpenMP has threads: where there is a CPU limit, fewer than the machine's."""
    found = re.match(r"\s*(\d+)", os.environ.get("OMP_NUM_THREADS", ""))
    return int(found[1]) if found else len(os.sched_getaffinity(0))


def wall_clock():
    """Seconds that it is ahead of `now`, within 0.01."""
    while True:  # again, where this thread lost its core between the clocks
        before, wall, after = now(), time.time(), now()
        if after - before < 0.01:
            return wall - after


def now():
    return time.clock_gettime(time.CLOCK_BOOTTIME)  # goes on while the machine is suspended

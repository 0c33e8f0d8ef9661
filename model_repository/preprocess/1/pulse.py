"""A model's process that was held up must not answer.

Triton gives a Python model's process up when it has shown no sign of life for a second: stopped,
starved of CPU, swapped out, the machine suspended. It fails that request, and takes the answer that
comes late for the next request's, and so on from there (seen with Triton 2.51). So a process that
was held up ends instead of answering, and that is noticed.
"""

import os
import signal
import threading
import time

HELD_UP = 0.7  # seconds: Triton looks once a second, and its own sign of life comes every 0.3
# Between two looks all cores may use their time, which then hides as much of a stop.
BEAT = min(0.1, 0.2 / len(os.sched_getaffinity(0)))


class Pulse:
    """`begun = now()` before the work on requests, and `check(begun)` before an answer goes out."""

    def __init__(self):
        self.last, self.used = now(), time.process_time()
        self.held_up = 0.0
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        while True:
            time.sleep(BEAT)
            self.beat()

    def beat(self):
        time_now, used = now(), time.process_time()
        # While it used a CPU it was not held up: one thread may keep Python's lock from the others
        # for seconds, over a file of 500 MB, and Triton's own sign of life does not need that lock.
        if time_now - self.last - (used - self.used) > HELD_UP:
            self.held_up = time_now
        self.last, self.used = time_now, used

    def check(self, begun):
        self.beat()  # the thread may not have come to see it yet
        # The request may have waited for longer than it was worked on.
        if self.held_up > begun - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def now():
    return time.clock_gettime(time.CLOCK_BOOTTIME)  # goes on while the machine is suspended

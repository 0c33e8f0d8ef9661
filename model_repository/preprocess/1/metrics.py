"""Metrics about the images themselves, in addition to Triton's own counters of requests.

A Python model can add metrics to Triton's /metrics, but each update takes 13 to 45 µs of a core, in
two processes. So worker threads only queue their observations, and a separate thread reports to
Triton once a second by how much each counter has grown. A histogram consists of counters, one for
each bucket, because Triton's own histograms accept only one observation at a time.
"""

import ctypes
import os
import sys
import threading
from bisect import bisect_left
from collections import deque
from contextlib import suppress

import triton_python_backend_utils as pb_utils
from decode import REASONS

PAUSE = 1.0  # seconds between two reports to Triton
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
# Up to 0.001 are health checks and warm-up: the alert VitNoTraffic does not count these.
MEGAPIXELS = (0.001, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """`note(series, value)` from any thread, and `close()` at the end."""

    def __init__(self):
        self.decode_seconds = Histogram(
            "vit_preprocess_decode_seconds",
            "Seconds from an image's file to its pixels, of images that were decoded",
            SECONDS,
        )
        self.megapixels = Histogram(
            "vit_preprocess_megapixels", "Megapixels of images that were decoded", MEGAPIXELS
        )
        refused = Family("vit_preprocess_refused_images_total", "Rejected images, by reason")
        self.refused = {reason: Counter(refused, reason=reason) for reason in REASONS}
        name, text = "vit_preprocess_refused_requests_total", "Requests with rejected images"
        self.refused_requests = Counter(Family(name, text))
        name = "vit_preprocess_held_back_seconds_total"
        text = "Seconds that processes paused because enough images were queued for vit"
        self.held_back_seconds = Counter(Family(name, text))
        self.notes = deque()
        self.counters = [
            *self.decode_seconds.counters,
            *self.megapixels.counters,
            *self.refused.values(),
            self.refused_requests,
            self.held_back_seconds,
        ]
        self.ended = threading.Event()
        self.triton = os.getppid()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def note(self, series, value=1):
        self.notes.append((series, value))

    def run(self):
        try:
            for counter in self.counters:
                counter.create()
        except pb_utils.TritonModelException as e:  # Triton may run with metrics disabled
            print(f"preprocess has no metrics: {e}", file=sys.stderr, flush=True)
            self.notes = deque(maxlen=0)
            return
        while not self.ended.wait(PAUSE):
            self.tell()
        self.tell()

    def tell(self):
        while self.notes:
            series, value = self.notes.popleft()
            series.add(value)
        for counter in self.counters:
            # A stub waits for Triton's response forever, and cannot exit while it does.
            if counter.owed and os.getppid() == self.triton:
                counter.tell()

    def close(self):
        self.ended.set()
        self.thread.join()


class Family:
    """Counters of one name. All processes of the model share each, and never release them: Triton
    would remove a counter when the first process releases it, and crash with the next."""

    def __init__(self, name, text):
        self.name, self.text, self.family = name, text, None

    def metric(self, labels):
        if self.family is None:
            kind = pb_utils.MetricFamily.COUNTER
            self.family = pb_utils.MetricFamily(self.name, self.text, kind)
            # An extra reference keeps it, and all its counters, alive.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.family))
        return self.family.Metric(labels)


class Counter:
    """A counter; `owed` is its growth not yet reported to Triton."""

    def __init__(self, family, **labels):
        self.family, self.labels = family, labels
        self.owed = 0

    def create(self):
        self.metric = self.family.metric(self.labels)

    def add(self, value):
        self.owed += value

    def tell(self):
        # Fails if shared memory is used up; the next report includes it.
        with suppress(pb_utils.TritonModelException):
            self.metric.increment(self.owed)
            self.owed = 0


class Histogram:
    """A Prometheus histogram: a cumulative counter for each bound, and the count and sum of all."""

    def __init__(self, name, text, bounds):
        self.bounds = bounds
        self.count = Counter(Family(f"{name}_count", f"{text}: how many"))
        self.sum = Counter(Family(f"{name}_sum", f"{text}: their sum"))
        bucket = Family(f"{name}_bucket", text)
        limits = [*(f"{bound:g}" for bound in bounds), "+Inf"]
        self.buckets = [Counter(bucket, le=limit) for limit in limits]
        # The largest bound first, so that a smaller one never has a higher count.
        self.counters = [self.count, self.sum, *reversed(self.buckets)]

    def add(self, value):
        self.count.add(1)
        self.sum.add(value)
        for bucket in self.buckets[bisect_left(self.bounds, value) :]:
            bucket.add(1)

"""Runs loads one after another: perf_analyzer's figures, and the server's for the same period."""

from dataclasses import dataclass, field
from pathlib import Path

from . import perf_analyzer
from .perf_analyzer import Measured
from .report import Parts, Point
from .triton import STEPS, Counters, Triton


@dataclass(frozen=True)
class Sweep:
    """A server, and how each load is run on it."""

    triton: Triton
    binary: Path
    seconds: float  # of one of the three windows
    extra: list[str] = field(default_factory=list)  # additional arguments for perf_analyzer

    def point(self, model: str, images: str, data: Path, kind: str, load: float) -> Point:
        """Measure one load ("concurrency" or "rate") on one model.

        Raises:
            PerfAnalyzerError: the measurement failed.
            ServerError: the server does not answer.
        """
        if kind == "concurrency":
            how = ["--concurrency-range", f"{load:g}"]
        else:  # requests arrive as from independent users, not at regular intervals
            how = ["--request-rate-range", f"{load:g}", "--request-distribution", "poisson"]
        arguments = [*self.triton.address.arguments(), *how, *self.extra]
        before = self.triton.counters()
        measured = perf_analyzer.measure(self.binary, model, data, self.seconds, arguments)
        after = self.triton.counters()
        delta = {name: after[name].since(before[name]) for name in after}
        return Point(model, images, kind, load, measured, _parts(measured, delta, model))


def _parts(measured: Measured, delta: dict[str, Counters], model: str) -> Parts | None:
    """Split the mean latency; return None if this server did not serve the requests."""
    used = {name: each for name, each in delta.items() if each.requests}
    if model not in used or "vit" not in used:
        return None
    steps = {name: used[name] for name in STEPS if name in used}
    queue = sum(step.queue_ns / step.requests / 1e6 for step in steps.values())
    work = {name: step.compute_ns / step.requests / 1e6 for name, step in steps.items()}
    preprocess, postprocess = work.get("preprocess", 0.0), work.get("postprocess", 0.0)
    total = used[model].total_ns / used[model].requests / 1e6
    return Parts(
        queue=queue,
        preprocess=preprocess,
        # Not from vit's own counters: vit-server's backend sends responses after they stop.
        vit=max(0.0, total - queue - preprocess - postprocess),
        postprocess=postprocess,
        network=max(0.0, measured.mean - total),
        batch=used["vit"].images / max(1, used["vit"].executions),
    )

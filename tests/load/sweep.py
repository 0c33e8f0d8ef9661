"""One load after another: perf_analyzer's figures, and the server's for the same time."""

from dataclasses import dataclass, field
from pathlib import Path

from . import perf_analyzer
from .perf_analyzer import Measured
from .report import Parts, Point
from .triton import Counters, Triton


@dataclass(frozen=True)
class Sweep:
    """A server, and how each load is put on it."""

    triton: Triton
    binary: Path
    seconds: float  # of one of the three windows
    extra: list[str] = field(default_factory=list)  # more arguments for perf_analyzer

    def point(self, model: str, images: str, data: Path, kind: str, load: float) -> Point:
        """Measure one load ("concurrency" or "rate") on one model.

        Raises:
            PerfAnalyzerError, ServerError: what went wrong.
        """
        if kind == "concurrency":
            how = ["--concurrency-range", f"{load:g}"]
        else:  # requests come as from independent users, not by the clock
            how = ["--request-rate-range", f"{load:g}", "--request-distribution", "poisson"]
        arguments = [*self.triton.address.arguments(), *how, *self.extra]
        before = self.triton.counters()
        measured = perf_analyzer.measure(self.binary, model, data, self.seconds, arguments)
        after = self.triton.counters()
        delta = {name: after[name].since(before[name]) for name in after}
        return Point(model, images, kind, load, measured, _parts(measured, delta))


def _parts(measured: Measured, delta: dict[str, Counters]) -> Parts | None:
    """Split the mean latency; None where this server has not seen the requests."""
    used = {name: each for name, each in delta.items() if each.requests}
    if "vit" not in used:
        return None
    work = {name: each.compute_ns / each.requests / 1e6 for name, each in used.items()}
    queue = sum(each.queue_ns / each.requests / 1e6 for each in used.values())
    return Parts(
        queue=queue,
        preprocess=work.get("preprocess", 0.0),
        vit=work["vit"],
        postprocess=work.get("postprocess", 0.0),
        network=max(0.0, measured.mean - queue - sum(work.values())),
        batch=used["vit"].images / max(1, used["vit"].executions),
    )

"""Results as files: CSV and JSON for programs, a Markdown report and a picture for people."""

import csv
import json
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from .perf_analyzer import Measured

HOW_TO_READ = """\
p50, p90 and p99 are what the client saw, in milliseconds; spread is how far the fastest of the
three windows was from the slowest. Then, where the mean latency went: queue (waiting to be batched,
in all steps together), preprocess and postprocess by the server's own statistics, vit for what
remains of the server's time, and network for what the client saw beyond it (gRPC, perf_analyzer
itself). batch is the mean number of images in one batch of vit.
"""


@dataclass(frozen=True)
class Parts:
    """The parts of the mean latency, in milliseconds, which add up to it."""

    queue: float
    preprocess: float
    vit: float
    postprocess: float
    network: float
    batch: float  # mean images per batch of vit


@dataclass(frozen=True)
class Point:
    """One load on one model."""

    model: str
    images: str  # which photos were sent
    kind: str  # "concurrency" or "rate"
    load: float
    measured: Measured
    parts: Parts | None  # None: not in this server's statistics (another replica served it)

    def row(self) -> dict[str, Any]:
        """Return a flat dictionary, for CSV and JSON."""
        own = {"model": self.model, "images": self.images, self.kind: self.load}
        return {**own, **asdict(self.measured), **(asdict(self.parts) if self.parts else {})}


def write(folder: Path, facts: dict[str, Any], points: list[Point]) -> None:
    """Write all four files."""
    rows = [point.row() for point in points]
    (folder / "results.json").write_text(json.dumps({**facts, "points": rows}, indent=2) + "\n")
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "report.md").write_text(markdown(facts, points))
    draw(folder / "latency.png", facts, points)


def markdown(facts: dict[str, Any], points: list[Point]) -> str:
    """Return the report: the facts, a table for each model, and how to read them."""
    lines = ["# Load test", "", *(f"- {name}: {fact}" for name, fact in facts.items())]
    for (model, images), group in groupby(points, _series):
        series = list(group)
        lines += ["", f"## {model}" + (f", {images}" if images else ""), ""]
        lines += table(series)
    return "\n".join([*lines, "", "![latency against throughput](latency.png)", "", HOW_TO_READ])


def table(series: list[Point]) -> list[str]:
    """Return the lines of one Markdown table."""
    load = "concurrency" if series[0].kind == "concurrency" else "asked/s"
    times = ["p50", "p90", "p99", "queue", "preprocess", "vit", "postprocess", "network"]
    head = [load, "images/s", "spread", *times, "batch"]
    lines = [_line(head), _line(["---:"] * len(head))]
    for point in series:
        row = point.row()
        cells = [f"{point.load:g}", f"{row['per_second']:.1f}", f"{row['spread']:.0%}"]
        cells += [f"{row[name]:.1f}" if name in row else "?" for name in [*times, "batch"]]
        lines.append(_line(cells))
    return lines


def draw(path: Path, facts: dict[str, Any], points: list[Point]) -> None:
    """Plot latency against throughput: for each model a line for p50 and a dashed one for p99."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    for (model, images), group in groupby(points, _series):
        series = list(group)
        x = [point.measured.per_second for point in series]
        p50 = [point.measured.p50 for point in series]
        p99 = [point.measured.p99 for point in series]
        label = f"{model}, {images}" if images else model
        (line,) = axes.plot(x, p50, marker="o", label=label)
        axes.plot(x, p99, marker=".", linestyle="--", color=line.get_color(), alpha=0.7)
        for point in series:
            at = (point.measured.per_second, point.measured.p50)
            axes.annotate(f"{point.load:g}", at, (4, -10), textcoords="offset points", fontsize=7)
    axes.set(xlabel="images/s", ylabel="latency (ms), p50 solid, p99 dashed", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlim(left=0)
    axes.set_title(f"{facts.get('network', '')}; numbers at the points: {points[0].kind}")
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _series(point: Point) -> tuple[str, str]:
    return point.model, point.images


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"

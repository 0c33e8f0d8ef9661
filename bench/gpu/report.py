"""The figures as tables: medians over the rounds, and what was aimed at."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from ..report import table
from .served import PIXELS, per_second

Results = dict[str, Any]
BARE_GOAL = 12_000  # images/s of TorchScript in fp16 on an H200
SERVED_GOAL = 0.7  # of bare
TIMES = ("per_second", "p50", "p99", "queue", "preprocess", "vit", "network", "batch")


def markdown(results: Results) -> str:
    """All that was measured so far."""
    lines = ["# The network on a GPU", ""]
    lines += [f"- {name}: {fact}" for name, fact in results["facts"].items()]
    lines += [
        "",
        "## Goals",
        "",
        *table("| goal | at least | measured | reached |", goals(results)),
    ]
    for part, section in (("bare", _bare), ("served", _served), ("decoders", _decoders)):
        lines += section(results[part]) if part in results else []
    return "\n".join(lines) + "\n"


def goals(results: Results) -> list[list[str]]:
    """A row each; what was not measured is said to be open."""
    bare = served = None
    if "bare" in results:
        images = _images(results["bare"])
        bare = max(max(f.values()) for name, f in images.items() if name.startswith("TorchScript"))
    if "served" in results:
        served = median(
            max(map(per_second, found["models"][PIXELS])) / found["bare"]
            for found in results["served"]["final"]
        )
    elsewhere = "" if "H200" in results["facts"]["device"] else "not an H200"
    return [
        ["bare TorchScript fp16 on an H200, images/s", *_verdict(BARE_GOAL, bare, elsewhere)],
        ["served with pixels, of bare", *_verdict(SERVED_GOAL, served, "")],
    ]


def _verdict(goal: float, value: float | None, why: str) -> list[str]:
    if value is None:
        return [f"{goal:g}", "not measured", "open"]
    return [f"{goal:g}", f"{value:.5g}", why or ("yes" if value >= goal else "no")]


def _bare(found: Results) -> list[str]:
    matrix = {size: _median(found, "matrix", size) for size in found["rounds"][0]["matrix"]}
    copy = median(each["copy"] for each in found["rounds"])
    top, images = max(matrix.values()), _images(found)
    batches = list(next(iter(images.values())))
    rows = []
    for name, rates in images.items():
        best = max(rates, key=lambda batch: rates[batch])
        share = rates[best] * found["flops"] / (top * 1e12)
        first = max(found["warm_up"][name].values())
        cells = [f"{rates[batch]:.0f}" for batch in batches]
        rows.append([name, *cells, f"{share:.1%}", f"{first:.2f}", f"{found['cosines'][name]:.6f}"])
    rates_of = ", ".join(f"{rate:.0f} at {size}" for size, rate in matrix.items())
    return [
        "",
        "## Bare",
        "",
        f"Matrix products: {rates_of} TFLOP/s. Copies: {copy:.0f} GB/s, read and written.",
        "",
        f"Images/s by batch size, medians of {len(found['rounds'])} rounds. Share: at the best "
        f"batch, of the best matrix rate, at {found['flops'] / 1e9:.2f} GFLOP an image. First: the "
        "longest of a batch size's first runs. Cosine: of the embeddings with those of the fp32 "
        "network on the CPU, the worst photo.",
        "",
        *table(f"| | {' | '.join(batches)} | share | first s | cosine |", rows),
        *_notes(found),
    ]


def _served(found: Results) -> list[str]:
    trials = []
    for trial in found["trials"]:
        settings = trial["settings"]
        loads = list(zip(*trial["rounds"], strict=True))
        rates = [f"{same[0]['load']}: {_column(same, 'per_second')}" for same in loads]
        trials.append(
            [trial["varied"], *map(str, settings.values()), "; ".join(rates) or "did not start"]
        )
    names = " | ".join(found["chosen"])
    rounds = found["final"]
    rows = []
    for model, points in rounds[0]["models"].items():
        for number, point in enumerate(points):
            same = [each["models"][model][number] for each in rounds]
            rows.append([model, point["load"], *(_column(same, key) for key in TIMES)])
    return [
        "",
        "## Served",
        "",
        f"One setting after the other, each with the best of those before, `{PIXELS}` in images/s:",
        "",
        *table(f"| varied | {names} | images/s |", trials),
        "",
        f"Chosen: {', '.join(f'{name} {value}' for name, value in found['chosen'].items())}. With "
        f"it, beside a bare rate of {median(each['bare'] for each in rounds):.0f} images/s in the "
        "same minutes (times in ms, as in tests/load):",
        "",
        *table(f"| model | load | images/s | {' | '.join(TIMES[1:])} |", rows),
        "",
        f"`{PIXELS}` is `embed` without its first step. `vit` itself answers 0.6 MB an image, "
        "because perf_analyzer asks for all its outputs.",
    ]


def _decoders(found: Results) -> list[str]:
    rows = []
    for name, rates in found["rates"].items():
        differences = found["differences"].get(name, {})
        cells = [f"{value:.4g}" for value in differences.values()] or [
            "is what it is compared with"
        ]
        rows.append([name, f"{median(rates):.0f}", *cells, *[""] * (4 - len(cells))])
    names = next(iter(found["differences"].values()))
    return [
        "",
        "## JPEG decoders",
        "",
        f"Files to pixels of the network's size, {found['batch']} at a time.",
        "",
        *table(f"| | images/s | {' | '.join(names)} |", rows),
        *_notes(found),
    ]


def _notes(found: Results) -> list[str]:
    return (
        ["", *(f"- not measured: {each}" for each in found["missing"])] if found["missing"] else []
    )


def _images(found: Results) -> dict[str, dict[str, float]]:
    first = found["rounds"][0]["images"]
    return {
        name: {
            batch: median(each["images"][name][batch] for each in found["rounds"]) for batch in of
        }
        for name, of in first.items()
    }


def _median(found: Results, what: str, key: str) -> float:
    return float(median(each[what][key] for each in found["rounds"]))


def _column(rows: Sequence[Results], key: str) -> str:
    return f"{median(row[key] for row in rows):.1f}" if all(key in row for row in rows) else "?"

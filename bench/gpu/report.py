"""The figures as tables, and the goals."""

from collections.abc import Iterable
from statistics import median
from typing import Any

from ..report import table
from .bare import AS_SERVED, VALUES
from .served import PIXELS

Results = dict[str, Any]
BARE_GOAL = 12_000  # images/s of TorchScript in fp16
STANDIN_GOAL = 0.9  # of the bare network's rate
PIXELS_GOAL = 0.7  # of the bare network's rate
JPEG_GOAL = 0.8  # of the cores' decoding rate
TIMES = ("per_second", "p50", "p99", "queue", "preprocess", "vit", "network", "batch")


def markdown(results: Results) -> str:
    """Return the report of everything measured so far."""
    lines = ["# The network on a GPU", ""]
    lines += [f"- {name}: {fact}" for name, fact in results["facts"].items()]
    lines += [f"- {step} failed: {why}" for step, why in results.get("failed", {}).items()]
    lines += [
        "",
        "## Goals",
        "",
        *table("| goal | at least | measured | reached |", goals(results)),
    ]
    sections = {
        "bare": _bare,
        "agreement": _agreement,
        "standin": _standin,
        "cores": _cores,
        "served": _served,
        "decoders": _decoders,
    }
    for step, section in sections.items():
        lines += section(results[step]) if step in results else []
    return "\n".join(lines) + "\n"


def goals(results: Results) -> list[list[str]]:
    """Return a table row per goal; those not measured are marked as open."""
    bare = standin = photos = pixels = jpegs = None
    if "bare" in results:
        bare = max(median(rates) for rates in _as_served(results)["images"][AS_SERVED].values())
    if "standin" in results:
        standin = max(each["images"] for each in results["standin"]["rates"])
    if "cores" in results:
        photos = max(each["photos"] for each in results["cores"]["rates"])
    if "served" in results:
        rows = results["served"]["rows"]
        pixels = _best(row for row in rows if row["model"] == PIXELS)
        jpegs = _best(row for row in rows if row["model"] != PIXELS)
    hopper = any(card in results["facts"]["device"] for card in ("H100", "H200"))
    elsewhere = "" if hopper else "neither an H100 nor an H200"
    return [
        ["bare TorchScript fp16, images/s", *_verdict(BARE_GOAL, bare, elsewhere)],
        ["stand-in for the C++ backend, of bare", *_verdict(STANDIN_GOAL, _of(standin, bare))],
        ["served with pixels, of bare", *_verdict(PIXELS_GOAL, _of(pixels, bare))],
        ["served with JPEGs, of what the cores decode", *_verdict(JPEG_GOAL, _of(jpegs, photos))],
    ]


def _as_served(results: Results) -> Results:
    found: Results = results["bare"][next(iter(VALUES))]
    return found


def _best(rows: Iterable[Results]) -> float:
    """Return the highest images/s; 0 if all failed."""
    return max((float(row.get("per_second", 0)) for row in rows), default=0.0)


def _of(value: float | None, whole: float | None) -> float | None:
    return None if value is None or not whole else value / whole


def _verdict(goal: float, value: float | None, why: str = "") -> list[str]:
    if value is None:
        return [f"{goal:g}", "not measured", "open"]
    return [f"{goal:g}", f"{value:.5g}", why or ("yes" if value >= goal else "no")]


def _bare(found: Results) -> list[str]:
    top = max(found["matrix"].values())
    rows, stalls = [], []
    for value in VALUES:
        of = found[value]
        for way, rates in of["images"].items():
            images = {batch: median(each) for batch, each in rates.items()}
            share = max(images.values()) * found["flops"] / (top * 1e12)
            cells = [f"{rate:.0f}" for rate in images.values()]
            rows.append([f"{way}, {value}", *cells, f"{share:.1%}"])
        first = of["first_ms"]
        worst = max(first, key=lambda size: first[size])
        stalls.append(
            f"{value}: {sum(first.values()):.0f} ms in all, {median(first.values()):.1f} in the "
            f"median, {first[worst]:.0f} at the most (a batch of {worst})"
        )
    batches = " | ".join(next(iter(found[next(iter(VALUES))]["images"].values())))
    matrix = ", ".join(f"{rate:.0f} at {size}" for size, rate in found["matrix"].items())
    return [
        "",
        "## Bare",
        "",
        f"Matrix products: {matrix} TFLOP/s. Copies: {found['copy']:.0f} GB/s, read and written.",
        "",
        "Images/s by batch size. Share: at the best batch, of the best matrix rate, at "
        f"{found['flops'] / 1e9:.2f} GFLOP an image.",
        "",
        *table(f"| | {batches} | share |", rows),
        "",
        "The first run of each batch size, one after the other:",
        "",
        *(f"- {stall}" for stall in stalls),
    ]


def _agreement(found: Results) -> list[str]:
    rows = [
        [name, f"{value:.6g}", f"{found['limits'][name]:g}"]
        for name, value in found["measured"].items()
    ]
    return [
        "",
        "## Agreement",
        "",
        "model.pt on the device with the fp32 network on the CPU, on photos, and the builder's "
        "limits (at most for a difference, else at least).",
        "",
        *table("| | measured | limit |", rows),
    ]


def _standin(found: Results) -> list[str]:
    rows = [[str(e["instances"]), str(e["batch"]), f"{e['images']:.0f}"] for e in found["rates"]]
    return [
        "",
        "## Stand-in for the C++ backend",
        "",
        "Threads with a module and a stream each: pinned copies in, forward, embeddings out.",
        "",
        *table("| instances | batch | images/s |", rows),
    ]


def _cores(found: Results) -> list[str]:
    rows = [[str(e["cores"]), str(e["processes"]), f"{e['photos']:.0f}"] for e in found["rates"]]
    return [
        "",
        "## What the cores decode",
        "",
        "Photos/s by `preprocess`'s decode.py, in as many processes as the cores want. vit-server "
        "has fewer where memory or /dev/shm hold no more.",
        "",
        *table("| cores | processes | photos/s |", rows),
    ]


def _served(found: Results) -> list[str]:
    rows = [
        [str(row["instances"]), row["model"], row["load"], *(_cell(row, key) for key in TIMES)]
        for row in found["rows"]
    ]
    return [
        "",
        "## Served",
        "",
        f"By perf_analyzer; times in ms, as in bench/load. `{PIXELS}` is `embed` without its first "
        "step, since perf_analyzer asks `vit` itself for all outputs, 0.6 MB an image.",
        "",
        *table(f"| instances | model | load | images/s | {' | '.join(TIMES[1:])} |", rows),
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
    missing = [f"- not measured: {each}" for each in found["missing"]]
    return [
        "",
        "## JPEG decoders",
        "",
        f"Files to pixels of the network's size, {found['batch']} at a time.",
        "",
        *table(f"| | images/s | {' | '.join(names)} |", rows),
        *(["", *missing] if missing else []),
    ]


def _cell(row: Results, key: str) -> str:
    return f"{row[key]:.1f}" if key in row else "?"

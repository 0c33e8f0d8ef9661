"""Medians over the rounds, and their ratios."""

from collections.abc import Callable
from statistics import median
from typing import Any

Round = dict[str, Any]
SERVERS = {"served": "this server", "litserve": "LitServe", "fastapi": "FastAPI"}
LIMIT = "the limit: all cores at Pillow, then at model.pt in its best batch"
STRICTER = "the same with a loop of model.pt on each core"
GOALS = {  # minimum
    "served / the limit": 0.92,
    "served / eager": 4.0,
    "served / LitServe": 1.0,
    "served / FastAPI": 1.0,
    "LitServe's p99 / served p99": 1.0,
    "FastAPI's p99 / served p99": 1.0,
    "model.pt / OpenVINO": 0.9,
}
# With --precision int8: ratio to the same server in the other precision.
BASE_GOALS = {"fp32": 2.5, "bf16": 1.6}
LATENCY_GOAL = {"latency of one photo, served / bare": 1.15}  # maximum


def slowest(rounds: list[Round]) -> float:
    """Return the throughput of the slowest server."""
    rates = [[float(found[server]["per_second"]) for found in rounds] for server in SERVERS]
    return min(map(median, rates))


def throughputs(found: Round) -> dict[str, float]:
    """Return images/s of everything measured in a round."""
    model, a_core = found["torchscript"]["best"], found["torchscript_a_core"]["best"]
    pillow = found["pillow"]["all cores"]
    return {
        LIMIT: 1 / (1 / model + 1 / pillow),
        STRICTER: 1 / (1 / a_core + 1 / pillow),
        "model.pt alone, best batch": model,
        "model.pt alone, a loop on each core, best batch": a_core,
        "OpenVINO alone, in the same precision, best batch": found["openvino"]["best"],
        "Pillow alone, all cores": pillow,
        "eager fp32, one photo at a time": found["eager"]["1"],
        **{name: found[server]["per_second"] for server, name in SERVERS.items()},
        **{f"this server in {name}": base["per_second"] for name, base in _base(found)},
    }


def _base(found: Round) -> list[tuple[str, Round]]:
    """Return the other precision and its figures, if measured."""
    return [(found["base precision"], found["base"])] if "base" in found else []


def goals(found: Round) -> dict[str, float]:
    """Return the minimum that each ratio should have."""
    return GOALS | {
        f"served / served in {name}": BASE_GOALS.get(name, 1.0) for name, _ in _base(found)
    }


def ratios(found: Round) -> dict[str, float]:
    """Return the ratios that have goals."""
    rate = throughputs(found)
    served = found["served"]["per_second"]
    p99 = {server: found[f"{server} at rate"]["p99"] for server in SERVERS}
    # One photo: decoded on one core, then alone through the network.
    bare = 1000 / found["pillow"]["one core"] + 1000 / found["torchscript"]["1"]
    values = [
        served / rate[LIMIT],
        served / found["eager"]["1"],
        served / found["litserve"]["per_second"],
        served / found["fastapi"]["per_second"],
        p99["litserve"] / p99["served"],
        p99["fastapi"] / p99["served"],
        max(found[way]["best"] for way in ("torchscript", "torchscript_a_core"))
        / found["openvino"]["best"],
        *(served / base["per_second"] for _, base in _base(found)),
        found["served alone"]["p50"] / bare,
    ]
    return dict(zip((*goals(found), *LATENCY_GOAL), values, strict=True))


def markdown(facts: dict[str, Any], rounds: list[Round]) -> str:
    """Return the report."""
    network = f"{facts['model_name']} in {facts['precision']}, {facts['weights']} weights"
    of_base = []
    for name, _ in _base(rounds[0]):
        servers = {"served": "this server", "base": f"this server in {name}"}
        of_base = _latencies(facts["base rate"], servers, "at base rate", rounds)
    lines = [
        "# Yardsticks",
        "",
        f"`embed` of {network}, Triton {facts['triton']}, on {facts['machine']}. The servers at "
        f"concurrency {facts['concurrency']}. Medians of {len(rounds)} rounds.",
        "",
        *table("| | images/s | of the limit | rounds |", _throughput(rounds)),
        "",
        *_latencies(facts["rate"], SERVERS, "at rate", rounds),
        *of_base,
        *table("| goal | | measured | reached |", _goals(rounds)),
    ]
    return "\n".join(lines) + "\n"


def _throughput(rounds: list[Round]) -> list[list[str]]:
    medians = _medians(rounds, throughputs)
    each = [throughputs(found) for found in rounds]
    return [
        [
            name,
            f"{rate:.1f}",
            f"{rate / medians[LIMIT]:.2f}",
            " ".join(f"{r[name]:.1f}" for r in each),
        ]
        for name, rate in medians.items()
    ]


def _latencies(rate: float, servers: dict[str, str], at: str, rounds: list[Round]) -> list[str]:
    rows = []
    for server, name in servers.items():
        found = [each[f"{server} {at}"] for each in rounds]
        figures = [median(f[key] for f in found) for key in ("p50", "p99", "per_second")]
        rows.append([name, *(f"{figure:.1f}" for figure in figures)])
    return [
        f"Latency at the same {rate:.1f} requests/s, which come at the same times:",
        "",
        *table("| | p50 ms | p99 ms | images/s |", rows),
        "",
    ]


def _goals(rounds: list[Round]) -> list[list[str]]:
    found = _medians(rounds, ratios)
    rows = [(name, "≥", goal, found[name] >= goal) for name, goal in goals(rounds[0]).items()]
    rows += [(name, "≤", goal, found[name] <= goal) for name, goal in LATENCY_GOAL.items()]
    return [
        [name, f"{sign} {goal:.2f}", f"{found[name]:.3f}", "yes" if reached else "no"]
        for name, sign, goal, reached in rows
    ]


def _medians(rounds: list[Round], figures: Callable[[Round], dict[str, float]]) -> dict[str, float]:
    each = [figures(found) for found in rounds]
    return {name: median(found[name] for found in each) for name in each[0]}


def table(head: str, rows: list[list[str]]) -> list[str]:
    rule = "| --- |" + " ---: |" * (head.count("|") - 2)
    return [head, rule, *(f"| {' | '.join(row)} |" for row in rows)]

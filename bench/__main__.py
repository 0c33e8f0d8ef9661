"""All benchmarks in one run, interleaved, so that variations of the machine affect all alike."""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from . import ScriptError, figures, report, say
from .load import inputs, perf_analyzer
from .load.perf_analyzer import WINDOWS, PerfAnalyzerError
from .load.triton import Address, ServerError, Triton, local_server, machine
from .ports import free_ports

HERE = Path(__file__).parent
CONCURRENCY = 16
SHARE = 0.8  # of the slowest server's throughput: the load for comparing latencies


@dataclass(frozen=True)
class Peer:
    """Another server that is running."""

    url: str
    form: str  # format of a request's body: "json" or "raw"
    process: subprocess.Popen[bytes]


@dataclass
class Bench:
    """Settings of the benchmarks."""

    python: Path  # of the virtual environment with the peers
    repository: Path
    base: Path | None  # the same network in another precision
    seconds: float
    folder: Path
    binary: Path = field(default_factory=perf_analyzer.install)

    def alone(self, what: str) -> dict[str, float]:
        """Run alone.py for as long as a load takes; return its figures."""
        seconds = WINDOWS * self.seconds
        return self._run("alone.py", what, self.repository, inputs.PHOTOS, seconds)

    def peer(self, peer: Peer, how: str, value: float | Path) -> dict[str, float]:
        """Run one load on another server over HTTP; it is paused otherwise: idle LitServe polls."""
        seconds = WINDOWS * self.seconds
        os.killpg(peer.process.pid, signal.SIGCONT)
        try:
            return self._run(
                "http_load.py", peer.url, peer.form, inputs.PHOTOS, seconds, how, value
            )
        finally:
            os.killpg(peer.process.pid, signal.SIGSTOP)

    def served(self, address: Address, how: str, value: float | Path) -> dict[str, float]:
        """Run one load on our server with perf_analyzer."""
        option = {"concurrency": "--concurrency-range", "intervals": "--request-intervals"}[how]
        arguments = [*address.arguments(), option, str(value)]
        data = self.folder / "images.json"
        found = perf_analyzer.measure(self.binary, "embed", data, self.seconds, arguments)
        return {"per_second": found.per_second, "p50": found.p50, "p99": found.p99}

    def _run(self, script: str, *arguments: object) -> dict[str, float]:
        return figures(self.python, HERE / "peers" / script, *arguments)

    @contextlib.contextmanager
    def peer_server(self, script: str, form: str) -> Iterator[Peer]:
        """Run another server on a free port, as a context manager."""
        (port,) = free_ports(1)
        command = [str(self.python), str(HERE / "peers" / script), str(self.repository), str(port)]
        # Its own session, so that signals reach all its workers.
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            yield Peer(f"http://127.0.0.1:{port}/embed", form, process)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main() -> int:
    """Run the command; return the exit code."""
    args = _parser().parse_args()
    if not args.python.is_file():
        print(f"bench: no {args.python}: `make bench` creates it", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = HERE / "results" / f"{datetime.now():%Y-%m-%d-%H%M%S}"
    folder.mkdir(parents=True)
    try:
        repository, base = args.model_repository.resolve(), None
        if args.precision:
            repository, base = _built(args.precision, folder), repository
        bench = Bench(args.python, repository, base, args.seconds, folder)
        rounds, facts = _measure(bench, args.rounds)
    except (ScriptError, PerfAnalyzerError, ServerError) as e:
        print(f"bench: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    (folder / "results.json").write_text(json.dumps({**facts, "rounds": rounds}, indent=2) + "\n")
    text = report.markdown(facts, rounds)
    (folder / "report.md").write_text(text)
    print(f"\n{text}\nWrote {folder}")
    return 0


def _built(precision: str, folder: Path) -> Path:
    """Build the network with random weights, which cost the same."""
    repository = folder / "models"
    command = [Path(sys.executable).parent / "vit-builder", "--weights", "random"]
    command += ["--precision", precision, "--output", repository]
    if subprocess.run(command, stdout=sys.stderr).returncode != 0:
        raise ScriptError("vit-builder failed, see above")
    return repository


def _measure(bench: Bench, count: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    inputs.write_images(
        bench.folder / "images.json", [p.read_bytes() for p in inputs.photos(inputs.PHOTOS)]
    )
    with contextlib.ExitStack() as stack:
        # All stay up, and all but the one being measured are idle.
        address = stack.enter_context(local_server(bench.repository))
        litserve = stack.enter_context(bench.peer_server("serve_litserve.py", "json"))
        fastapi = stack.enter_context(bench.peer_server("serve_fastapi.py", "raw"))
        base = stack.enter_context(local_server(bench.base)) if bench.base else None
        for peer in (litserve, fastapi):
            bench.peer(peer, "concurrency", 1)  # until it is up and warm
        rounds: list[dict[str, Any]] = []
        for number in range(count):
            say(f"round {number + 1} of {count}: throughput")
            found: dict[str, Any] = {
                what: bench.alone(what)
                for what in ("openvino", "eager", "pillow", "torchscript_a_core", "torchscript")
            }
            found["served"] = bench.served(address, "concurrency", CONCURRENCY)
            found["served alone"] = bench.served(address, "concurrency", 1)
            found["litserve"] = bench.peer(litserve, "concurrency", CONCURRENCY)
            found["fastapi"] = bench.peer(fastapi, "concurrency", CONCURRENCY)
            if base:
                found["base precision"] = Triton(base).facts()["precision"]
                found["base"] = bench.served(base, "concurrency", CONCURRENCY)
            rounds.append(found)
        rate = SHARE * report.slowest(rounds)
        intervals = _intervals(bench, rate)
        for number, found in enumerate(rounds):
            say(f"round {number + 1} of {count}: latency at {rate:.1f} requests/s")
            found["served at rate"] = bench.served(address, "intervals", intervals)
            found["litserve at rate"] = bench.peer(litserve, "intervals", intervals)
            found["fastapi at rate"] = bench.peer(fastapi, "intervals", intervals)
        facts = {**Triton(address).facts(), "rate": rate, "concurrency": CONCURRENCY}
        if base:
            facts["base rate"] = SHARE * median(found["base"]["per_second"] for found in rounds)
            intervals = _intervals(bench, facts["base rate"])
            for number, found in enumerate(rounds):
                say(
                    f"round {number + 1} of {count}: latency at {facts['base rate']:.1f} requests/s"
                )
                found["served at base rate"] = bench.served(address, "intervals", intervals)
                found["base at base rate"] = bench.served(base, "intervals", intervals)
        facts["machine"] = machine()
    return rounds, facts


def _intervals(bench: Bench, rate: float) -> Path:
    """Write the same arrivals for all servers: as of independent users, at exactly this rate."""
    gaps = np.random.default_rng(0).exponential(size=round(rate * WINDOWS * bench.seconds) + 1)
    path = bench.folder / "intervals.txt"
    path.write_text("\n".join(f"{gap:.0f}" for gap in gaps * (1e6 / rate / gaps.mean())) + "\n")
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Compare the served `embed` with the best that this machine can do, with the "
        "eager network, and with other servers. Run it on an otherwise idle machine.",
    )
    add = parser.add_argument
    add(
        "--python",
        type=Path,
        default=Path(".venv-bench/bin/python"),
        metavar="FILE",
        help="Python of the environment with bench/peers/requirements.txt (default: .venv-bench's)",
    )
    add(
        "--model-repository",
        type=Path,
        default=Path("models"),
        metavar="DIR",
        help="what to serve (default: models)",
    )
    add(
        "--precision",
        choices=["fp32", "bf16", "int8"],
        help="build the full-size network in this precision and measure it next to the one in "
        "--model-repository (default: measure only the latter)",
    )
    add("--rounds", type=int, default=3, help="number of rounds; results are medians (default: 3)")
    add("--seconds", type=float, default=5, help="length of each of three windows (default: 5)")
    return parser


if __name__ == "__main__":
    sys.exit(main())

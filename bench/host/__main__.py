"""The host's work per image besides the network, and the images/s that it can supply."""

import argparse
import contextlib
import json
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import vit_builder
from vit_builder.model import ViTConfig
from vit_server import sizing

from .. import ScriptError, figures, say
from ..footprint import name_of
from ..load import inputs, perf_analyzer
from ..load.perf_analyzer import PerfAnalyzerError
from ..load.triton import Address, ServerError, Triton, local_server, machine

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
SIDE = 256
CONCURRENCY = 16
MEGAPIXELS = (0.25, 2.0, 12.0)
CORES = (8, 16, 32)
# Appended to decode.py: leaves only what Triton and Python do around the decoding.
NO_DECODING = """

import numpy as np
_GRAY = np.full((256, 256, 3), 128, np.uint8)


def decode(data, height, width, room, fast_jpeg=False):
    return _GRAY
"""


@dataclass
class Bench:
    python: Path
    seconds: float
    folder: Path

    def served(self, address: Address, data: Path) -> dict[str, float]:
        """Return CPU milliseconds per image by process, and images/s."""
        triton = Triton(address)
        arguments = [*address.arguments(), "--concurrency-range", str(CONCURRENCY)]
        images, used = triton.counters()["preprocess"].images, processor_seconds()
        found = perf_analyzer.measure(
            perf_analyzer.install(), "embed", data, self.seconds, arguments
        )
        images = triton.counters()["preprocess"].images - images
        used = processor_seconds() - used
        core_ms = {name: 1e3 * seconds / images for name, seconds in used.items()}
        return {**core_ms, "images/s": found.per_second}

    def loops(self, files: list[Path]) -> dict[str, dict[str, float]]:
        """Run loops.py; return its figures."""
        preprocess = ROOT / "model_repository" / "preprocess" / "1"
        script = Path(__file__).parent / "loops.py"
        return figures(self.python, script, preprocess, SIDE, *files)


def processor_seconds() -> Counter[str]:
    """Return the CPU seconds that the server's processes have used, by model."""
    used: Counter[str] = Counter()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            used[name_of(process)] += times.user + times.system
    return used


@contextlib.contextmanager
def repositories(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Provide a repository with a trivial network, and one that does not decode either."""
    config = ViTConfig((SIDE, SIDE), 12, num_layers=1, num_heads=1, hidden_dim=16, mlp_dim=16)
    settings = vit_builder.Settings("fp32", max_batch_size=16, top_k=12)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        whole, around = Path(temporary, "models"), Path(temporary, "without decoding")
        vit_builder.build(vit_builder.random(config), settings, whole)
        shutil.copytree(whole, around)
        (decode,) = around.glob("preprocess/*/decode.py")
        with decode.open("a") as file:
            file.write(NO_DECODING)
        yield whole, around


def measure(bench: Bench, count: int) -> dict[str, Any]:
    """Measure all rounds."""
    sent: dict[str, list[Path]] = {}
    for megapixels in MEGAPIXELS:
        folder = bench.folder / f"{megapixels:g} MP"
        folder.mkdir()
        sent[f"{megapixels:g}"] = files = []
        for photo in inputs.photos(inputs.PHOTOS):
            files.append(folder / photo.name)
            files[-1].write_bytes(inputs.resized(photo, megapixels))
        inputs.write_images(folder / "images.json", [file.read_bytes() for file in files])
    rounds: list[dict[str, Any]] = []
    with repositories(bench.folder) as (whole, around):
        for number in range(count):
            found: dict[str, Any] = {"served": {}, "loops": {}}
            for name, files in sent.items():
                say(f"round {number + 1} of {count}: {name} megapixels, served and in bare loops")
                data = files[0].parent / "images.json"
                with local_server(whole) as address:
                    found["served"][name] = bench.served(address, data)
                found["loops"][name] = bench.loops(files)
            say(f"round {number + 1} of {count}: without decoding")
            with local_server(around) as address:
                data = bench.folder / f"{MEGAPIXELS[0]:g} MP" / "images.json"
                found["around"] = bench.served(address, data)
            rounds.append(found)
    return {"machine": machine(), "rounds": rounds}


def predicted(cores: int, core_ms: float, lock_ms: float) -> tuple[int, float]:
    """Return the number of processes, and images/s as limited by the cores and by the GIL."""
    processes = sizing.wanted(cores)
    return processes, min(cores / core_ms, processes / lock_ms) * 1e3


def markdown(results: dict[str, Any]) -> str:
    """Return the report."""
    rounds = results["rounds"]

    def of(*path: str) -> float:
        values = []
        for found in rounds:
            for key in path:
                found = found[key]
            values.append(float(found))
        return median(values)

    lines = [
        f"# The host's part of an image, on {results['machine']}\n",
        f"Medians of {len(rounds)} rounds; core-ms an image, {CONCURRENCY} requests at a time, a "
        "network that costs next to nothing.\n",
        "| megapixels | preprocess | tritonserver | the two | images/s here |",
        "|---:|---:|---:|---:|---:|",
    ]
    for name in rounds[0]["served"]:
        two = [of("served", name, part) for part in ("preprocess", "tritonserver")]
        rate = of("served", name, "images/s")
        lines.append(f"| {name} | {two[0]:.2f} | {two[1]:.2f} | {sum(two):.2f} | {rate:.0f} |")
    small = f"{MEGAPIXELS[0]:g}"
    core_ms = sum(of("served", small, part) for part in ("preprocess", "tritonserver"))
    lock_ms = of("around", "preprocess")
    lines += [
        f"\nAround the decoding, in preprocess: {lock_ms:.2f} core-ms an image, that is all but "
        "decode(). It is taken for what needs the interpreter's lock, though part of it is "
        "Triton's own, and a few lines of decode() need the lock too.\n",
        f"| cores | processes | predicted images/s of {small} megapixels |",
        "|---:|---:|---:|",
    ]
    for cores in CORES:
        processes, rate = predicted(cores, core_ms, lock_ms)
        lines.append(f"| {cores} | {processes} | {rate:,.0f} |")
    lines += [
        "\nThe lesser of cores / core-ms and processes / lock-ms, as if cores did not slow each "
        "other down; of `preprocess` and tritonserver alone: `classify` has postprocess too, and "
        "HTTP the process in front of Triton.\n",
        "| decode and resize, on one core | megapixels | ms | of ours | pixels off, mean | most |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in rounds[0]["loops"]:
        ours = of("loops", name, "preprocess's decode.py", "ms")
        for way in rounds[0]["loops"][name]:
            ms, mean, most = (of("loops", name, way, part) for part in ("ms", "mean", "most"))
            lines.append(
                f"| {way} | {name} | {ms:.2f} | {ms / ours:.2f} | {mean:.2f} | {most:.0f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the command; return the exit code."""
    args = _parser().parse_args()
    if not args.python.is_file():
        print(f"bench-host: no {args.python}: `make bench-host` creates it", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = args.output or RESULTS / f"{datetime.now():%Y-%m-%d-%H%M%S}-host"
    folder.mkdir(parents=True)
    try:
        results = measure(Bench(args.python, args.seconds, folder), args.rounds)
    except (ScriptError, PerfAnalyzerError, ServerError) as e:
        print(f"bench-host: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    text = markdown(results)
    (folder / "report.md").write_text(text)
    print(f"\n{text}\nWrote {folder}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.host",
        description="Measure the host's work per image besides the network: decoding, resizing, "
        "Triton. Run it on an otherwise idle machine.",
    )
    add = parser.add_argument
    add(
        "--python",
        type=Path,
        default=Path(".venv-bench/bin/python"),
        metavar="FILE",
        help="Python of the environment with bench/host/requirements.txt (default: .venv-bench's)",
    )
    add("--rounds", type=int, default=3, help="number of rounds; results are medians (default: 3)")
    add("--seconds", type=float, default=5, help="length of each of three windows (default: 5)")
    add(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for the results (default: bench/results/DATE-host)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())

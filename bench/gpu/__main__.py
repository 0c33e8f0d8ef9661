"""All GPU benchmarks in one run, the most important first; results are written after each step."""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import torch
import vit_builder
from vit_builder import verify
from vit_builder.cli import positive
from vit_builder.export import DTYPES
from vit_builder.images import SHIPPED, pixels

from .. import say
from ..load import inputs, perf_analyzer
from . import bare, cores, decoders, report, served, standin
from .bare import Network
from .device import Device, NoGpuError, reason
from .served import PIXELS, Load

RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Plan:
    """Batch sizes and loads to measure."""

    precision: str
    batches: list[int]  # of the bare network
    sizes: int  # time the first run of each batch size up to this
    matrices: list[int]
    copied: int  # MiB
    standin: tuple[list[int], list[int]]  # instances, batch sizes
    instances: list[int]  # served
    loads: list[Load]


PLANS = {
    "cuda": Plan(
        precision="fp16",
        batches=[1, 2, 4, 8, 16, 32, 64, 128, 256],
        sizes=64,
        matrices=[4096, 8192, 16384],
        copied=1024,
        standin=([1, 2, 3, 4], [32, 64, 128]),
        instances=[1, 2, 4],
        loads=[Load(PIXELS, 32, 16), Load("embed", 64), Load("embed", 256)],
    ),
    "cpu": Plan(
        precision="fp32",
        batches=[1, 4],
        sizes=4,
        matrices=[256],
        copied=16,
        standin=([1, 2], [4]),
        instances=[1, 2],
        loads=[Load(PIXELS, 2, 4), Load("embed", 4)],
    ),
}


@dataclass(frozen=True)
class Bench:
    """Settings shared by all steps."""

    device: Device
    plan: Plan
    network: Network
    folder: Path  # scratch
    rounds: int
    seconds: float

    def bare(self) -> report.Results:
        """Measure the network in batches, and the device's limits."""
        plan, device, cfg = self.plan, self.device, self.network.checkpoint.config
        settings = {"batches": plan.batches, "sizes": plan.sizes, "rounds": self.rounds}
        found: report.Results = {"flops": bare.flops(cfg)}
        for name, value in bare.VALUES.items():
            say(f"bare: {name}")
            found[name] = bare.in_a_process(
                value, self.network, device, **settings, seconds=self.seconds / 4
            )
        dtype = DTYPES[plan.precision]
        found["matrix"] = device.matrix_rates(plan.matrices, dtype, self.seconds)
        found["copy"] = device.copy_rate(plan.copied, self.seconds)
        rows = bare.pixels(cfg, max(plan.batches), device)
        found["profile"] = bare.profile(self.network.traced(device), rows)
        return found

    def agreement(self) -> report.Results:
        """Verify the network on the device, by the builder's own limits."""
        network = self.network
        photos = pixels(SHIPPED, network.checkpoint.config.image_size)
        found = verify.compare(
            network.model_file(), network.checkpoint, network.top_k, 64, photos, self.device.kind
        )
        limits = verify.limits(network.precision, "fp32")
        return {"measured": asdict(found), "limits": asdict(limits)}

    def standin(self) -> report.Results:
        """Measure what determines the number of instances and the batch size."""
        return {"rates": standin.rates(self.network, self.device, *self.plan.standin, self.seconds)}

    def cores(self) -> report.Results:
        """Measure the image rate that `preprocess` can supply."""
        height, _ = self.network.checkpoint.config.image_size
        return {"rates": cores.rates(height, max(1.0, self.seconds))}

    def served(self) -> report.Results:
        """Measure the whole server, by perf_analyzer."""
        binary = perf_analyzer.install()
        bench = served.Bench(
            self.network.repository, self.folder, self.device.kind, self.seconds, binary, say
        )
        bench.write_inputs(*self.network.checkpoint.config.image_size)
        return {"rows": bench.measure(self.plan.instances, self.plan.loads)}

    @torch.inference_mode()
    def decoders(self) -> report.Results:
        """Measure whether a GPU decodes JPEGs faster than this machine's cores, and how exactly."""
        photos = [path.read_bytes() for path in inputs.photos(inputs.PHOTOS)]
        size = self.network.checkpoint.config.image_size
        batch = max(self.plan.batches) // 4
        measured = decoders.Decoders(self.device, size, photos)
        run = self.network.traced(self.device)
        return {"batch": batch, **measured.measure(run, batch, self.seconds, self.rounds)}


STEPS: dict[str, Callable[[Bench], report.Results]] = {
    "bare": Bench.bare,
    "agreement": Bench.agreement,
    "standin": Bench.standin,
    "cores": Bench.cores,
    "served": Bench.served,
    "decoders": Bench.decoders,
}


def main() -> int:
    """Run the command; return the exit code."""
    args = _parser().parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # cleans up like Ctrl-C
    # Triton would create instances on every visible GPU.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    os.environ[bare.VARIABLE] = "1"  # as vit-server sets it; torch has not read it yet
    folder = args.output or RESULTS / f"{datetime.now():%Y-%m-%d-%H%M%S}-gpu"
    try:
        device = Device(args.device)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="vit-bench-gpu-") as scratch:
            return _measure(args, device, folder, Path(scratch))
    except (NoGpuError, vit_builder.CheckpointError) as e:
        print(f"bench-gpu: {e}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError:  # vit-builder has reported why
        return 1
    except OSError as e:
        print(f"bench-gpu: {folder} cannot be written: {e.strerror or e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nInterrupted. The results so far are in {folder}", file=sys.stderr)
        return 130


def _measure(args: argparse.Namespace, device: Device, folder: Path, scratch: Path) -> int:
    """Run all steps; return 1 if any failed. A failed step does not stop the others."""
    plan, began = PLANS[device.kind], time.monotonic()
    network = _network(args.checkpoint, plan.precision, scratch)
    bench = Bench(device, plan, network, scratch, args.rounds, args.seconds)
    name, weights = network.checkpoint.name, "given" if args.checkpoint else "random"
    facts = {**device.facts(), "network": f"{name} in {plan.precision}, {weights} weights"}
    results: report.Results = {"facts": facts, "failed": {}, "seconds": {}}
    _write(folder, results)
    for step in [step for step in STEPS if step in args.parts]:
        say(step)
        try:
            results[step] = STEPS[step](bench)
        except Exception as e:  # any failure: the other steps still count
            results["failed"][step] = reason(e)
            say(f"{step} failed: {reason(e)}")
        results["seconds"][step] = round(time.monotonic() - began)
        _write(folder, results)
    print(f"{report.markdown(results)}\nWrote {folder}")
    return int(bool(results["failed"]))


def _network(file: Path | None, precision: str, scratch: Path) -> Network:
    """Build the network with the builder's defaults for a GPU."""
    repository = scratch / "models"
    command = [str(Path(sys.executable).parent / "vit-builder"), "--output", str(repository)]
    command += ["--device", "cuda", "--precision", precision]
    command += ["--checkpoint", str(file)] if file else ["--weights", "random"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    top_k = json.loads((repository / "build_report.json").read_text())["top_k"]
    return Network(file, repository, precision, top_k)


def _write(folder: Path, results: report.Results) -> None:
    """Write the results; called after each step, so that an interrupted run is not lost."""
    if profile := results.get("bare", {}).pop("profile", ""):
        (folder / "profile.txt").write_text(profile)
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (folder / "report.md").write_text(report.markdown(results))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description="Measure the network on this machine's GPU: bare, behind a stand-in for "
        "Triton's C++ backend, and served; the cores that feed it; and JPEG decoders. Run it on "
        "an otherwise idle machine.",
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="measure this checkpoint (default: the published network with random weights, which "
        "cost the same)",
    )
    parts = f"parts to run, of {', '.join(STEPS)} (default: all)"
    add("--parts", nargs="+", choices=list(STEPS), default=STEPS, metavar="PART", help=parts)
    add(
        "--rounds",
        type=positive,
        default=3,
        help="number of rounds; results are medians (default: 3)",
    )
    add("--seconds", type=_seconds, default=1, help="length of one window (default: 1)")
    add(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for the results (default: bench/results/DATE-gpu)",
    )
    add(
        "--device",
        choices=list(PLANS),
        default="cuda",
        help="cpu: try this script without a GPU, on a small scale; the figures mean nothing "
        "(default: %(default)s)",
    )
    return parser


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < 3600:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds")
    return number


if __name__ == "__main__":
    sys.exit(main())

"""Everything in one run: what the GPU can do, the bare network, the served one, the decoders."""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import vit_builder
from vit_builder.export import DTYPES

from tests.load import inputs, perf_analyzer
from tests.load.perf_analyzer import PerfAnalyzerError
from tests.load.triton import ServerError

from .. import say
from . import bare, decoders, report, served
from .bare import Network, WrongError
from .device import Device, NoGpuError, reason
from .served import PIXELS, Load, Settings

RESULTS = Path(__file__).parents[1] / "results"
PARTS = ("bare", "served", "decoders")


@dataclass(frozen=True)
class Plan:
    """Which sizes, settings and loads."""

    precision: str
    batches: list[int]  # of the bare network
    matrices: list[int]
    copied: int  # MiB
    grid: dict[str, list[Any]]  # of the server's settings, in this order
    choosing: list[Load]  # the loads they are chosen by
    loads: dict[str, list[Load]]  # by model, with the settings as chosen


PLANS = {
    "cuda": Plan(
        precision="fp16",
        batches=[1, 2, 4, 8, 16, 32, 64, 128, 256],
        matrices=[4096, 8192, 16384],
        copied=1024,
        grid={
            "instances": [1, 2, 4],
            "max_batch_size": [64, 128, 256],
            "queue_delay": [0, 1000],
            "profiling_executor": [False, True],
        },
        choosing=[Load(64), Load(512), Load(32, 16)],
        loads={
            PIXELS: [Load(1), Load(8), Load(64), Load(256), Load(512), Load(32, 16)],
            "vit": [Load(64)],
            "embed": [Load(1), Load(16), Load(64), Load(256), Load(16, 16)],
        },
    ),
    "cpu": Plan(
        precision="fp32",
        batches=[1, 4],
        matrices=[256],
        copied=16,
        grid={"instances": [1, 2]},
        choosing=[Load(4), Load(2, 4)],
        loads={PIXELS: [Load(4), Load(2, 4)], "vit": [Load(4)], "embed": [Load(4)]},
    ),
}


@dataclass(frozen=True)
class Bench:
    """What every part needs."""

    device: Device
    plan: Plan
    network: Network
    folder: Path  # scratch
    rounds: int
    seconds: float

    def bare(self, *, compiled: bool) -> report.Results:
        """Every way to run the network, at every batch size, in turns."""
        device, cfg = self.device, self.network.checkpoint.config
        pixels = bare.pixels(cfg, self.plan.batches, device)
        found: report.Results = {"flops": bare.flops(cfg), "warm_up": {}, "cosines": {}}
        found |= {"missing": [] if compiled else [f"{bare.COMPILED} (--compile)"], "rounds": []}
        photos = decoders.by_preprocess(_photos(), cfg.image_size)
        expected = self.network.eager("fp32")(photos)[1]
        runs = {}
        for name in [name for name in bare.WAYS if compiled or name != bare.COMPILED]:
            say(f"bare: warming up {name}")
            try:
                run = bare.WAYS[name](self.network, device)
                found["cosines"][name] = bare.cosine(run, photos.to(device.kind), expected)
                found["warm_up"][name] = bare.warm_up(run, pixels, device)
            except (RuntimeError, WrongError) as e:  # of one way: the others are measured
                if name == bare.AS_SERVED:
                    raise
                found["missing"].append(f"{name}: {reason(e)}")
            else:
                runs[name] = run
        dtype = DTYPES[self.plan.precision]
        for number in range(self.rounds):
            say(f"bare: round {number + 1} of {self.rounds}")
            rates = {
                "matrix": device.matrix_rates(self.plan.matrices, dtype, self.seconds),
                "copy": device.copy_rate(self.plan.copied, self.seconds),
                "images": bare.rates(runs, pixels, device, self.seconds / 4),
            }
            found["rounds"].append(rates)
        found["profile"] = bare.profile(runs[bare.AS_SERVED], pixels[max(pixels)])
        return found

    def served(self) -> report.Results:
        """Settings chosen, then measured, beside the bare file."""
        bench = served.Bench(
            self.network.repository,
            self.folder,
            self.device.kind,
            self.seconds,
            self.rounds,
            perf_analyzer.install(),
            say,
        )
        bench.write_inputs(*self.network.checkpoint.config.image_size)
        found = served.choose(bench, self.plan.grid, self.plan.choosing)
        settings = Settings(**found["chosen"])
        return {**found, "final": served.final(bench, settings, self.plan.loads, self._yardstick())}

    def decoders(self) -> report.Results:
        """Whether a GPU would decode JPEGs faster than this machine's cores, and how well."""
        say("decoders")
        cfg = self.network.checkpoint.config
        run = bare.WAYS[bare.AS_SERVED](self.network, self.device)
        batch = max(self.plan.batches) // 4
        measured = decoders.Decoders(self.device, cfg.image_size, _photos())
        found = measured.measure(run, batch, self.seconds, self.rounds)
        return {"batch": batch, **found}

    def _yardstick(self) -> Callable[[], float]:
        """Images a second of the bare file, measured now: the best of its large batches."""
        pixels = bare.pixels(self.network.checkpoint.config, self.plan.batches[-3:], self.device)
        run = bare.WAYS[bare.AS_SERVED](self.network, self.device)

        @torch.inference_mode()
        def rate() -> float:
            bare.warm_up(run, pixels, self.device)
            found = bare.rates({"": run}, pixels, self.device, self.seconds / 4)
            return max(found[""].values())

        return rate


def _photos() -> list[bytes]:
    return [path.read_bytes() for path in inputs.photos(inputs.PHOTOS)]


def main() -> int:
    """Entry point; the exit code."""
    args = _parser().parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # cleans up like Ctrl-C
    # Triton would put instances on every GPU that it sees.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    try:
        device = Device(args.device)
        with tempfile.TemporaryDirectory(prefix="vit-bench-gpu-") as scratch:
            _measure(args, device, Path(scratch))
    except (
        NoGpuError,
        WrongError,
        PerfAnalyzerError,
        ServerError,
        vit_builder.CheckpointError,
    ) as e:
        print(f"bench-gpu: {e}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError:  # vit-builder has said why
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _measure(args: argparse.Namespace, device: Device, scratch: Path) -> None:
    plan = PLANS[device.kind]
    network = _network(args.checkpoint, plan.precision, scratch)
    bench = Bench(device, plan, network, scratch, args.rounds, args.seconds)
    folder = args.output or RESULTS / f"{datetime.now():%Y-%m-%d-%H%M%S}-gpu"
    folder.mkdir(parents=True, exist_ok=True)
    weights = "trained" if network.checkpoint.trained else "random"
    facts = {
        **device.facts(),
        "network": f"{network.checkpoint.name} in {plan.precision}, {weights} weights",
    }
    results: report.Results = {"facts": facts}
    with torch.inference_mode():
        if "bare" in args.parts:
            results["bare"] = bench.bare(compiled=args.compile)
            (folder / "profile.txt").write_text(results["bare"].pop("profile"))
            _write(folder, results)
        if "decoders" in args.parts:
            results["decoders"] = bench.decoders()
            _write(folder, results)
    if "served" in args.parts:
        results["served"] = bench.served()
        _write(folder, results)
    print(f"{report.markdown(results)}\nWrote {folder}")


def _network(file: Path | None, precision: str, scratch: Path) -> Network:
    """Built with the builder's own choices for a GPU."""
    repository = scratch / "models"
    command = [str(Path(sys.executable).parent / "vit-builder"), "--output", str(repository)]
    command += ["--device", "cuda", "--precision", precision]
    command += ["--checkpoint", str(file)] if file else ["--weights", "random"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    checkpoint = vit_builder.load(file) if file else vit_builder.random()
    top_k = json.loads((repository / "build_report.json").read_text())["top_k"]
    return Network(checkpoint, repository, precision, top_k)


def _write(folder: Path, results: report.Results) -> None:
    """After each part, so that a run that ends early has not been for nothing."""
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (folder / "report.md").write_text(report.markdown(results))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description="Measure the network on this machine's GPU: bare, then served with settings "
        "that are tried out, and JPEG decoders. Needs a machine that does nothing else.",
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="(default: the published network with random weights, which cost the same)",
    )
    add("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help="(all)")
    add("--compile", action="store_true", help="torch.compile too, as a ceiling: minutes more")
    add("--rounds", type=int, default=3, help="medians are over these (default: 3)")
    add("--seconds", type=float, default=1, help="of one window (default: 1)")
    add("--output", type=Path, metavar="DIR", help="(default: bench/results/DATE-gpu)")
    add(
        "--device",
        choices=list(PLANS),
        default="cuda",
        help="cpu: to try this script without a GPU, in small; the figures mean nothing",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())

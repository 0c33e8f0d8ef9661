"""Sweeps the load on each model with perf_analyzer, and writes a report."""

import argparse
import contextlib
import signal
import sys
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import inputs, perf_analyzer, report
from .perf_analyzer import PerfAnalyzerError
from .report import Point
from .sweep import Sweep
from .triton import Address, ServerError, Triton, local_server, machine

MODELS = ("classify", "probabilities", "embed", "features", "analyze", "everything", "vit")
RESULTS = Path(__file__).parent / "results"


def main() -> int:
    """Run the command; return the exit code."""
    args = _parser().parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # cleans up like Ctrl-C
    if not find_spec("matplotlib"):  # fail now, not after ten minutes
        print("load test: pip install -r bench/load/requirements.txt first", file=sys.stderr)
        return 1
    try:
        paths = inputs.photos(args.photos)
        binary = perf_analyzer.install()
        given = contextlib.nullcontext(_address(args)) if args.url else None
        with given or local_server(args.model_repository) as address:
            return _run(args, Sweep(Triton(address), binary, args.seconds, args.extra), paths)
    except (PerfAnalyzerError, ServerError, inputs.NoPhotosError) as e:
        print(f"load test: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _run(args: argparse.Namespace, sweep: Sweep, paths: list[Path]) -> int:
    """Run every load on every model; results are written even if the run ends early."""
    served = sweep.triton.facts()
    folder = args.output or RESULTS / f"{datetime.now():%Y-%m-%d-%H%M%S}"
    facts = _facts(args, served, paths)
    kind, loads = ("rate", args.rate) if args.rate else ("concurrency", args.concurrency)
    points: list[Point] = []
    failures = 0
    try:
        for model, images, data in _inputs(args, folder / "inputs", served["pixels"], paths):
            series: list[Point] = []
            print(f"\n{model}" + (f", {images}" if images else ""), flush=True)
            for load in loads:
                try:
                    series.append(sweep.point(model, images, data, kind, load))
                except PerfAnalyzerError as e:
                    failures += 1
                    print(f"{model} at {kind} {load:g}: {e}", file=sys.stderr, flush=True)
                else:
                    points.append(series[-1])
                    print(
                        "\n".join(report.table(series)[0 if len(series) == 1 else -1 :]), flush=True
                    )
    finally:
        if points:
            report.write(folder, facts, points)
            print(f"\nWrote {folder}/report.md, latency.png, results.csv and results.json")
    return 1 if failures else 0


def _inputs(
    args: argparse.Namespace, folder: Path, pixels: list[int], paths: list[Path]
) -> list[tuple[str, str, Path]]:
    """Write the input files; return (model, images, input file) for all to be measured."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for megapixels in args.megapixels or [None]:
        name = "" if megapixels is None else f"{megapixels:g} MP"
        data = [p.read_bytes() if not megapixels else inputs.resized(p, megapixels) for p in paths]
        files[name] = folder / f"images-{name.replace(' ', '') or 'as-they-are'}.json"
        inputs.write_images(files[name], data)
    inputs.write_pixels(folder / "pixels.json", paths, *pixels[:2])
    found = []
    for model in args.models:
        its = {"": folder / "pixels.json"} if model == "vit" else files
        found += [(model, images, data) for images, data in its.items()]
    return found


def _facts(args: argparse.Namespace, served: dict[str, Any], paths: list[Path]) -> dict[str, Any]:
    weights = served["weights"] or "unknown"
    where = args.url or f"vit-server here, with perf_analyzer beside it: {machine()}"
    return {
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        "network": f"{served['model_name']} in {served['precision']}, {weights} weights",
        "server": f"Triton {served['triton']}, batches up to {served['max_batch_size']}; {where}",
        "photos": f"{len(paths)} of {args.photos.resolve().name}/, in turn",
        "perf_analyzer": " ".join(["of", perf_analyzer.version(), *args.extra]),
        "measured": f"{perf_analyzer.WINDOWS} windows of {args.seconds:g} s each",
    }


def _address(args: argparse.Namespace) -> Address:
    host = args.url.removeprefix("grpcs://").removeprefix("grpc://")
    files = args.ca_file, args.cert_file, args.key_file
    return Address(host, args.url.startswith("grpcs://") or any(files), *files)


def _positive(text: str) -> float:
    number = float(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.load",
        description="Load-test a Triton server that serves our models, with perf_analyzer.\n\n"
        "Without --url it starts vit-server on this machine. Writes a report, a chart of\n"
        "latency against throughput, CSV and JSON.",
        epilog="examples:\n"
        "  python -m bench.load                               # all models: 15 minutes\n"
        "  python -m bench.load --models embed --megapixels 0.05 0.3 2\n"
        "  python -m bench.load --models embed --rate 5 10 15 20\n"
        "  python -m bench.load --url grpcs://vit.example:443 --ca-file ca.pem\n"
        "  python -m bench.load --models vit -- -b 8          # options for perf_analyzer\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--url",
        metavar="HOST:PORT",
        help="test this running server (its gRPC port; grpcs://… for TLS)",
    )
    add(
        "--ca-file",
        metavar="FILE",
        help="CA certificates that the server's must be signed by (PEM)",
    )
    add("--cert-file", metavar="FILE", help="client certificate, for mutual TLS (PEM)")
    add("--key-file", metavar="FILE", help="its private key (PEM)")
    add(
        "--model-repository",
        type=Path,
        default=Path("models"),
        metavar="DIR",
        help="what to serve if no --url is given (default: models)",
    )
    add(
        "--models",
        nargs="+",
        choices=MODELS,
        default=MODELS,
        metavar="MODEL",
        help=f"models to test, of {', '.join(MODELS)} (default: all)",
    )
    load = parser.add_mutually_exclusive_group()
    load.add_argument(
        "--concurrency",
        nargs="+",
        type=_count,
        default=[1, 2, 4, 8, 16, 32],
        metavar="N",
        help="numbers of requests in flight (default: 1 2 4 8 16 32)",
    )
    load.add_argument(
        "--rate",
        nargs="+",
        type=_positive,
        metavar="N",
        help="instead of a concurrency: requests per second, sent as a Poisson process whether or "
        "not earlier ones were answered",
    )
    add(
        "--photos",
        type=Path,
        default=inputs.PHOTOS,
        metavar="PATH",
        help="photos to send: a file or folder (default: photos/)",
    )
    add(
        "--megapixels",
        nargs="+",
        type=_positive,
        metavar="MP",
        help="send each photo as a JPEG of these sizes (default: the unchanged files)",
    )
    add("--seconds", type=_positive, default=5, help="length of each of three windows (default: 5)")
    add(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for the results (default: bench/load/results/DATE)",
    )
    add("extra", nargs="*", metavar="-- …", help="options after -- are passed to perf_analyzer")
    return parser


if __name__ == "__main__":
    sys.exit(main())

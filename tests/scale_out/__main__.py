"""How far the throughput of the tiny model adds up over replicas of one core each."""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

import psutil
import vit_builder
from vit_client import Client

from . import dns, fleet
from .load import png

TINY = Path(__file__).parents[1] / "goldens" / "tiny.pt"


@dataclass(frozen=True)
class Measured:
    """One client, as fast as it can."""

    per_second: float  # images answered
    replicas: float  # cores that they took
    client: float
    others: float  # that had nothing to do with it


def main() -> int:
    """Entry point; the exit code."""
    args = _parser().parse_args()
    cores = sorted(os.sched_getaffinity(0))
    rounds: dict[int, list[Measured]] = {count: [] for count in range(1, args.replicas + 1)}
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "models"
        settings = vit_builder.Settings(precision="fp32", max_batch_size=16, top_k=12)
        vit_builder.build(vit_builder.load(TINY), settings, repository)
        try:
            with fleet.running(repository, connection_age=300) as replicas:
                for number in range(args.replicas):
                    replicas.add({cores[number % len(cores)]})
                for _ in range(args.rounds):
                    for count, measured in rounds.items():
                        replicas.publish(count)
                        measured.append(measure(replicas, args.seconds))
        except dns.DnsError as e:
            print(f"scale-out: {e}", file=sys.stderr)
            return 1
    print(f"\n{len(cores)} cores; medians of {args.rounds} rounds of {args.seconds:g} s\n")
    print("| replicas | images/s | of one | cores: replicas | client | others |")
    print("|---|---|---|---|---|---|")
    one = statistics.median(each.per_second for each in rounds[1])
    for count, measured in rounds.items():
        median = Measured(*map(statistics.median, zip(*map(astuple, measured), strict=True)))
        print(
            f"| {count} | {median.per_second:.0f} | {median.per_second / one:.2f} x "
            f"| {median.replicas:.2f} | {median.client:.2f} | {median.others:.2f} |"
        )
    return 0


def measure(replicas: fleet.Fleet, seconds: float) -> Measured:
    """Stream images for these seconds, and one to warm up."""
    images = [png(seed) for seed in range(20)]
    ended = False

    def source() -> Iterator[bytes]:
        return itertools.takewhile(lambda _: not ended, itertools.cycle(images))

    with Client(replicas.url) as client:
        items = client.stream(source())
        warm = time.monotonic() + 1
        while time.monotonic() < warm:
            next(items)
        started, answers, before = time.monotonic(), 0, _cpu_seconds(replicas)
        while (took := time.monotonic() - started) < seconds:
            next(items)
            answers += 1
        after = _cpu_seconds(replicas)
        ended = True
        for _ in items:
            pass
    by_replicas, by_client, by_all = (
        (now - then) / took for now, then in zip(after, before, strict=True)
    )
    return Measured(answers / took, by_replicas, by_client, by_all - by_replicas - by_client)


def _cpu_seconds(replicas: fleet.Fleet) -> tuple[float, float, float]:
    """Of the replicas, of this process, and of the whole machine."""
    machine = psutil.cpu_times()
    idle = machine.idle + machine.iowait + machine.steal + machine.guest + machine.guest_nice
    servers = sum(replica.cpu_seconds() for replica in replicas.replicas)
    return servers, time.process_time(), sum(machine) - idle


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.scale_out",
        description="Throughput of the tiny model over 1, 2, … replicas behind one DNS name. Each "
        "is bound to one core, in turn; the client takes what it needs of all. So it adds up until "
        "the cores are full, and not beyond.",
    )
    parser.add_argument("--replicas", type=int, default=4, help="at most (default: 4)")
    parser.add_argument("--seconds", type=float, default=5, help="of a measurement (default: 5)")
    parser.add_argument("--rounds", type=int, default=3, help="of them all (default: 3)")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""Mixed traffic for a long time, every answer compared with the known right one: `make soak`.

All tasks, good and bad images, lists of both, calls that are cancelled or have short timeouts, and
clients killed with requests in flight. No result may be lost or wrong, and the server's memory and
file descriptors must stay flat.
"""

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import vit_builder
from vit_builder.repository import model_file
from vit_client import AsyncClient, BadImage, BadImages, DeadlineExceeded, Overloaded

from bench.footprint import Footprint, footprint

from . import poison

BIN = Path(sys.executable).parent
TASKS = ("classify", "probabilities", "embed", "features", "analyze")
WORKERS = 12
SAMPLE_SECONDS = 2
ATOL = 1e-4  # for one image, in whatever batch
# Over the second half. Memory kept by allocators fluctuates by about half of this.
GROWTH_MIB, GROWTH_DESCRIPTORS = 16, 4

Answer = dict[str, Any]


@dataclass(frozen=True)
class Known:
    """An image and its correct result for each task; none for a bad image."""

    data: bytes
    answer: Answer | None


@dataclass
class Result:
    """Calls by kind and outcome, all errors, and samples of the server's footprint."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    samples: list[tuple[float, Footprint]] = field(default_factory=list)
    ended: bool = False

    def faults(self) -> list[str]:
        ended = ["the server has exited"] if self.ended else []
        return ended + self.wrong + growth(self.samples)


def known(repository: Path) -> tuple[list[Known], list[Known]]:
    """Good and bad images, with results computed by Pillow and model.pt in this process."""
    report = json.loads((repository / "build_report.json").read_text())
    side = report["network"]["image_size"][0]
    module = torch.jit.load(model_file(repository))
    labels = next(repository.glob("postprocess/*/labels.txt")).read_text().splitlines()
    good, bad = [], []
    for case in poison.corpus(large=False):
        if case.name.startswith("as it is"):
            pixels = poison.pillow(case.data, side)
            with torch.inference_mode():
                outputs = module(torch.from_numpy(np.stack([pixels, pixels])))
            probabilities, embedding, neck = (output[0].numpy() for output in outputs[:3])
            answer = {"probabilities": probabilities, "embed": embedding, "features": neck}
            good.append(Known(case.data, answer | {"labels": labels}))
        elif case.owed == "refused" and len(case.data) < 100_000:
            bad.append(Known(case.data, None))
    return good, bad


def right(task: str, got: Any, answer: Answer) -> bool:
    """Whether `got` is the known result for one image."""
    if task == "classify":
        scores = [guess.score for guess in got]
        wanted = np.sort(answer["probabilities"])[::-1][: len(got)]
        return np.allclose(scores, wanted, rtol=0, atol=ATOL) and all(
            guess.label == answer["labels"][guess.index]
            and abs(guess.score - answer["probabilities"][guess.index]) < ATOL
            for guess in got
        )
    if task == "analyze":
        return right("classify", got.predictions, answer) and right("embed", got.embedding, answer)
    if task == "features":
        got = got["neck"]
    return got.shape == answer[task].shape and np.allclose(got, answer[task], rtol=0, atol=ATOL)


class Traffic:
    """Callers of one client, each with one call at a time."""

    def __init__(self, client: AsyncClient, good: list[Known], bad: list[Known], seed: int) -> None:
        self.client, self.good, self.bad = client, good, bad
        self.rng = random.Random(seed)
        self.result = Result()

    async def one(self) -> None:
        task, image = self.rng.choice(TASKS), self.rng.choice(self.good)
        got = await getattr(self.client, task)(image.data)
        self.judge("one", task, [got], [image])

    async def bad_one(self) -> None:
        task, image = self.rng.choice(TASKS), self.rng.choice(self.bad)
        try:
            await getattr(self.client, task)(image.data)
        except BadImage as e:
            self.count("bad: rejected" if len(e.reason) > 5 else "bad: WRONG: no reason given")
        else:
            self.count("bad: WRONG: answered")

    async def several(self) -> None:
        """More images than fit one request, some of them bad."""
        task = self.rng.choice(TASKS)
        images = self.rng.choices(self.good, k=self.rng.randint(2, 24))
        if self.rng.random() < 0.5:
            images += self.rng.choices(self.bad, k=self.rng.randint(1, 4))
            self.rng.shuffle(images)
        try:
            got = await getattr(self.client, task)([image.data for image in images])
            if task == "features":
                got = [{"neck": neck} for neck in got["neck"]]
        except BadImages as e:
            got = e.results
            named = [error.index for error in e.errors]
            if named != [i for i, image in enumerate(images) if image.answer is None]:
                self.count("several: WRONG: errors name other images")
        self.judge("several", task, list(got), images)

    async def cancelled(self) -> None:
        """A call cancelled in flight."""
        call = asyncio.create_task(self.several())
        await asyncio.sleep(self.rng.random() * 0.05)
        call.cancel()
        try:
            await call
        except asyncio.CancelledError:
            self.count("cancelled")

    async def hurried(self) -> None:
        """A call with a timeout that may be too short."""
        image = self.rng.choice(self.good)
        try:
            got = await self.client.embed(image.data, timeout=self.rng.uniform(0.001, 0.05))
            self.judge("short timeout", "embed", [got], [image])
        except (DeadlineExceeded, Overloaded):  # in the client, or in the server's queue
            self.count("short timeout: expired")

    def judge(self, kind: str, task: str, got: list[Any], images: list[Known]) -> None:
        for answer, image in zip(got, images, strict=True):
            if image.answer is None:
                correct = answer is None
            else:
                correct = answer is not None and right(task, answer, image.answer)
            self.count(f"{kind}: right" if correct else f"{kind}: WRONG: {task}")

    def count(self, outcome: str) -> None:
        self.result.counts[outcome] += 1
        if "WRONG" in outcome or "LOST" in outcome:
            self.result.wrong.append(outcome)

    async def work(self, actions: list[Callable[[], Awaitable[None]]], going: Any) -> None:
        while going() and not self.result.ended:
            action = self.rng.choice(actions)
            try:
                await action()
            except Exception as e:  # any other error is a finding
                self.count(f"{action.__name__}: LOST: {type(e).__name__}: {e}")

    def mixture(self) -> list[Callable[[], Awaitable[None]]]:
        usual = [self.one] * 10 + [self.several] * 3
        return [*usual, *[self.bad_one] * 3, *[self.cancelled] * 2, self.hurried]


async def soak(url: str, pid: int, repository: Path, seconds: float, seed: int = 0) -> Result:
    """All kinds of traffic against a running server, for that long."""
    good, bad = known(repository)
    end = time.monotonic() + seconds
    async with AsyncClient(url, retries=0) as client:
        traffic = Traffic(client, good, bad, seed)
        with tempfile.TemporaryDirectory() as folder:
            for i in range(2000):
                (Path(folder) / f"{i}.jpg").symlink_to(poison.ROOT / "photos" / "coffee.jpg")
            await asyncio.gather(
                *(
                    traffic.work(traffic.mixture(), lambda: time.monotonic() < end)
                    for _ in range(WORKERS)
                ),
                vanish(url, folder, traffic, end),
                watch(pid, traffic.result, lambda: time.monotonic() < end),
            )
        await traffic.one()
    return traffic.result


async def many(url: str, pid: int, repository: Path, requests: int) -> Result:
    """That many requests of one small image, cycling through all tasks."""
    good, bad = known(repository)
    smallest = min(good, key=lambda image: len(image.data))
    left = iter(range(requests))
    async with AsyncClient(url, retries=0) as client:
        traffic = Traffic(client, [smallest], bad, 0)
        workers = [
            asyncio.create_task(traffic.work([traffic.one], lambda: next(left, None) is not None))
            for _ in range(WORKERS)
        ]
        await watch(pid, traffic.result, lambda: not all(worker.done() for worker in workers))
        await asyncio.gather(*workers)
    return traffic.result


async def vanish(url: str, folder: str, traffic: Traffic, end: float) -> None:
    """Clients, each in its own process, that are killed with requests in flight."""
    command = [BIN / "vit-client", "classify", folder, "--json", "--url", url]
    while time.monotonic() < end:
        quiet = subprocess.DEVNULL
        process = await asyncio.create_subprocess_exec(*command, stdout=quiet, stderr=quiet)
        await asyncio.sleep(traffic.rng.uniform(1, 4))
        if process.returncode is None:
            process.kill()
            traffic.count("clients killed")
        await process.wait()


async def watch(pid: int, result: Result, going: Callable[[], bool]) -> None:
    start = time.monotonic()
    while going():
        now = footprint(pid)
        if "tritonserver" not in now.processes:
            result.ended = True
            return
        result.samples.append((time.monotonic() - start, now))
        if len(result.samples) % 15 == 1:
            seconds, done = time.monotonic() - start, sum(result.counts.values())
            print(f"{seconds:.0f} s, {done:,} answers: {now}", file=sys.stderr, flush=True)
        await asyncio.sleep(SAMPLE_SECONDS)


def growth(samples: list[tuple[float, Footprint]]) -> list[str]:
    """What grew over the second half, by the slope of a line fitted to the samples."""
    found = []
    for name, (mib, descriptors) in slopes(samples).items():
        if mib > GROWTH_MIB:
            found.append(f"{name} grew by {mib:.1f} MiB over the second half")
        if descriptors > GROWTH_DESCRIPTORS:
            found.append(f"{name} grew by {descriptors:.1f} descriptors over the second half")
    return found


def slopes(samples: list[tuple[float, Footprint]]) -> dict[str, tuple[float, float]]:
    """Growth over the second half in MiB and descriptors: of each process, and shared memory."""
    half = samples[len(samples) // 2 :]
    times = np.array([moment for moment, _ in half])
    length = times[-1] - times[0]

    def grown(values: list[float]) -> float:
        return float(np.polyfit(times, values, 1)[0] * length)

    found = {"shared memory": (grown([sample.shared for _, sample in half]), 0.0)}
    for name in half[0][1].processes:
        usages = [sample.processes[name] for _, sample in half]
        memory = grown([usage.private for usage in usages])
        found[name] = memory, grown([usage.descriptors for usage in usages])
    return found


def report(result: Result) -> str:
    """A readable summary."""
    lines = [f"{count:9,} {outcome}" for outcome, count in sorted(result.counts.items())]
    (_, first), (_, middle), (seconds, last) = (
        result.samples[i] for i in (0, len(result.samples) // 2, -1)
    )
    lines += [f"{seconds:.0f} s", f"first:  {first}", f"middle: {middle}", f"last:   {last}"]
    for name, (mib, descriptors) in slopes(result.samples).items():
        lines.append(f"second half: {name} {mib:+.1f} MiB, {descriptors:+.1f} descriptors")
    return "\n".join([*lines, *(f"FAULT: {fault}" for fault in result.faults()[:20])])


@contextmanager
def tiny_server() -> Iterator[tuple[str, int, Path]]:
    """Build and serve the tiny model: gRPC address, vit-server's pid, and repository."""
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder, "models")
        settings = vit_builder.Settings(precision="fp32", max_batch_size=16, top_k=12)
        checkpoint = vit_builder.load(poison.ROOT / "tests" / "goldens" / "tiny.pt")
        vit_builder.build(checkpoint, settings, repository)
        ports = ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"]
        command = [BIN / "vit-server", "--model-repository", repository, *ports]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            said = ""
            try:
                for line in process.stdout:
                    said += line
                    if line.startswith("Ready:"):
                        break
                address = re.search(r"^gRPC +(\S+)", said, re.M)
                assert address, "vit-server did not start"
                yield address[1], process.pid, repository
            finally:
                process.terminate()


def main() -> int:
    """Entry point; returns 1 if anything was lost, wrong or growing."""
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--minutes", type=float, default=30, help="duration of the mixed traffic (default: 30)"
    )
    parser.add_argument(
        "--requests",
        type=int,
        help="instead of mixed traffic, send this many requests of one image",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed of the mixed traffic (default: 0)"
    )
    args = parser.parse_args()
    with tiny_server() as server:
        if args.requests:
            result = asyncio.run(many(*server, args.requests))
        else:
            result = asyncio.run(soak(*server, args.minutes * 60, args.seed))
    print(report(result))
    return 1 if result.faults() else 0


if __name__ == "__main__":
    sys.exit(main())

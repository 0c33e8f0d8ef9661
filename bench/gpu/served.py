"""The network behind Triton: settings tried one after the other, then the chosen ones measured."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from tests.load import inputs
from tests.load.perf_analyzer import PerfAnalyzerError
from tests.load.sweep import Sweep
from tests.load.triton import Address, ServerError, Triton, local_server

Row = dict[str, Any]
# perf_analyzer asks for every output, and `vit` has 0.6 MB of them an image. This ensemble is
# `embed` without its first step: pixels in, the embedding out.
PIXELS = "embed_pixels"
BETTER = 1.02  # less than this much more is no reason for another setting


@dataclass(frozen=True)
class Settings:
    """What is tried."""

    instances: int = 1
    max_batch_size: int = 64
    queue_delay: int = 0  # microseconds
    profiling_executor: bool = False


@dataclass(frozen=True)
class Load:
    """What is sent."""

    concurrency: int  # requests under way at a time
    images: int = 1  # in a request

    def __str__(self) -> str:
        each = "" if self.images == 1 else f" of {self.images} images"
        return f"{self.concurrency} requests{each}"


@dataclass(frozen=True)
class Bench:
    """What is measured with what."""

    built: Path  # by vit-builder
    folder: Path  # for copies of it
    kind: str  # "cuda" or "cpu"
    seconds: float  # of one of perf_analyzer's three windows
    rounds: int
    binary: Path
    say: Callable[[str], None]

    @contextlib.contextmanager
    def server(self, settings: Settings) -> Iterator[Address]:
        """A server with these settings, on the device that is measured."""
        repository = self.folder / "-".join(map(str, asdict(settings).values()))
        write(self.built, repository, settings, self.kind)
        try:
            with local_server(repository) as address:
                yield address
        finally:
            shutil.rmtree(repository, ignore_errors=True)

    def point(self, address: Address, model: str, load: Load) -> Row:
        """One load on one model."""
        extra = ["-b", str(load.images)] if load.images > 1 else []
        sweep = Sweep(Triton(address), self.binary, self.seconds, extra)
        data = self.folder / ("images.json" if model == "embed" else "pixels.json")
        try:
            point = sweep.point(model, "", data, "concurrency", load.concurrency)
        except PerfAnalyzerError as e:  # of one load: the others are measured
            self.say(f"{model}, {load}: {e}")
            return {"load": str(load), "failed": str(e)}
        return {"load": str(load), **point.row()}

    def write_inputs(self, height: int, width: int) -> None:
        """perf_analyzer's files."""
        photos = inputs.photos(inputs.PHOTOS)
        inputs.write_pixels(self.folder / "pixels.json", photos, height, width)
        inputs.write_images(self.folder / "images.json", [p.read_bytes() for p in photos])


def write(built: Path, folder: Path, settings: Settings, kind: str) -> None:
    """A copy of the repository with these settings, and with the ensemble PIXELS."""
    shutil.copytree(built, folder)
    for path in folder.glob("*/config.pbtxt"):
        config = text_format.Parse(path.read_text(), ModelConfig())
        config.max_batch_size = settings.max_batch_size
        if config.name == "preprocess":
            config.parameters["max_waiting_images"].string_value = str(settings.max_batch_size)
        if config.name == "vit":
            del config.instance_group[:]
            group = config.instance_group.add()
            group.kind = group.KIND_GPU if kind == "cuda" else group.KIND_CPU
            group.count = settings.instances
            config.dynamic_batching.max_queue_delay_microseconds = settings.queue_delay
            flag = "false" if settings.profiling_executor else "true"
            config.parameters["DISABLE_OPTIMIZED_EXECUTION"].string_value = flag
            config.model_warmup[-1].batch_size = settings.max_batch_size
        path.write_text(text_format.MessageToString(config))
    _write_pixels_ensemble(folder)


def _write_pixels_ensemble(folder: Path) -> None:
    vit, embed = (
        text_format.Parse((folder / name / "config.pbtxt").read_text(), ModelConfig())
        for name in ("vit", "embed")
    )
    embed.name = PIXELS
    embed.input[0].CopyFrom(vit.input[0])
    del embed.ensemble_scheduling.step[0]
    embed.ensemble_scheduling.step[0].input_map["pixels"] = "pixels"
    (folder / PIXELS / "1").mkdir(parents=True)
    (folder / PIXELS / "config.pbtxt").write_text(text_format.MessageToString(embed))


def choose(bench: Bench, grid: dict[str, list[Any]], loads: list[Load]) -> Row:
    """One setting after the other, the best so far kept. Rivals take turns, all of them up."""
    best, trials = Settings(), []
    for name, values in grid.items():
        candidates = [replace(best, **{name: value}) for value in values]
        bench.say(f"served: {name} of {', '.join(map(str, values))}")
        found = _compare(bench, candidates, loads)
        for settings, rounds in found.items():
            trials.append({"varied": name, "settings": asdict(settings), "rounds": rounds})
        best = candidates[0]
        for settings in candidates[1:]:
            if score(found[settings]) > BETTER * score(found[best]):
                best = settings
    return {"trials": trials, "chosen": asdict(best)}


def _compare(
    bench: Bench, candidates: list[Settings], loads: list[Load]
) -> dict[Settings, list[list[Row]]]:
    found: dict[Settings, list[list[Row]]] = {settings: [] for settings in candidates}
    with contextlib.ExitStack() as stack:
        up = {}
        for settings in candidates:
            try:
                up[settings] = stack.enter_context(bench.server(settings))
            except ServerError as e:  # of one candidate: the others are measured
                bench.say(f"{settings}: {e}")
        if not up:
            raise ServerError("none of these settings can be served, see above")
        for _ in range(bench.rounds):
            for settings, address in up.items():
                found[settings].append([bench.point(address, PIXELS, load) for load in loads])
    return found


def score(rounds: list[list[Row]]) -> float:
    """Images a second at the best load, by medians."""
    loads = zip(*rounds, strict=True)  # none, where it did not start
    return max((median(map(per_second, same)) for same in loads), default=0.0)


def per_second(row: Row) -> float:
    """Images a second, none where the measurement failed."""
    return float(row.get("per_second", 0))


def final(
    bench: Bench,
    settings: Settings,
    loads: dict[str, list[Load]],
    bare: Callable[[], float],
) -> list[Row]:
    """Rounds of every load on every model, each beside a bare rate of the same minute."""
    rounds = []
    with bench.server(settings) as address:
        for number in range(bench.rounds):
            bench.say(f"served, as chosen: round {number + 1} of {bench.rounds}")
            models = {
                model: [bench.point(address, model, load) for load in its]
                for model, its in loads.items()
            }
            rounds.append({"bare": bare(), "models": models})
    return rounds

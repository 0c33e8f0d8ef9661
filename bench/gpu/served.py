"""The network behind Triton: the same loads for each number of instances."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from ..load import inputs
from ..load.perf_analyzer import PerfAnalyzerError
from ..load.sweep import Sweep
from ..load.triton import Address, ServerError, Triton, local_server

Row = dict[str, Any]
# perf_analyzer requests every output, and those of `vit` are 0.6 MB per image. This ensemble is
# `embed` without its first step: pixels in, the embedding out.
PIXELS = "embed_pixels"


@dataclass(frozen=True)
class Load:
    """A load on a model."""

    model: str
    concurrency: int  # requests in flight
    images: int = 1  # per request

    def __str__(self) -> str:
        each = "" if self.images == 1 else f" of {self.images} images"
        return f"{self.concurrency} requests{each}"


@dataclass(frozen=True)
class Bench:
    """Settings of the measurement."""

    built: Path  # by vit-builder
    folder: Path  # for copies of it
    kind: str  # "cuda" or "cpu"
    seconds: float  # of one of perf_analyzer's three windows
    binary: Path
    say: Callable[[str], None]

    def measure(self, instances: list[int], loads: list[Load]) -> list[Row]:
        """Measure all loads, on one server after the other."""
        rows: list[Row] = []
        for count in instances:
            self.say(f"served: {count} instances")
            try:
                with self.server(count) as address:
                    rows += [{"instances": count, **self.point(address, load)} for load in loads]
            except ServerError as e:  # the other servers are still measured
                self.say(f"{count} instances: {e}")
        if not rows:
            raise ServerError("none of these configurations could be served, see above")
        return rows

    @contextlib.contextmanager
    def server(self, instances: int) -> Iterator[Address]:
        """Run a server with that many instances on the device, as a context manager."""
        repository = self.folder / f"{instances} instances"
        write(self.built, repository, instances, self.kind)
        try:
            with local_server(repository) as address:
                yield address
        finally:
            shutil.rmtree(repository, ignore_errors=True)

    def point(self, address: Address, load: Load) -> Row:
        """Measure one load."""
        found: Row = {"model": load.model, "load": str(load)}
        extra = ["-b", str(load.images)] if load.images > 1 else []
        sweep = Sweep(Triton(address), self.binary, self.seconds, extra)
        data = self.folder / ("pixels.json" if load.model == PIXELS else "images.json")
        try:
            point = sweep.point(load.model, "", data, "concurrency", load.concurrency)
        except PerfAnalyzerError as e:  # the other loads are still measured
            self.say(f"{load.model}, {load}: {e}")
            return {**found, "failed": str(e)}
        return {**point.row(), **found}

    def write_inputs(self, height: int, width: int) -> None:
        """Write perf_analyzer's input files."""
        photos = inputs.photos(inputs.PHOTOS)
        inputs.write_pixels(self.folder / "pixels.json", photos, height, width)
        inputs.write_images(self.folder / "images.json", [p.read_bytes() for p in photos])


def write(built: Path, folder: Path, instances: int, kind: str) -> None:
    """Write a copy of the repository with that many instances, and with the ensemble PIXELS."""
    shutil.copytree(built, folder)
    path = folder / "vit" / "config.pbtxt"
    config = text_format.Parse(path.read_text(), ModelConfig())
    del config.instance_group[:]
    group = config.instance_group.add()
    group.kind = group.KIND_GPU if kind == "cuda" else group.KIND_CPU
    group.count = instances
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

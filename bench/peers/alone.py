"""Benchmarks without a server: `alone.py WHAT REPOSITORY PHOTOS SECONDS` prints JSON figures."""

import contextlib
import ctypes
import itertools
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import network
import numpy as np
import torch
from network import CORES, Pixels
from vit_builder.images import calibration

BATCHES = (1, 2, 4, 8, 16)
Figures = dict[str, float]
Ways = dict[str, tuple[Callable[[], object], int]]  # what to run, and its images per run


def per_second(run: Callable[[], object], images: int, seconds: float) -> float:
    """Return images/s of `run`, which processes `images` of them, after a warm-up run."""
    run()
    count, start = 0, time.perf_counter()
    while (took := time.perf_counter() - start) < seconds or not count:
        run()
        count += 1
    return count * images / took


def best_of(ways: Ways, seconds: float) -> Figures:
    """Return images/s of each way; measures the best again, as the highest of many is biased."""
    figures = {name: per_second(*way, seconds / len(ways)) for name, way in ways.items()}
    best = max(figures, key=lambda name: figures[name])
    return {**figures, "best": per_second(*ways[best], seconds)}


def torchscript(repository: Path, photos: list[bytes], seconds: float) -> Figures:
    """Run model.pt in a loop at each batch size, with all of torch's threads."""
    keep_memory()
    served = network.Served(repository)
    pixels = _pixels(photos, served.size)
    return best_of(
        {str(batch): (partial(served.embed, pixels[:batch]), batch) for batch in BATCHES}, seconds
    )


def torchscript_a_core(repository: Path, photos: list[bytes], seconds: float) -> Figures:
    """Run a loop per core, each with one thread, so that no core waits for another."""
    keep_memory()
    served = network.Served(repository)
    pixels = _pixels(photos, served.size)
    ways: Ways = {}
    with ThreadPoolExecutor(CORES, initializer=_one_thread) as pool:
        for batch in BATCHES:
            rows = [pixels[:batch]] * CORES

            def each(rows: list[list[Pixels]] = rows) -> None:
                list(pool.map(served.embed, rows))

            ways[str(batch)] = (each, batch * CORES)
        return best_of(ways, seconds)


def keep_memory() -> None:
    """Set up malloc as the server's backend does (server/vit_server/backends/pytorch/model.py)."""
    malloc = ctypes.CDLL(None)
    for parameter, value in ((-3, 2**25), (-1, 2**30), (-2, 2**26)):
        malloc.mallopt(parameter, value)


def _one_thread() -> None:
    torch.zeros(1).exp()  # at a thread's first use torch applies the process-wide count
    torch.set_num_threads(1)


def eager(repository: Path, photos: list[bytes], seconds: float) -> Figures:
    """Run the fp32 network on one photo after another, from the file to the result."""
    module = network.eager(repository)
    size = network.sizes(repository).image_size
    turn = itertools.cycle(photos)

    @torch.inference_mode()
    def run() -> None:
        module(torch.from_numpy(network.decode(next(turn), size).copy())[None])

    return {"1": per_second(run, 1, seconds)}


def pillow(repository: Path, photos: list[bytes], seconds: float) -> Figures:
    """Decode and resize with Pillow, on one core and on all."""
    size = network.sizes(repository).image_size
    many = list(itertools.islice(itertools.cycle(photos), 16 * CORES))

    def spread(pool: ThreadPoolExecutor) -> None:
        list(pool.map(network.decode, many, itertools.repeat(size)))

    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(CORES) as all_cores:
        return {
            "one core": per_second(partial(spread, one), len(many), seconds / 2),
            "all cores": per_second(partial(spread, all_cores), len(many), seconds / 2),
        }


def openvino(repository: Path, photos: list[bytes], seconds: float) -> Figures:
    """Run the network compiled by OpenVINO, in the same precision: with one stream on all cores,
    and with one per core. int8 is quantised by NNCF, calibrated with the same photos; layers that
    NNCF skips run in fp32, or in bf16."""
    import openvino as ov  # type: ignore[import-untyped]

    module = network.eager(repository)
    size = network.sizes(repository).image_size
    pixels = _pixels(photos, size)
    example = torch.from_numpy(np.stack(pixels[:2]))
    with torch.inference_mode():
        model = ov.convert_model(module, example_input=example)
    precision = network.precision(repository)
    if precision == "int8":
        model = _by_nncf(model, size)
    hints = {"fp32": ["f32"], "bf16": ["bf16"], "fp16": ["f16"], "int8": ["f32", "bf16"]}
    ways: Ways = {}
    for batch, hint in itertools.product(BATCHES, hints[precision]):
        model.reshape([batch, *size, 3])
        rows = np.stack(pixels[:batch])
        for streams, each_core in ((1, ""), (CORES, " a core")):
            name = f"{batch}{each_core}, {hint}"
            settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": CORES}
            compiled = ov.Core().compile_model(model, "CPU", {**settings, "NUM_STREAMS": streams})
            queue = ov.AsyncInferQueue(compiled, streams)

            def each(queue: Any = queue, rows: Pixels = rows, streams: int = streams) -> None:
                for _ in range(streams):
                    queue.start_async(rows)
                queue.wait_all()

            ways[name] = (each, batch * streams)
    return best_of(ways, seconds)


def _by_nncf(model: Any, size: tuple[int, int]) -> Any:
    """Quantise to int8 as OpenVINO's documentation recommends for transformers."""
    import nncf  # type: ignore[import-not-found]

    images = calibration(None, size).images
    rows = nncf.Dataset([image[None].numpy() for image in images])
    with contextlib.redirect_stdout(sys.stderr):
        return nncf.quantize(
            model,
            rows,
            preset=nncf.QuantizationPreset.MIXED,
            model_type=nncf.ModelType.TRANSFORMER,
        )


def _pixels(photos: list[bytes], size: tuple[int, int]) -> list[Pixels]:
    decoded = [network.decode(photo, size) for photo in photos]
    return list(itertools.islice(itertools.cycle(decoded), max(BATCHES)))


def main() -> None:
    what, repository, photos, seconds = sys.argv[1:]
    files = [file.read_bytes() for file in sorted(Path(photos).glob("*.jpg"))]
    ways = (torchscript, torchscript_a_core, eager, pillow, openvino)
    measure = {way.__name__: way for way in ways}
    print(json.dumps(measure[what](Path(repository), files, float(seconds))))


if __name__ == "__main__":
    main()

"""Measure the client: images per second, and its own CPU time per image.

    python client/tools/benchmark.py [URL]

With a server whose model costs next to nothing this measures the client; with a real one it shows
how little the client adds. CPU time is that of this process, including gRPC's threads.
"""

import io
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from PIL import Image
from vit_client import Client

COUNT = 4000


def measure(
    label: str, count: int, run: Callable[[Any], object], images: Callable[[int], Any]
) -> None:
    """Time `run` on `images(count)`; print a row of the table."""
    given = images(count)
    wall, cpu = time.perf_counter(), time.process_time()
    run(given)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"{label:40} {count / wall:9.0f} {1e6 * cpu / count:13.0f}", flush=True)


def main(url: str | None = None) -> None:
    """Print the table."""
    with Client(url) as client:
        model = client.model()
        height, width = model.image_size
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        large = np.tile(pixels, (3, 3, 1))
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG")
        jpeg = file.getvalue()
        client.embed([jpeg] * 256)

        print(f"{model.name}, {height} × {width} pixels, {len(jpeg)} bytes as JPEG\n")
        print(f"{'':40} {'images/s':>9} {'CPU µs/image':>13}")
        for task in ("embed", "classify", "probabilities", "features"):
            run = partial(drain, client, task=task)
            measure(f"stream {task}", COUNT, run, lambda n: [jpeg] * n)
        embed = partial(drain, client, task="embed")
        measure("stream embed, generator", COUNT, embed, lambda n: (jpeg for _ in range(n)))
        measure("stream embed, arrays of that size", COUNT, embed, lambda n: [pixels] * n)
        measure("stream embed, arrays to be scaled", COUNT, embed, lambda n: [large] * n)
        measure("embed a list", COUNT, client.embed, lambda n: [jpeg] * n)
        one_by_one = partial(each, client)
        measure("embed one at a time", COUNT // 10, one_by_one, lambda n: [jpeg] * n)


def drain(client: Client, images: Any, task: Any) -> None:
    """Consume a stream."""
    for _ in client.stream(images, task=task):
        pass


def each(client: Client, images: list[bytes]) -> None:
    """One call per image."""
    for image in images:
        client.embed(image)


if __name__ == "__main__":
    main(*sys.argv[1:])

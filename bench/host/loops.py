"""Decodes files on one core, by `preprocess` and by others: `loops.py PREPROCESS SIDE FILE…`.

Prints JSON: for each decoder its CPU milliseconds per file, and how far its pixels are from ours.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

Pixels = npt.NDArray[np.uint8]
Decode = Callable[[list[Path]], list[Pixels]]
SECONDS = 2.0
ROOM = 200_000_000  # pixels


def ours(folder: Path, side: int) -> Decode:
    """Return the decoder of model_repository/preprocess/1/decode.py."""
    sys.path.append(str(folder))
    import decode

    room = decode.Room(ROOM)
    return lambda files: [decode.decode(file.read_bytes(), side, side, room) for file in files]


def pillow(side: int) -> Decode:
    """Return Pillow's decoder and resize, as in the network's training."""

    def one(file: Path) -> Pixels:
        with Image.open(file) as image:
            return np.array(image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC))

    return lambda files: [one(file) for file in files]


def opencv(side: int, interpolation: int) -> Decode:
    """Return OpenCV's; its cubic filter is not widened when shrinking, INTER_AREA's is."""
    cv2.setNumThreads(1)

    def one(file: Path) -> Pixels:
        image = cv2.imdecode(np.frombuffer(file.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
        resized = cv2.resize(image, (side, side), interpolation=interpolation)
        return np.asarray(cv2.cvtColor(resized, cv2.COLOR_BGR2RGB))

    return lambda files: [one(file) for file in files]


def dali(side: int, files: list[Path]) -> Decode:
    """Return NVIDIA DALI's CPU pipeline, on one thread; its antialiased cubic matches Pillow's."""
    data = [np.frombuffer(file.read_bytes(), np.uint8) for file in files]

    @pipeline_def(batch_size=len(data), num_threads=1, device_id=None, prefetch_queue_depth=1)
    def pipeline():  # type: ignore[no-untyped-def]
        encoded = fn.external_source(source=lambda: data, dtype=types.UINT8)
        images = fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
        return fn.resize(images, size=[side, side], interp_type=types.INTERP_CUBIC)

    built = pipeline()
    built.build()

    def run(_: list[Path]) -> list[Pixels]:
        (images,) = built.run()
        return [np.array(images[i]) for i in range(len(data))]

    return run


def measured(decode: Decode, files: list[Path], right: list[Pixels]) -> dict[str, float]:
    got = np.stack(decode(files)).astype(int)
    off = abs(got - np.stack(right))
    count, begun = 0, time.process_time()
    while (used := time.process_time() - begun) < SECONDS or not count:
        decode(files)
        count += len(files)
    return {"ms": 1e3 * used / count, "mean": float(off.mean()), "most": int(off.max())}


def main() -> None:
    folder, side, files = Path(sys.argv[1]), int(sys.argv[2]), [Path(name) for name in sys.argv[3:]]
    mine = ours(folder, side)
    right = mine(files)
    ways = {
        "preprocess's decode.py": mine,
        "Pillow": pillow(side),
        "OpenCV, INTER_CUBIC": opencv(side, cv2.INTER_CUBIC),
        "OpenCV, INTER_AREA": opencv(side, cv2.INTER_AREA),
        "DALI, cubic": dali(side, files),
    }
    print(json.dumps({name: measured(way, files, right) for name, way in ways.items()}))


if __name__ == "__main__":
    main()

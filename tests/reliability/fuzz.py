"""Coverage-guided fuzzing of preprocess's decode function, with atheris: `make fuzz`.

For any bytes, decode must return pixels of the right size or raise BadImage, within its limits of
time and memory. Fails at the first input that violates this, and saves it in the folder `found`.
Only Python code guides it: the C libraries are not instrumented.
"""

import argparse
import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import atheris
import numpy as np

with atheris.instrument_imports(include=["PIL"]):
    from PIL import Image

    Image.init()  # loads the decoders

from . import poison

FOUND = Path(__file__).parent / "found"
SIDE = 64
MAX_PIXELS = 1_000_000  # small, so that each run is fast
MAX_BYTES = 1 << 16
SECONDS_FOR_ONE = 20
MEMORY_MIB = 2048


def main() -> None:
    """Entry point; libFuzzer exits the process."""
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=int, default=300, help="duration (default: 300)")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="libFuzzer's random seed; 0, the default, picks a new one",
    )
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = None
    module = decoding()

    def one(data: bytes) -> None:
        try:
            pixels = module.decode(data, SIDE, SIDE, module.Room(MAX_PIXELS))
        except module.BadImage as e:
            if len(str(e)) < 10:
                raise AssertionError("BadImage without a reason") from e
        else:
            assert pixels.shape == (SIDE, SIDE, 3)
            assert pixels.dtype == np.uint8

    seeds = FOUND / "seeds"
    seeds.mkdir(parents=True, exist_ok=True)
    for i, case in enumerate(poison.corpus(large=False)):
        if case.name.startswith(("as it is", "metadata")) and len(case.data) < MAX_BYTES:
            (seeds / str(i)).write_bytes(case.data)
    options = {
        "max_total_time": args.seconds,
        "max_len": MAX_BYTES,
        "timeout": SECONDS_FOR_ONE,
        "rss_limit_mb": MEMORY_MIB,
        "artifact_prefix": f"{FOUND}/",
        "print_final_stats": 1,
        "seed": args.seed,
    }
    arguments = [f"-{name}={value}" for name, value in options.items()]
    # libFuzzer saves inputs that reach new code in the first folder; the next run starts there.
    corpus = FOUND / "corpus"
    corpus.mkdir(exist_ok=True)
    atheris.Setup([sys.argv[0], *arguments, str(corpus), str(seeds)], one)
    atheris.Fuzz()


def decoding() -> Any:
    """model_repository/preprocess/1/decode.py."""
    sys.path.append(str(poison.ROOT / "model_repository" / "preprocess" / "1"))  # as Triton does
    with atheris.instrument_imports(include=["decode"]):
        return importlib.import_module("decode")


if __name__ == "__main__":
    main()

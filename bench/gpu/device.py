"""The device to measure: its clock, its limits, and a description of it."""

import os
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

from ..load.triton import machine


class NoGpuError(Exception):
    """There is no GPU to measure; the message is for the user."""


class Device:
    """A GPU, or the CPU, to test the script without a GPU."""

    def __init__(self, kind: str) -> None:
        if kind == "cuda":
            if torch.version.cuda is None:
                raise NoGpuError(
                    f"a GPU and a torch with CUDA (PyPI's) are needed, not {torch.__version__}"
                )
            if not torch.cuda.is_available():
                raise NoGpuError(f"a GPU is needed, but torch {torch.__version__} finds none")
        self.kind = kind

    def seconds(self, run: Callable[[], object], count: int) -> float:
        """Return the total seconds of `count` runs in a row, by the device's clock."""
        if self.kind == "cpu":
            began = time.perf_counter()
            for _ in range(count):
                run()
            return time.perf_counter() - began
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        start.record()
        for _ in range(count):
            run()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1000

    def per_second(self, run: Callable[[], object], seconds: float) -> float:
        """Return runs/s, over about that many seconds; `run` must be warmed up."""
        count = max(1, round(seconds / (self.seconds(run, 2) / 2)))
        return count / self.seconds(run, count)

    def matrix_rates(
        self, sizes: list[int], dtype: torch.dtype, seconds: float
    ) -> dict[str, float]:
        """Return TFLOP/s of square matrix products, of random numbers: zeros take less power, and
        run faster than a real network's values.
        """
        rates = {}
        for size in sizes:
            a, b = (torch.randn(size, size, device=self.kind, dtype=dtype) for _ in range(2))
            out = torch.empty_like(a)

            def run(a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = out) -> None:
                torch.matmul(a, b, out=out)

            self.seconds(run, 3)
            rates[str(size)] = self.per_second(run, seconds) * 2 * size**3 / 1e12
        return rates

    def copy_rate(self, mebibytes: int, seconds: float) -> float:
        """Return the GB/s of a copy in device memory, counting bytes read and bytes written."""
        source = torch.empty(mebibytes << 20, dtype=torch.uint8, device=self.kind).random_()
        target = torch.empty_like(source)

        def run() -> None:
            target.copy_(source)

        self.seconds(run, 3)
        return self.per_second(run, seconds) * 2 * source.nbytes / 1e9

    def facts(self) -> dict[str, Any]:
        """Return the device's name, limits and software versions, for comparison."""
        versions = {"torch": torch.__version__, "CUDA of torch": torch.version.cuda or "none"}
        versions["cuDNN"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
        if self.kind == "cpu":
            return {"device": "the CPU: these figures mean nothing", "host": machine(), **versions}
        properties = torch.cuda.get_device_properties(0)
        return {
            "device": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB",
            "driver, power limit, highest clock": _nvidia_smi(),
            "host": machine(),
            **versions,
        }


def reason(error: Exception) -> str:
    """Return an exception of a third-party library in one line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _nvidia_smi() -> str:
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    query = "--query-gpu=driver_version,power.limit,clocks.max.sm"
    command = ["nvidia-smi", query, "--format=csv,noheader", f"--id={gpu}"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as e:
        return f"unknown: {e}"

"""The network alone: pixels are already on the device, and the outputs stay there.

torch reads VARIABLE once, so each of its values is measured in a separate process:
`python -m bench.gpu.bare JSON` prints the results of `measure`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import vit_builder
from torch import Tensor
from vit_builder import Checkpoint
from vit_builder.export import ServedViT
from vit_builder.model import ViTConfig
from vit_builder.repository import model_file

from .device import Device

Run = Callable[[Tensor], tuple[Tensor, ...]]
AS_SERVED = "TorchScript"
# vit-server sets it: otherwise torch prefers cuDNN's attention on Hopper and newer GPUs.
VARIABLE = "TORCH_CUDNN_SDPA_DEPRIORITIZED"
VALUES = {"as served": "1", "attention as torch prefers it": ""}


class BareError(Exception):
    """A process of this module failed; it reported the reason on standard error."""


@dataclass(frozen=True)
class Network:
    """The network to measure: a checkpoint, and the repository built from it."""

    file: Path | None  # None: the published network with random weights
    repository: Path
    precision: str
    top_k: int

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint, cached: generating 48 million random numbers takes a second."""
        return vit_builder.load(self.file) if self.file else vit_builder.random()

    def eager(self, device: Device) -> Run:
        """Return the eager network, not traced."""
        network = self.checkpoint.network()
        served = ServedViT(network, self.checkpoint, self.precision, self.top_k)
        return served.eval().to(device.kind)

    def model_file(self) -> Path:
        return model_file(self.repository)

    def traced(self, device: Device) -> Run:
        """Return the served file, run as Triton runs it."""
        module = torch.jit.load(self.model_file(), map_location=device.kind)  # type: ignore[no-untyped-call]
        module.eval()

        def run(rows: Tensor) -> tuple[Tensor, ...]:
            with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
                found: tuple[Tensor, ...] = module(rows)
            return found

        return run


WAYS: dict[str, Callable[[Network, Device], Run]] = {
    "eager": Network.eager,
    AS_SERVED: Network.traced,
}


@torch.inference_mode()
def measure(
    network: Network,
    device: Device,
    batches: Sequence[int],
    sizes: int,
    rounds: int,
    seconds: float,
) -> dict[str, Any]:
    """Time the first run of each batch size up to `sizes`, in ms; then images/s, interleaved."""
    rows = pixels(network.checkpoint.config, max(*batches, sizes), device)
    runs = {AS_SERVED: network.traced(device)}
    device.seconds(lambda: runs[AS_SERVED](rows[:1]), 2)  # loads libraries
    first = {
        size: 1000 * device.seconds(lambda: runs[AS_SERVED](rows[:size]), 1)  # noqa: B023
        for size in range(1, sizes + 1)
    }
    runs |= {name: load(network, device) for name, load in WAYS.items() if name not in runs}
    images: dict[str, dict[int, list[float]]] = {
        name: {batch: [] for batch in batches} for name in WAYS
    }
    for batch in batches:
        for run in runs.values():
            device.seconds(lambda: run(rows[:batch]), 3)  # noqa: B023
    for _ in range(rounds):
        for name, of in images.items():
            for batch, rates in of.items():
                rate = device.per_second(lambda: runs[name](rows[:batch]), seconds)  # noqa: B023
                rates.append(batch * rate)
    return {"first_ms": first, "images": images}


def in_a_process(value: str, network: Network, device: Device, **settings: Any) -> dict[str, Any]:
    """Run `measure` in a process with that value of VARIABLE. Raises BareError."""
    given = {
        **settings,
        "file": str(network.file or ""),
        "repository": str(network.repository),
        "precision": network.precision,
        "top_k": network.top_k,
        "kind": device.kind,
    }
    env = {name: text for name, text in os.environ.items() if name != VARIABLE}
    command = [sys.executable, "-m", "bench.gpu.bare", json.dumps(given)]
    env |= {VARIABLE: value} if value else {}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise BareError("the bare network could not be measured, see above")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@torch.inference_mode()
def profile(run: Run, rows: Tensor) -> str:
    """Return a table of the time by operation."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if rows.is_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        run(rows)
        if rows.is_cuda:
            torch.cuda.synchronize()
    by = "self_device_time_total" if rows.is_cuda else "self_cpu_time_total"
    table: str = profiler.key_averages().table(sort_by=by, row_limit=25)
    return table


def flops(cfg: ViTConfig) -> int:
    """Return the floating-point operations per image, two per multiply-add of a matrix product.

    For T tokens, D dimensions, M of the MLP, L layers, P = patch_size, C classes:
    2 (patches 3 P² D  +  L (T D 3D + 2 T² D + T D² + 2 T D M)  +  D C).
    Norms, GELU, softmax and top-k are not counted.
    """
    tokens, dim, patches = cfg.num_tokens, cfg.hidden_dim, cfg.grid[0] * cfg.grid[1]
    attention = 3 * tokens * dim**2 + 2 * tokens**2 * dim + tokens * dim**2
    layer = attention + 2 * tokens * dim * cfg.mlp_dim
    ends = patches * 3 * cfg.patch_size**2 * dim + dim * cfg.num_classes
    return 2 * (ends + cfg.num_layers * layer)


def pixels(cfg: ViTConfig, batch: int, device: Device) -> Tensor:
    """Return random pixels on the device, uint8 [batch, H, W, 3]."""
    shape = (batch, *cfg.image_size, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=device.kind)


def main() -> None:
    """Run the process that `in_a_process` starts."""
    given = json.loads(sys.argv[1])
    file = Path(given["file"]) if given["file"] else None
    repository = Path(given["repository"])
    network = Network(file, repository, given["precision"], given["top_k"])
    settings = {name: given[name] for name in ("batches", "sizes", "rounds", "seconds")}
    print(json.dumps(measure(network, Device(given["kind"]), **settings)))


if __name__ == "__main__":
    main()

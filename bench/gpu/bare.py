"""The network alone on the device: pixels are there already, and the answers stay there."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vit_builder import Checkpoint
from vit_builder.export import ServedViT
from vit_builder.model import ViTConfig

from .device import Device

Run = Callable[[Tensor], tuple[Tensor, ...]]
AS_SERVED, PROFILING = "TorchScript", "TorchScript, profiling executor"
COMPILED = "torch.compile"
WARM_UP = 5  # runs of each batch size; the profiling executor has its plan after two


class WrongError(Exception):
    """Something that was to be measured gives other numbers than the network."""


class WrittenOut(nn.Module):
    """RMSNorm as separate operations, instead of the one that torch has a kernel for."""

    def __init__(self, norm: nn.RMSNorm) -> None:
        super().__init__()
        assert norm.eps is not None
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x: Tensor) -> Tensor:  # [N, T, D] -> [N, T, D]
        y = x.float()
        return (y * (y.square().mean(-1, keepdim=True) + self.eps).rsqrt()).to(
            x.dtype
        ) * self.weight


@dataclass(frozen=True)
class Network:
    """What is measured: a checkpoint, and the repository that was built of it."""

    checkpoint: Checkpoint
    repository: Path
    precision: str
    top_k: int

    def eager(self, precision: str) -> ServedViT:
        """The served graph, not traced."""
        checkpoint = self.checkpoint
        return ServedViT(checkpoint.network(), checkpoint, precision, self.top_k).eval()

    def traced(self, device: Device) -> torch.jit.ScriptModule:
        """The file that is served."""
        return _load(self.repository / "vit" / "1" / "model.pt", device)

    def frozen(self, device: Device) -> torch.jit.ScriptModule:
        """That file with its weights as constants."""
        frozen: torch.jit.ScriptModule = torch.jit.freeze(self.traced(device))
        return frozen

    def traced_written_out(self, device: Device) -> torch.jit.ScriptModule:
        """Like that file, but for the norms."""
        served = write_out(self.eager(self.precision))
        height, width = self.checkpoint.config.image_size
        pixels = torch.zeros(2, height, width, 3, dtype=torch.uint8)
        with torch.inference_mode():
            traced = torch.jit.trace(served, pixels, check_trace=False)  # type: ignore[no-untyped-call]
        buffer = io.BytesIO()
        torch.jit.save(traced, buffer)
        buffer.seek(0)
        return _load(buffer, device)


def _way(
    load: Callable[[Network, Device], torch.jit.ScriptModule], *, profiling: bool = False
) -> Callable[[Network, Device], Run]:
    def make(network: Network, device: Device) -> Run:
        module = load(network, device)

        def run(rows: Tensor) -> tuple[Tensor, ...]:
            with torch.jit.optimized_execution(profiling):  # type: ignore[attr-defined]
                found: tuple[Tensor, ...] = module(rows)
            return found

        return run

    return make


def _compiled(network: Network, device: Device) -> Run:
    # Each batch size has a graph of its own.
    torch._dynamo.config.recompile_limit = 64
    run: Run = torch.compile(network.eager(network.precision).to(device.kind), dynamic=False)
    return run


# Ways to run the same network. Modules are not shared: each keeps plans of its own.
WAYS: dict[str, Callable[[Network, Device], Run]] = {
    "eager": lambda network, device: network.eager(network.precision).to(device.kind),
    "eager, norm written out": lambda network, device: write_out(
        network.eager(network.precision)
    ).to(device.kind),
    AS_SERVED: _way(Network.traced),
    PROFILING: _way(Network.traced, profiling=True),
    "TorchScript, frozen": _way(Network.frozen),
    "TorchScript, frozen, profiling executor": _way(Network.frozen, profiling=True),
    "TorchScript, norm written out": _way(Network.traced_written_out),
    "TorchScript, norm written out, profiling executor": _way(
        Network.traced_written_out, profiling=True
    ),
    # A ceiling: Triton's backend cannot load it.
    COMPILED: _compiled,
}


def warm_up(run: Run, pixels: dict[int, Tensor], device: Device) -> dict[str, float]:
    """The longest of the first runs of each batch size, in seconds: a server would stall so."""
    return {
        str(batch): max(device.seconds(lambda: run(rows), 1) for _ in range(WARM_UP))  # noqa: B023
        for batch, rows in pixels.items()
    }


def rates(
    runs: dict[str, Run], pixels: dict[int, Tensor], device: Device, seconds: float
) -> dict[str, dict[str, float]]:
    """Images a second of everything, one round."""
    return {
        name: {
            str(batch): batch * device.per_second(lambda: run(rows), seconds)  # noqa: B023
            for batch, rows in pixels.items()
        }
        for name, run in runs.items()
    }


def cosine(run: Run, photos: Tensor, expected: Tensor) -> float:
    """Of the embeddings and the expected ones, the worst photo.

    Raises:
        WrongError: it is another network.
    """
    actual = run(photos)[1].cpu()
    found = float(torch.cosine_similarity(actual.double(), expected.double()).min())
    if not found > 0.999:
        raise WrongError(f"this is not the network: its embeddings' cosine is {found:.4f}")
    return found


def profile(run: Run, pixels: Tensor) -> str:
    """Which operations the time goes into."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if pixels.is_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        run(pixels)
        if pixels.is_cuda:
            torch.cuda.synchronize()
    by = "self_device_time_total" if pixels.is_cuda else "self_cpu_time_total"
    table: str = profiler.key_averages().table(sort_by=by, row_limit=25)
    return table


def flops(cfg: ViTConfig) -> int:
    """Floating-point operations an image, two for each multiply-add of a matrix product.

    For T tokens, D dimensions, M of the MLP, L layers, P = patch_size, C classes:
    2 (patches 3 P² D  +  L (T D 3D + 2 T² D + T D² + 2 T D M)  +  D C).
    Norms, GELU, softmax and top-k are not counted.
    """
    tokens, dim, patches = cfg.num_tokens, cfg.hidden_dim, cfg.grid[0] * cfg.grid[1]
    attention = 3 * tokens * dim**2 + 2 * tokens**2 * dim + tokens * dim**2
    layer = attention + 2 * tokens * dim * cfg.mlp_dim
    ends = patches * 3 * cfg.patch_size**2 * dim + dim * cfg.num_classes
    return 2 * (ends + cfg.num_layers * layer)


def pixels(cfg: ViTConfig, batches: Sequence[int], device: Device) -> dict[int, Tensor]:
    """Random ones for each batch size, on the device."""
    shape = (*cfg.image_size, 3)
    return {
        batch: torch.randint(0, 256, (batch, *shape), dtype=torch.uint8, device=device.kind)
        for batch in batches
    }


def write_out(served: ServedViT) -> ServedViT:
    """Every RMSNorm exchanged for WrittenOut, in place."""
    for parent in list(served.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.RMSNorm):
                setattr(parent, name, WrittenOut(child))
    return served


def _load(file: Any, device: Device) -> torch.jit.ScriptModule:
    module: torch.jit.ScriptModule = torch.jit.load(file, map_location=device.kind)  # type: ignore[no-untyped-call]
    return module.eval()

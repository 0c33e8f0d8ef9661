"""Linear layers in int8, for processors with VNNI, where they take a quarter of fp32's time.

Weights have a scale per output channel. Inputs have one scale per tensor, calibrated on images
(static quantisation), so that a result does not depend on the rest of its batch.

- "A White Paper on Neural Network Quantization", Nagel et al. 2021, https://arxiv.org/abs/2106.08295
- oneDNN's int8, https://uxlfoundation.github.io/oneDNN/dev_guide_int8_computations.html
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Other images exceed the range of the calibration, and clipping costs far more than coarser steps:
# on a held-out photo 1 - cosine was 0.0014 without and 0.00013 with this (with the first layer in
# fp32).
HEADROOM = 1.5
# Relative error of a layer's output. With random weights it is 0.01 to 0.02; outliers raise it.
MAX_ERROR = 0.05


@dataclass(frozen=True)
class Quantised:
    """Calibration of one linear layer."""

    scale: float  # of its input: the size of one step
    zero: int  # zero point: the step, 0 to 255, for 0.0
    bias: Tensor  # fp32 [out], corrected for the mean quantisation error
    error: float  # of its output, relative to fp32's


def calibrate(network: nn.Module, inputs: Tensor, zero_of_pixels: int) -> dict[str, Quantised]:
    """Run the fp32 network on `inputs`, in one batch, and calibrate every linear layer but the
    head; return them by name. The first layer's scale is fixed: pixels minus `zero_of_pixels`.
    """
    found: dict[str, Quantised] = {}

    def watch(name: str, linear: nn.Module) -> Any:
        def look(_: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
            x = args[0]
            scale, zero = (1.0, zero_of_pixels) if not found else _range(x)
            found[name] = _quantised(linear, x, out, scale, zero)

        return linear.register_forward_hook(look)

    hooks = [
        watch(name, module)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and name != "classifier"
    ]
    with torch.inference_mode():
        network(inputs)
    for hook in hooks:
        hook.remove()
    return found


def _range(x: Tensor) -> tuple[float, int]:
    low, high = HEADROOM * min(float(x.min()), 0.0), HEADROOM * max(float(x.max()), 0.0)
    scale = max(high - low, 1e-6) / 255
    return scale, round(-low / scale)


def _quantised(linear: nn.Module, x: Tensor, out: Tensor, scale: float, zero: int) -> Quantised:
    weight, scales = rounded(linear.get_parameter("weight"))
    bias = linear.get_parameter("bias").detach()
    steps = to_steps(x, torch.tensor(1 / scale), zero)
    got = F.linear((steps.float() - zero) * scale, weight * scales[:, None], bias)
    off = (out - got).flatten(0, -2).mean(0)
    error = (got + off - out).norm() / out.norm().clamp(min=1e-12)
    return Quantised(scale, zero, bias + off, float(error))


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise a weight: return int8 [out, in] and its scales [out]."""
    scales = weight.detach().abs().amax(1).clamp(min=1e-12) / 127
    return (weight.detach() / scales[:, None]).round().to(torch.int8), scales


def to_steps(x: Tensor, factor: Tensor, zero: int) -> Tensor:
    """Quantise to uint8; `factor` is the number of steps per 1.0."""
    # The 0.5 makes the truncation round.
    return (x * factor).add_(zero + 0.5).clamp_(0.0, 255.0).to(torch.uint8)


def is_exact() -> bool:
    """Return whether this processor's int8 is exact. Without VNNI products are summed in 16 bits,
    which overflow.
    """
    x = torch.full([1, 64], 255, dtype=torch.uint8)
    weight, scales = torch.full([16, 64], 127, dtype=torch.int8), torch.ones(16)
    packed, zeros = torch.ops.onednn.qlinear_prepack(weight, None), torch.zeros(16).int()
    out = torch.ops.onednn.qlinear_pointwise(
        x, 1.0, 0, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return bool((out == 64 * 255 * 127).all())


class Int8Linear(nn.Module):
    """x W^T + b in int8, fused with the exact GELU or residual addition that follows.

    `x` is fp32, or uint8 if the previous layer quantised it; the output is quantised for the layer
    `into`, if any.

    The file has the plain int8 weight, which is packed for the processor on loading. A GPU, and a
    processor without VNNI, run the same weights in fp32.
    """

    def __init__(
        self, weight: Tensor, quantised: Quantised, gelu: bool, into: Quantised | None
    ) -> None:
        super().__init__()
        self.weight, self.scales = rounded(weight)
        self.bias, self.scale, self.zero = quantised.bias, quantised.scale, quantised.zero
        self.gelu = gelu
        self.writes_steps = into is not None
        self.out_scale, self.out_zero = (into.scale, into.zero) if into else (1.0, 0)
        self.packs = False
        self.packed = self.weight * self.scales[:, None]
        self.zeros = torch.zeros_like(self.scales, dtype=torch.int32)
        self.factor = torch.tensor(1 / self.scale)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Map fp32 or uint8 [N, T, in] to fp32 or uint8 [N, T, out]."""
        if not self.packs:
            if x.dtype == torch.uint8:
                x = (x.float() - self.zero) * self.scale
            out = F.linear(x, self.packed, self.bias)
            if self.gelu:
                out = F.gelu(out)
            return out if residual is None else out + residual
        if x.dtype != torch.uint8:
            x = to_steps(x, self.factor, self.zero)
        post, dtype = "gelu" if self.gelu else "none", torch.float32
        if self.writes_steps:
            dtype = torch.uint8
        # fmt: off
        if residual is not None:
            return torch.ops.onednn.qlinear_pointwise(  # type: ignore[no-any-return]
                x, self.scale, self.zero, self.packed, self.scales, self.zeros, residual, self.bias,
                1.0, 0, dtype, 1.0, 0, "add", 1.0, "none", [], "",
            )
        return torch.ops.onednn.qlinear_pointwise(  # type: ignore[no-any-return]
            x, self.scale, self.zero, self.packed, self.scales, self.zeros, self.bias,
            self.out_scale, self.out_zero, dtype, post, [], "none",
        )
        # fmt: on

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, Tensor, Tensor, list[float], list[int], list[bool]]:
        scales, zeros = [self.scale, self.out_scale], [self.zero, self.out_zero]
        flags = [self.gelu, self.writes_steps, self.training]
        return self.weight, self.scales, self.bias, scales, zeros, flags

    @torch.jit.export
    def __setstate__(
        self, state: tuple[Tensor, Tensor, Tensor, list[float], list[int], list[bool]]
    ) -> None:
        self.weight, self.scales, self.bias, scales, zeros, flags = state
        self.scale, self.out_scale = scales
        self.zero, self.out_zero = zeros
        self.gelu, self.writes_steps, self.training = flags
        self.zeros = torch.zeros_like(self.scales, dtype=torch.int32)
        self.factor = torch.tensor(1 / self.scale)
        self.packs = self.weight.device.type == "cpu" and is_exact()
        if self.packs:
            self.packed = torch.ops.onednn.qlinear_prepack(self.weight, None)
        else:
            self.packed = self.weight * self.scales[:, None]

"""Fused layers for CPUs: the same function as the plain network, in fewer and larger operations.

Half of the plain network's time on a CPU is spent outside matrix products. Here each linear layer
is one oneDNN call, with its weight packed for the processor when the file is loaded. The operators
are those that torch.compile uses for CPUs (torch/_inductor/fx_passes/mkldnn_fusion.py in
https://github.com/pytorch/pytorch). Loaded onto a GPU, the same file runs the plain layers.

These are scripted because they branch on the device; the rest is traced.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .int8 import Int8Linear, Quantised, to_steps
from .model import Attention, Block, ViT


def fold(network: ViT) -> None:
    """Fold the weights of the blocks' norms into the layers after them, in place:
    (x * g) W^T = x (W * g)^T.
    """
    for block in network.encoder.block:
        assert isinstance(block, Block)
        for norm, linear in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp[0])):
            linear.weight = nn.Parameter(linear.get_parameter("weight") * norm.weight)
            norm.weight = nn.Parameter(torch.ones_like(norm.weight))


def fuse(network: ViT, dtype: torch.dtype, int8: Mapping[str, Quantised] = {}) -> None:
    """Replace the layers of the folded fp32 network, in place, with fused ones in `dtype`.

    Its first layer must be `Patches`. The linear layers that `int8` names run in int8; the head
    stays in fp32.
    """
    tokens = network.cfg.num_tokens

    def layer(name: str, gelu: bool = False, into: str = "") -> Any:
        linear = network.get_submodule(name)
        if name in int8:
            weight = linear.get_parameter("weight")
            return torch.jit.script(Int8Linear(weight, int8[name], gelu, int8.get(into)))
        return _packed(linear, dtype, tokens, gelu)

    network.conv_proj.linear = layer("conv_proj.linear")
    for number, block in enumerate(network.encoder.block):
        assert isinstance(block, Block)
        name = f"encoder.block.{number}"
        qkv, up, down = f"{name}.attn.qkv", f"{name}.mlp.0", f"{name}.mlp.3"
        fused = FusedBlock(block.attn)
        fused.norm1, fused.norm2 = (
            torch.jit.script(RMS(network.cfg.norm_eps, int8.get(after))) for after in (qkv, up)
        )
        fused.up, fused.down = layer(up, gelu=True, into=down), layer(down)
        fused.proj = layer(f"{name}.attn.proj")
        block.attn.qkv, block.attn.proj = layer(qkv), nn.Identity()  # type: ignore[assignment]
        network.encoder.block[number] = fused
    network.classifier = _packed(network.classifier, torch.float32, rows=4)


def _packed(linear: nn.Module, dtype: torch.dtype, rows: int, gelu: bool = False) -> Any:
    weight, bias = linear.get_parameter("weight").detach(), linear.get_parameter("bias").detach()
    return torch.jit.script(PackedLinear(weight.to(dtype), bias.to(dtype), rows, gelu))


class FusedBlock(nn.Module):
    """A block whose linear layers include the GELU or the residual addition that follows."""

    norm1: nn.Module
    norm2: nn.Module
    proj: nn.Module
    up: nn.Module
    down: nn.Module

    def __init__(self, attn: Attention) -> None:
        super().__init__()
        self.attn = attn  # without its last layer, `proj`

    def forward(self, x: Tensor) -> Tensor:  # [N, T, D] -> [N, T, D]
        x = self.proj(self.attn(self.norm1(x)), x)
        out: Tensor = self.down(self.up(self.norm2(x)), x)
        return out


class RMS(nn.Module):
    """RMSNorm over the last axis, without a weight; quantised output if `into` is an int8 layer."""

    def __init__(self, eps: float, into: Quantised | None = None) -> None:
        super().__init__()
        self.eps, self.writes_steps = eps, into is not None
        self.step, self.zero = (into.scale, into.zero) if into else (1.0, 0)

    def forward(self, x: Tensor) -> Tensor:  # [N, T, D] -> [N, T, D]
        if x.device.type != "cpu":
            return F.rms_norm(x, [x.shape[-1]], None, self.eps)
        # On a CPU rms_norm makes seven passes over the data; this makes three.
        norm = torch.linalg.vector_norm(x, 2.0, [-1], True, dtype=torch.float32)
        scale: Tensor = (norm.square() / x.shape[-1] + self.eps).rsqrt()
        if self.writes_steps:
            return to_steps(x, scale / self.step, self.zero)
        return x * scale.to(x.dtype)


class PackedLinear(nn.Module):
    """x W^T + b, followed by the exact GELU or a residual addition.

    The file has the plain weight, which is packed for the processor on loading.
    """

    def __init__(self, weight: Tensor, bias: Tensor, rows: int, gelu: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.rows, self.gelu = weight, bias, rows, gelu
        self.packs = False
        self.packed = weight

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Map [N, T, in] to [N, T, out]."""
        if not self.packs:
            out = F.linear(x, self.weight, self.bias)
            if self.gelu:
                out = F.gelu(out)
            return out if residual is None else out + residual
        if residual is not None:
            return torch.ops.mkldnn._linear_pointwise(x, residual, self.packed, self.bias, "add")  # type: ignore[no-any-return]
        # For more than one image oneDNN's fused GELU is slower than a separate one.
        fused = self.gelu and x.shape[0] == 1
        post, kind = ("gelu", "none") if fused else ("none", "")
        out = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, post, [], kind)
        return F.gelu(out) if self.gelu and not fused else out

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, Tensor, int, bool, bool]:
        return self.weight, self.bias, self.rows, self.gelu, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, Tensor, int, bool, bool]) -> None:
        self.weight, self.bias, self.rows, self.gelu, self.training = state
        self.packs = self.weight.device.type == "cpu"
        if self.weight.dtype == torch.bfloat16:
            self.packs = self.packs and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if self.weight.dtype == torch.float16:
            self.packs = self.packs and torch.ops.mkldnn._is_mkldnn_fp16_supported()
        self.packed = self.weight
        if self.packs:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, self.rows)

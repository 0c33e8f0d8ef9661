"""The network's layers as a CPU likes them: the same numbers, in fewer and larger steps.

Half the time of the plain network on a CPU goes into what is not a matrix product. Here each linear
layer is one call of oneDNN, with a weight that was laid out for the processor when the file was
loaded. The operators are those that torch.compile takes for CPUs
(torch/_inductor/fx_passes/mkldnn_fusion.py in https://github.com/pytorch/pytorch). Loaded onto a
GPU, the same file runs the plain layers.

TorchScript has to see which device it runs on, so these are scripted; the rest is traced.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .int8 import Int8Linear, Quantised, to_steps
from .model import Attention, Block, ViT


def fold(network: ViT) -> None:
    """Change the network, in place, so that its blocks' norms have no weight:
    (x * g) W^T = x (W * g)^T, and so it becomes part of the layer after it.
    """
    for block in network.encoder.block:
        assert isinstance(block, Block)
        for norm, linear in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp[0])):
            linear.weight = nn.Parameter(linear.get_parameter("weight") * norm.weight)
            norm.weight = nn.Parameter(torch.ones_like(norm.weight))


def fuse(network: ViT, dtype: torch.dtype, int8: Mapping[str, Quantised] = {}) -> None:
    """Change the folded network (fp32), in place, to the layers below, with weights in `dtype`.

    Its first layer is a linear one on patches. The linear layers that `int8` names run in that;
    the head stays in fp32.
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
    """A block whose linear layers also do what comes after them: GELU, and the residuals."""

    norm1: nn.Module
    norm2: nn.Module
    proj: nn.Module
    up: nn.Module
    down: nn.Module

    def __init__(self, attn: Attention) -> None:
        super().__init__()
        self.attn = attn  # but for its last layer, `proj`

    def forward(self, x: Tensor) -> Tensor:  # [N, T, D] -> [N, T, D]
        x = self.proj(self.attn(self.norm1(x)), x)
        out: Tensor = self.down(self.up(self.norm2(x)), x)
        return out


class RMS(nn.Module):
    """RMSNorm over the last axis, without a weight. `into` an int8 layer it writes its steps."""

    def __init__(self, eps: float, into: Quantised | None = None) -> None:
        super().__init__()
        self.eps, self.writes_steps = eps, into is not None
        self.step, self.zero = (into.scale, into.zero) if into else (1.0, 0)

    def forward(self, x: Tensor) -> Tensor:  # [N, T, D] -> [N, T, D]
        if x.device.type != "cpu":
            return F.rms_norm(x, [x.shape[-1]], None, self.eps)
        # rms_norm is seven passes over the data on a CPU; these are three.
        norm = torch.linalg.vector_norm(x, 2.0, [-1], True, dtype=torch.float32)
        scale: Tensor = (norm.square() / x.shape[-1] + self.eps).rsqrt()
        if self.writes_steps:
            return to_steps(x, scale / self.step, self.zero)
        return x * scale.to(x.dtype)


class PackedLinear(nn.Module):
    """x W^T + b, and after it the exact GELU, or a residual.

    The file holds the plain weight. What fits the processor is made of it on loading.
    """

    def __init__(self, weight: Tensor, bias: Tensor, rows: int, gelu: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.rows, self.gelu = weight, bias, rows, gelu
        self.packs = False
        self.packed = weight

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[N, T, in] -> [N, T, out]."""
        if not self.packs:
            out = F.linear(x, self.weight, self.bias)
            if self.gelu:
                out = F.gelu(out)
            return out if residual is None else out + residual
        if residual is not None:
            return torch.ops.mkldnn._linear_pointwise(x, residual, self.packed, self.bias, "add")  # type: ignore[no-any-return]
        # For more than one image oneDNN's own GELU takes longer than the two steps.
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

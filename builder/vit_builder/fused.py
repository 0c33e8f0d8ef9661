"""The network's layers as a CPU likes them: the same numbers, in fewer and larger steps.

Half the time of the plain network on a CPU goes into what is not a matrix product. Here each linear
layer is one call of oneDNN, with a weight that was laid out for the processor when the file was
loaded. The operators are those that torch.compile takes for CPUs
(torch/_inductor/fx_passes/mkldnn_fusion.py in https://github.com/pytorch/pytorch). Loaded onto a
GPU, the same file runs the plain layers.

TorchScript has to see which device it runs on, so these are scripted; the rest is traced.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .model import Block, ViT


def fuse(network: ViT, patches: nn.Module, dtype: torch.dtype) -> None:
    """Change the network (fp32), in place, to the layers below, with weights in `dtype`.

    So too `patches`, of which its first layer will be made. The head stays in fp32.
    """
    tokens, eps = network.cfg.num_tokens, network.cfg.norm_eps
    patches.linear = _packed(patches.get_submodule("linear"), dtype, tokens)
    for block in network.encoder.block:
        assert isinstance(block, Block)
        attn, up, down = block.attn, block.mlp[0], block.mlp[3]
        _move_weight(block.norm1, attn.qkv)
        _move_weight(block.norm2, up)
        block.norm1, block.norm2 = _rms(eps), _rms(eps)
        attn.qkv, attn.proj = _packed(attn.qkv, dtype, tokens), _packed(attn.proj, dtype, tokens)
        block.mlp = nn.Sequential(
            _packed(up, dtype, tokens, gelu=True), _packed(down, dtype, tokens)
        )
    network.classifier = _packed(network.classifier, torch.float32, rows=4)


def _move_weight(norm: nn.Module, linear: nn.Module) -> None:
    """(x * g) W^T = x (W * g)^T: the norm's weight becomes part of the layer after it."""
    weight, scale = linear.get_parameter("weight"), norm.get_parameter("weight")
    linear.weight = nn.Parameter(weight * scale)


def _rms(eps: float) -> Any:
    return torch.jit.script(RMS(eps))


def _packed(linear: nn.Module, dtype: torch.dtype, rows: int, gelu: bool = False) -> Any:
    weight, bias = linear.get_parameter("weight").detach(), linear.get_parameter("bias").detach()
    return torch.jit.script(PackedLinear(weight.to(dtype), bias.to(dtype), rows, gelu))


class RMS(nn.Module):
    """RMSNorm over the last axis, without a weight."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # [N, T, D] -> [N, T, D]
        if x.device.type != "cpu":
            return F.rms_norm(x, [x.shape[-1]], None, self.eps)
        # rms_norm is seven passes over the data on a CPU; these are three.
        norm = torch.linalg.vector_norm(x, 2.0, [-1], True, dtype=torch.float32)
        scale: Tensor = (norm.square() / x.shape[-1] + self.eps).rsqrt()
        return x * scale.to(x.dtype)


class PackedLinear(nn.Module):
    """x W^T + b, and the exact GELU after it where that is asked for.

    The file holds the plain weight. What fits the processor is made of it on loading.
    """

    def __init__(self, weight: Tensor, bias: Tensor, rows: int, gelu: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.rows, self.gelu = weight, bias, rows, gelu
        self.packs = False
        self.packed = weight

    def forward(self, x: Tensor) -> Tensor:  # [N, T, in] -> [N, T, out]
        if not self.packs:
            out = F.linear(x, self.weight, self.bias)
            return F.gelu(out) if self.gelu else out
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

"""The served graph, which TorchScript traces; separate from the network itself."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint
from .fused import fold, fuse
from .int8 import Quantised, calibrate
from .model import ViT

CENTRE = 128
# For int8, the dtype of all but the linear layers that run in int8.
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.float32,
}


class Normalise(nn.Module):
    """uint8 [N, H, W, 3] -> the network's input [N, 3, H, W]; calculated in fp32."""

    mean: Tensor
    std: Tensor

    def __init__(self, checkpoint: Checkpoint, precision: str) -> None:
        super().__init__()
        self.dtype = DTYPES[precision]
        self.register_buffer("mean", torch.tensor(checkpoint.rgb_mean) * 255)
        self.register_buffer("std", torch.tensor(checkpoint.rgb_std) * 255)

    def forward(self, pixels: Tensor) -> Tensor:
        x = ((pixels.float() - self.mean) / self.std).permute(0, 3, 1, 2)
        return x.to(self.dtype)


class Patches(nn.Module):
    """Normalising and the patch convolution in one linear layer: uint8 [N, H, W, 3] ->
    [N, D, patches].

    A convolution whose stride equals its kernel size is a linear layer on patches, and that is a
    matrix product on any device, without a plan for each batch size. Its inputs are pixels minus
    CENTRE, which bf16 represents exactly; an int8 layer takes the pixels unchanged.
    """

    def __init__(
        self, conv: nn.Conv2d, checkpoint: Checkpoint, dtype: torch.dtype, int8: bool = False
    ) -> None:
        super().__init__()
        mean, std = (
            torch.tensor(values)[:, None, None] * 255
            for values in (checkpoint.rgb_mean, checkpoint.rgb_std)
        )
        weight = conv.get_parameter("weight").detach() / std  # [D, 3, patch, patch]
        bias = conv.get_parameter("bias").detach() + (weight * (CENTRE - mean)).sum((1, 2, 3))
        self.size, self.dtype, self.centre, self.int8 = conv.stride[0], dtype, CENTRE, int8
        linear = nn.Linear(weight[0].numel(), len(weight))
        linear.weight = nn.Parameter(weight.permute(0, 2, 3, 1).flatten(1))  # pixel order
        linear.bias = nn.Parameter(bias)
        self.linear: nn.Module = linear.to(dtype)

    def forward(self, pixels: Tensor) -> Tensor:
        n, height, width, _ = pixels.shape
        x = pixels.reshape(n, height // self.size, self.size, width // self.size, 3 * self.size)
        x = x.transpose(2, 3).reshape(n, -1, 3 * self.size * self.size)
        if not self.int8:
            x = x.to(self.dtype) - self.centre
        out: Tensor = self.linear(x).transpose(1, 2)
        return out


class ServedViT(nn.Module):
    """Pixels in, the five outputs of the wire contract out.

    Normalising is part of the graph so that a quarter of the bytes are copied to the GPU; softmax
    and top-k, because Triton's classification extension sorts all classes on the CPU.
    """

    def __init__(
        self,
        network: ViT,
        checkpoint: Checkpoint,
        precision: str,
        top_k: int,
        neck_precision: str = "fp32",
    ) -> None:
        super().__init__()
        self.normalise: nn.Module = Normalise(checkpoint, precision)
        self.network = network.to(DTYPES[precision])
        # The head stays in fp32: bf16 logits would tie classes that are 1/256 apart.
        self.network.classifier.float()
        self.top_k = top_k
        self.neck_dtype = DTYPES[neck_precision]

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """uint8 [N, H, W, 3] -> probabilities [N, C], embedding [N, D], neck [N, D, h, w],
        top_scores [N, K] (all fp32, but neck as chosen) and top_indices [N, K] (int32), best first.
        """
        logits, embedding, neck = self.network(self.normalise(pixels))
        probabilities = logits.softmax(dim=1)
        top_scores, top_indices = probabilities.topk(self.top_k, dim=1)
        return probabilities, embedding, neck.to(self.neck_dtype), top_scores, top_indices.int()


def quantise(checkpoint: Checkpoint, pixels: Tensor) -> dict[str, Quantised]:
    """Calibrate the CPU's linear layers for int8 with uint8 [N, H, W, 3]; return them by name."""
    network = checkpoint.network()
    network.conv_proj = Patches(network.conv_proj, checkpoint, torch.float32)  # type: ignore[assignment]
    fold(network)
    return calibrate(network, pixels, CENTRE)


def trace(
    checkpoint: Checkpoint,
    precision: str,
    top_k: int,
    device: str,
    neck_precision: str = "fp32",
    int8: Mapping[str, Quantised] = {},
) -> torch.jit.ScriptModule:
    """Trace the served graph on the CPU, so that it depends on no device.

    It is traced with two images: with one, the batch size could be folded into constants.

    Args:
        int8: the layers to run in int8, from `quantise`.
    """
    network, dtype = checkpoint.network(), DTYPES[precision]
    patches = Patches(network.conv_proj, checkpoint, dtype, "conv_proj.linear" in int8)
    network.conv_proj = patches  # type: ignore[assignment]
    if device == "cpu":
        fold(network)
        fuse(network, dtype, int8)
    served = ServedViT(network, checkpoint, precision, top_k, neck_precision).eval()
    # The first layer takes raw pixels. Traced, it would store CENTRE as a tensor on the CPU.
    network.conv_proj = torch.jit.script(patches)  # type: ignore[assignment]
    served.normalise = nn.Identity()
    height, width = checkpoint.config.image_size
    pixels = torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8)
    with torch.inference_mode():
        traced: torch.jit.ScriptModule = torch.jit.trace(  # type: ignore[no-untyped-call]
            served, pixels, check_trace=False
        )
    return traced

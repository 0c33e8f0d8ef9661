"""The network: a plain ViT with register tokens, RMSNorm and average pooling.

It is birder's `vit_reg4_m16_rms_avg` (https://gitlab.com/birder/birder), written out in one file:

- "An Image is Worth 16x16 Words", Dosovitskiy et al. 2020, https://arxiv.org/abs/2010.11929
- "Vision Transformers Need Registers", Darcet et al. 2023, https://arxiv.org/abs/2309.16588
- "Root Mean Square Layer Normalization", Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467

Parameter names are those of birder's current checkpoints, so a state dict loads unchanged.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of the network. The defaults are those of the published checkpoint."""

    image_size: tuple[int, int] = (256, 256)  # H, W in pixels
    num_classes: int = 19167
    patch_size: int = 16
    num_layers: int = 12
    num_heads: int = 8
    hidden_dim: int = 512
    mlp_dim: int = 2048
    num_reg_tokens: int = 4
    norm_eps: float = 1e-6

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across: (H / patch_size, W / patch_size)."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Length of the sequence: register tokens, then one token per patch."""
        return self.num_reg_tokens + self.grid[0] * self.grid[1]


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection for queries, keys and values."""

    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        self.num_heads = cfg.num_heads
        self.qkv = nn.Linear(cfg.hidden_dim, 3 * cfg.hidden_dim)
        self.proj = nn.Linear(cfg.hidden_dim, cfg.hidden_dim)

    def forward(self, x: Tensor) -> Tensor:  # [N, T, D] -> [N, T, D]
        q, k, v = (
            self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        )
        x = F.scaled_dot_product_attention(q, k, v)  # [N, heads, T, D / heads]
        out: Tensor = self.proj(x.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(cfg.hidden_dim, eps=cfg.norm_eps)
        self.attn = Attention(cfg)
        self.norm2 = nn.RMSNorm(cfg.hidden_dim, eps=cfg.norm_eps)
        # The Identity replaces birder's dropout: the indices are part of the parameters' names.
        self.mlp = nn.Sequential(
            nn.Linear(cfg.hidden_dim, cfg.mlp_dim),
            nn.GELU(),  # exact (erf)
            nn.Identity(),
            nn.Linear(cfg.mlp_dim, cfg.hidden_dim),
        )

    def forward(self, x: Tensor) -> Tensor:  # [N, T, D] -> [N, T, D]
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Encoder(nn.Module):
    """The stack of blocks (a separate module only for the parameters' names)."""

    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        self.block = nn.Sequential(*(Block(cfg) for _ in range(cfg.num_layers)))

    def forward(self, x: Tensor) -> Tensor:  # [N, T, D] -> [N, T, D]
        out: Tensor = self.block(x)
        return out


class ViT(nn.Module):
    """Normalised pixels in; logits, embedding and feature map out, from one pass."""

    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.conv_proj = nn.Conv2d(3, cfg.hidden_dim, cfg.patch_size, stride=cfg.patch_size)
        self.reg_tokens = nn.Parameter(torch.zeros(1, cfg.num_reg_tokens, cfg.hidden_dim))
        self.pos_embedding = nn.Parameter(torch.zeros(1, cfg.num_tokens, cfg.hidden_dim))
        self.encoder = Encoder(cfg)
        self.norm = nn.RMSNorm(cfg.hidden_dim, eps=cfg.norm_eps)
        self.classifier = nn.Linear(cfg.hidden_dim, cfg.num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run the network.

        Args:
            x: float [N, 3, H, W], normalised by the checkpoint's `rgb_stats`.

        Returns:
            logits [N, C]; embedding [N, D], the mean of the patch tokens after the final norm;
            neck [N, D, H/16, W/16], the same patch tokens arranged as a feature map.
        """
        x = self.conv_proj(x).flatten(2).transpose(1, 2)  # [N, patches, D]
        x = torch.cat([self.reg_tokens.expand(x.shape[0], -1, -1), x], dim=1)  # registers first
        x = self.norm(self.encoder(x + self.pos_embedding))
        patches = x[:, self.cfg.num_reg_tokens :]
        # In the head's precision, which may be higher than the encoder's.
        embedding = patches.mean(dim=1, dtype=self.classifier.weight.dtype)
        neck = torch.unflatten(patches.transpose(1, 2), 2, self.cfg.grid)
        return self.classifier(embedding), embedding, neck

"""RevViT: a vision transformer on two streams that needs no activation but its last.

    B batch   C channels   H, W image size   T patches   D width   N heads   E width of a head

Mangalam, Fan, Li, Wu, Xiong, Feichtenhofer, Malik, "Reversible Vision Transformers", CVPR 2022:
the patch embedding starts both streams, a block is an additive coupling of pre-normalised
attention and MLP, and the two streams are joined, normalised and averaged at the end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revdist.errors import UsageError
from revdist.reversible.chain import ReversibleChain
from revdist.reversible.couplings import AdditiveCoupling


class Attention(nn.Module):
    """LayerNorm, then self-attention of every patch to every patch: (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        if width % num_heads:
            raise UsageError(f"width {width} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        batch, length, width = x_BTD.shape
        qkv_BT3NE = self.query_key_value(self.norm(x_BTD)).view(batch, length, 3, self.num_heads, -1)
        q_BNTE, k_BNTE, v_BNTE = qkv_BT3NE.permute(2, 0, 3, 1, 4)
        out_BNTE = F.scaled_dot_product_attention(q_BNTE, k_BNTE, v_BNTE)
        out_BTD: Tensor = self.output(out_BNTE.transpose(1, 2).reshape(batch, length, width))
        return out_BTD


def mlp(width: int, hidden: int) -> nn.Sequential:
    """LayerNorm, then a hidden layer: (B, T, D) -> (B, T, D)."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class RevViT(nn.Module):
    """Images (B, in_channels, image_size, image_size) to logits (B, num_classes).

    Raises UsageError where the patches do not tile the image or the heads do not divide the width.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        image_size: int,
        patch_size: int,
        width: int,
        depth: int,
        num_heads: int,
        mlp_ratio: int = 4,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise UsageError(f"patches of {patch_size} pixels do not tile an image of {image_size}")
        num_patches = (image_size // patch_size) ** 2
        self.embed = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.position_TD = nn.Parameter(0.02 * torch.randn(num_patches, width))
        blocks = [AdditiveCoupling(Attention(width, num_heads), mlp(width, mlp_ratio * width)) for _ in range(depth)]
        self.chain = ReversibleChain(blocks, split_dim=-1)
        self.norm = nn.LayerNorm(2 * width)
        self.head = nn.Linear(2 * width, num_classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BTD = self.embed(x_BCHW).flatten(2).transpose(1, 2) + self.position_TD
        both_BTD = torch.cat(self.chain((x_BTD, x_BTD)), dim=-1)
        logits: Tensor = self.head(self.norm(both_BTD).mean(dim=1))
        return logits


def revvit(
    num_classes: int = 10,
    *,
    image_size: int = 8,
    patch_size: int = 2,
    width: int = 64,
    depth: int = 6,
    num_heads: int = 4,
    in_channels: int = 1,
) -> RevViT:
    """A small RevViT, sized for 8x8 grey images by default."""
    return RevViT(
        num_classes,
        image_size=image_size,
        patch_size=patch_size,
        width=width,
        depth=depth,
        num_heads=num_heads,
        in_channels=in_channels,
    )


def revvit_small(num_classes: int = 1000) -> RevViT:
    """The paper's RevViT-S: 224x224 images, 12 blocks of width 384."""
    return RevViT(num_classes, image_size=224, patch_size=16, width=384, depth=12, num_heads=6)


def revvit_base(num_classes: int = 1000) -> RevViT:
    """The paper's RevViT-B: 224x224 images, 12 blocks of width 768."""
    return RevViT(num_classes, image_size=224, patch_size=16, width=768, depth=12, num_heads=12)

"""Invertible down-sampling: pixels move into channels, and nothing is lost.

    B batch   C channels   H height   W width   r block size

Source: Jacobsen, Smeulders, Oyallon, "i-RevNet: Deep Invertible Networks", ICLR 2018;
Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP", ICLR 2017.

Squeezing is a permutation: inverse and forward are exact to the bit in every dtype, log|det| is
zero, autograd saves nothing, and rebuilding the input costs one copy. It does not average, so what
follows must cope with four times the channels (i-RevNet does; most classifiers pool instead).
"""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from revdist.errors import UsageError
from revdist.reversible.operator import ReversibleOperator


class Squeeze(ReversibleOperator):
    """(B, C, H, W) -> (B, C r^2, H/r, W/r).

    Raises UsageError where H or W is not a multiple of the block size.
    """

    def __init__(self, block: int = 2) -> None:
        super().__init__()
        if block < 1:
            raise UsageError(f"block size {block} must be at least 1")
        self.block = block

    def forward(self, x_BCHW: Tensor) -> Tensor:
        height, width = x_BCHW.shape[-2:]
        if height % self.block or width % self.block:
            raise UsageError(
                f"cannot squeeze {height} x {width} pixels into blocks of {self.block}: "
                f"pad the image, or squeeze fewer times"
            )
        return F.pixel_unshuffle(x_BCHW, self.block)

    def inverse(self, y_BCHW: Tensor) -> Tensor:
        return F.pixel_shuffle(y_BCHW, self.block)

    def extra_repr(self) -> str:
        return f"block={self.block}"


class SqueezeHalves(ReversibleOperator):
    """`Squeeze` on each half of a pair: no joining and halving where it stands between couplings."""

    num_streams: ClassVar[int] = 2

    def __init__(self, block: int = 2) -> None:
        super().__init__()
        self.squeeze = Squeeze(block)

    def forward(self, x1_BCHW: Tensor, x2_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        return self.squeeze(x1_BCHW), self.squeeze(x2_BCHW)

    def inverse(self, y1_BCHW: Tensor, y2_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        return self.squeeze.inverse(y1_BCHW), self.squeeze.inverse(y2_BCHW)

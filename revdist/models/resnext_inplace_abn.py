"""ResNeXt with In-place ABN: an ordinary residual network at about half the activations.

    B batch   C channels   H, W image size

Xie, Girshick, Dollar, Tu, He, "Aggregated Residual Transformations for Deep Neural Networks", CVPR
2017, with every BatchNorm-ReLU replaced by `InPlaceABN` as in Rota Bulo, Porzi, Kontschieder, CVPR
2018. Residual blocks have no inverse and take SAVE or RECOMPUTE in the chain; inside them each
normalisation keeps its output only, which the next convolution keeps anyway. The activations
between convolutions that stand in the chain by themselves can be inverted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from revdist.errors import UsageError
from revdist.reversible.chain import ReversibleChain
from revdist.reversible.inplace_abn import InPlaceABN

SLOPE = 0.01
"""Of the leaky ReLU, as in the paper."""


class Bottleneck(nn.Module):
    """1x1, grouped 3x3, 1x1, each normalised; added to the input and activated.

    (B, inputs, H, W) -> (B, outputs, H / stride, W / stride)
    """

    def __init__(self, inputs: int, outputs: int, *, inner: int, cardinality: int, stride: int = 1) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, inner, 1, bias=False),
            InPlaceABN(inner, negative_slope=SLOPE),
            nn.Conv2d(inner, inner, 3, stride=stride, padding=1, groups=cardinality, bias=False),
            InPlaceABN(inner, negative_slope=SLOPE),
            nn.Conv2d(inner, outputs, 1, bias=False),
            InPlaceABN(outputs, negative_slope=1.0),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), InPlaceABN(outputs, negative_slope=1.0)
            )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.leaky_relu(self.branch(x_BCHW) + self.shortcut(x_BCHW), SLOPE, inplace=True)


class ResNeXtInPlaceABN(nn.Module):
    """Images (B, in_channels, H, W) to logits (B, num_classes).

    units: blocks per stage
    width: channels of the first stage's output, doubled by each further stage, which halves H and W
    cardinality, group_width: groups of the 3x3 convolutions and channels of a group in the first stage
    large_images: a 7x7 stem with stride 2 and max pooling, as for ImageNet; else a 3x3 one
    """

    def __init__(
        self,
        num_classes: int,
        units: Sequence[int],
        *,
        width: int = 256,
        cardinality: int = 32,
        group_width: int = 4,
        in_channels: int = 3,
        large_images: bool = True,
    ) -> None:
        super().__init__()
        if not units or min(units) < 1:
            raise UsageError(f"units {tuple(units)} must name at least one block per stage")
        stem = max(8, width // 4)
        operators: list[nn.Module] = [
            nn.Conv2d(in_channels, stem, 7, stride=2, padding=3, bias=False)
            if large_images
            else nn.Conv2d(in_channels, stem, 3, padding=1, bias=False),
            InPlaceABN(stem, negative_slope=SLOPE),
        ]
        if large_images:
            operators.append(nn.MaxPool2d(3, stride=2, padding=1))
        channels = stem
        for stage, num_units in enumerate(units):
            outputs, inner = width * 2**stage, cardinality * group_width * 2**stage
            for unit in range(num_units):
                stride = 2 if stage and unit == 0 else 1
                operators.append(Bottleneck(channels, outputs, inner=inner, cardinality=cardinality, stride=stride))
                channels = outputs
        self.chain = ReversibleChain(operators)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        logits: Tensor = self.head(self.chain(x_BCHW))
        return logits


def resnext_inplace_abn(
    num_classes: int = 10,
    *,
    units: Sequence[int] = (2, 2, 2),
    width: int = 32,
    cardinality: int = 4,
    group_width: int = 4,
    in_channels: int = 1,
) -> ResNeXtInPlaceABN:
    """A small one for small images."""
    return ResNeXtInPlaceABN(
        num_classes,
        units,
        width=width,
        cardinality=cardinality,
        group_width=group_width,
        in_channels=in_channels,
        large_images=False,
    )


def resnext50_inplace_abn(num_classes: int = 1000) -> ResNeXtInPlaceABN:
    """ResNeXt-50 (32x4d) for ImageNet: 25.0 million parameters."""
    return ResNeXtInPlaceABN(num_classes, (3, 4, 6, 3))


def resnext101_inplace_abn(num_classes: int = 1000) -> ResNeXtInPlaceABN:
    """ResNeXt-101 (32x4d) for ImageNet: 44.2 million parameters."""
    return ResNeXtInPlaceABN(num_classes, (3, 4, 23, 3))

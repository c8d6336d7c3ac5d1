"""i-RevNet: a classifier that is invertible from the padded image to its last feature map.

    B batch   C channels   H height   W width

Jacobsen, Smeulders, Oyallon, "i-RevNet: Deep Invertible Networks", ICLR 2018. Down-sampling is
`Squeeze` (pixels become channels) in place of pooling, so every operator of the network inverts
and nothing but the last feature map must be held.

The image must be widened to the first stage, injectively. The paper pads with zero channels, which
can leave a half constant; batch norm then multiplies whatever noise rebuilding leaves in it by
1 / sqrt(eps) = 316 at every layer, and fp32 gradients of the first branch came out 60 times too
large here. So the channels of the image are repeated instead.

The paper's block maps (x1, x2) to (x2, x1 + F(x2)); two of them in a row are one
`AdditiveCoupling`. In a stage's first block F runs at the finer resolution with stride 2: the
halves are squeezed first here, and that F un-squeezes its input, which is the same function.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from revdist.errors import UsageError
from revdist.reversible.chain import ReversibleChain
from revdist.reversible.couplings import AdditiveCoupling
from revdist.reversible.squeeze import SqueezeHalves


def branch(width: int, *, bottleneck: int = 4, stride: int = 1, first: bool = False) -> nn.Sequential:
    """The function F: pre-activated 3x3 convolutions width -> width / bottleneck -> same -> width.

    width: channels of a half after squeezing; with stride 2 the branch undoes the squeeze at its start
    first: the network's first branch has no normalisation before its first convolution
    """
    inner = max(1, width // bottleneck)
    inputs = width // stride**2
    layers: list[nn.Module] = [nn.PixelShuffle(stride)] if stride > 1 else []
    if not first:
        layers += [nn.BatchNorm2d(inputs), nn.ReLU()]
    layers += [
        nn.Conv2d(inputs, inner, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(inner),
        nn.ReLU(),
        nn.Conv2d(inner, inner, 3, padding=1, bias=False),
        nn.BatchNorm2d(inner),
        nn.ReLU(),
        nn.Conv2d(inner, width, 3, padding=1, bias=False),
    ]
    return nn.Sequential(*layers)


class IRevNet(nn.Module):
    """Images (B, in_channels, H, W) to logits (B, num_classes).

    couplings: per stage, the number of couplings (two of the paper's blocks each)
    width: channels of a half in the first stage; each further stage squeezes to four times as many
    initial_squeeze: block size of a squeeze before the first stage; 1: none

    Raises UsageError where the first stage is narrower than the image. H and W must be multiples of
    initial_squeeze * 2^(stages - 1).
    """

    def __init__(
        self,
        num_classes: int,
        couplings: Sequence[int],
        width: int,
        *,
        in_channels: int = 3,
        initial_squeeze: int = 1,
        bottleneck: int = 4,
    ) -> None:
        super().__init__()
        image_channels = in_channels * initial_squeeze**2
        if 2 * width < image_channels:
            raise UsageError(
                f"width {width} gives 2 x {width} channels, fewer than the image's {image_channels}: "
                f"an invertible network cannot drop any; raise width to {-(-image_channels // 2)}"
            )
        self.num_channels = 2 * width
        self.initial_squeeze = initial_squeeze
        operators: list[nn.Module] = []
        for stage, num_couplings in enumerate(couplings):
            if stage:
                operators.append(SqueezeHalves(2))
                width *= 4
            for index in range(num_couplings):
                entry = index == 0
                f = branch(width, bottleneck=bottleneck, stride=2 if stage and entry else 1, first=not stage and entry)
                operators.append(AdditiveCoupling(f, branch(width, bottleneck=bottleneck)))
        self.chain = ReversibleChain(operators)
        self.head = nn.Sequential(
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * width, num_classes),
        )

    def features(self, x_BCHW: Tensor) -> Tensor:
        """The last feature map, from which the operators of `chain` invert back to the repeated image."""
        x_BCHW = F.pixel_unshuffle(x_BCHW, self.initial_squeeze)
        num_repeats = -(-self.num_channels // x_BCHW.shape[1])
        features: Tensor = self.chain(x_BCHW.repeat(1, num_repeats, 1, 1)[:, : self.num_channels])
        return features

    def forward(self, x_BCHW: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x_BCHW))
        return logits


def irevnet(
    num_classes: int = 10,
    *,
    couplings: Sequence[int] = (9, 9, 9),
    width: int = 16,
    in_channels: int = 3,
    initial_squeeze: int = 1,
) -> IRevNet:
    """The paper's CIFAR network by default: 18 blocks a stage, halves of 16, 64 and 256 channels."""
    return IRevNet(num_classes, couplings, width, in_channels=in_channels, initial_squeeze=initial_squeeze)

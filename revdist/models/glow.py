"""Glow: a normalising flow over images, here with a class-conditional prior, so that it also classifies.

    B batch   C channels   H, W image size   K finished values (1 + factored-out latents)   D dimensions
    N classes

Kingma, Dhariwal, "Glow: Generative Flow with Invertible 1x1 Convolutions", NeurIPS 2018, with the
multi-scale architecture of Real NVP (Dinh, Sohl-Dickstein, Bengio, ICLR 2017). The chain's two
streams are the image in the making, x_BCHW, and what is finished, done_BK: the log-determinant
so far in its first column, then the latents that each level factors out. Both are functions of
what comes after them, so no activation is needed but the last, at any depth.

A step is actnorm, invertible 1x1 convolution and affine coupling. Actnorm's scale is the diagonal of
the convolution's LU factors here, which leaves its bias.

The latent of class n is Gaussian with mean mu_n and unit variance. The output is log p(x | n) for
every class: maximise it for the true class to learn the density, compare classes (Bayes' rule) to
classify. `generative_loss` does both (Nalisnick et al., "Hybrid Models with Deep and Invertible
Features", ICML 2019).
"""

from __future__ import annotations

import math
from typing import ClassVar, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revdist.errors import UsageError
from revdist.planning.costs import Mode
from revdist.reversible.chain import ReversibleChain
from revdist.reversible.invertible_conv import InvertibleConv1x1
from revdist.reversible.on_first import OnFirst
from revdist.reversible.operator import Operator, ReversibleOperator, Streams
from revdist.reversible.replay import Replay
from revdist.reversible.squeeze import Squeeze

_LIMIT = 2.0
"""Largest absolute log-scale of a coupling, so that neither direction overflows."""


def coupling_network(channels: int, outputs: int, hidden: int) -> nn.Sequential:
    """3x3, 1x1 and 3x3 convolutions, the last one zero at the start, so that a coupling starts as identity."""
    last = nn.Conv2d(hidden, outputs, 3, padding=1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(cast(Tensor, last.bias))
    return nn.Sequential(
        nn.Conv2d(channels, hidden, 3, padding=1), nn.ReLU(), nn.Conv2d(hidden, hidden, 1), nn.ReLU(), last
    )


@final
class CountedCoupling(ReversibleOperator):
    """(x_BCHW, done_BK): the second half of the channels scaled and shifted by a network of the first half.

    The log-determinant, the sum of the log-scales, is added to done's first column.
    """

    num_streams: ClassVar[int] = 2

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.num_kept = channels - channels // 2
        self.network = coupling_network(self.num_kept, 2 * (channels // 2), hidden)

    def forward(self, x_BCHW: Tensor, done_BK: Tensor) -> Streams:
        kept_BCHW = x_BCHW[:, : self.num_kept]
        return self.combine(x_BCHW, done_BK, self.network(kept_BCHW))

    def inverse(self, y_BCHW: Tensor, done_BK: Tensor) -> Streams:
        return self.uncombine(y_BCHW, done_BK, self.network(y_BCHW[:, : self.num_kept]))

    def combine(self, x_BCHW: Tensor, done_BK: Tensor, change_BCHW: Tensor) -> Streams:
        """The streams after the step, given what the network returned."""
        log_scale_BCHW, shift_BCHW = _scale_and_shift(change_BCHW)
        kept_BCHW, changed_BCHW = x_BCHW[:, : self.num_kept], x_BCHW[:, self.num_kept :]
        changed_BCHW = changed_BCHW * log_scale_BCHW.exp() + shift_BCHW
        return torch.cat([kept_BCHW, changed_BCHW], dim=1), _counted(done_BK, log_scale_BCHW, 1)

    def uncombine(self, y_BCHW: Tensor, done_BK: Tensor, change_BCHW: Tensor) -> Streams:
        """The streams before the step."""
        log_scale_BCHW, shift_BCHW = _scale_and_shift(change_BCHW)
        kept_BCHW, changed_BCHW = y_BCHW[:, : self.num_kept], y_BCHW[:, self.num_kept :]
        changed_BCHW = (changed_BCHW - shift_BCHW) * (-log_scale_BCHW).exp()
        return torch.cat([kept_BCHW, changed_BCHW], dim=1), _counted(done_BK, log_scale_BCHW, -1)

    def operators(self, name: str) -> tuple[Operator, ...]:
        return (_PlannedCoupling(name, self),)


class _PlannedCoupling(Operator):
    """A coupling in a chain: one run of its network yields what it saved and the streams before it."""

    def __init__(self, name: str, coupling: CountedCoupling) -> None:
        super().__init__(name, num_streams=2, modes=(Mode.SAVE, Mode.INVERT, Mode.OFFLOAD))
        self._coupling = coupling

    @property
    def module(self) -> nn.Module:
        return self._coupling

    def forward(self, inputs: Streams) -> Streams:
        return self._coupling(*inputs)  # type: ignore[no-any-return]

    def inverse(self, outputs: Streams) -> Streams:
        return self._coupling.inverse(*outputs)

    def rebuild(self, outputs: Streams, replay: Replay) -> Streams:
        kept_BCHW = replay.leaf(outputs[0], 0)[:, : self._coupling.num_kept]
        with replay.capturing():
            change_BCHW = self._coupling.network(kept_BCHW)
        with torch.no_grad():
            inputs = self._coupling.uncombine(outputs[0], outputs[1], change_BCHW)
        if not replay.complete:
            with replay.capturing():
                self._coupling.combine(replay.leaf(inputs[0], 0), replay.leaf(inputs[1], 1), change_BCHW)
        return inputs


@final
class Bias(ReversibleOperator):
    """A constant for each channel is added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW + self.bias.view(-1, 1, 1)

    def inverse(self, y_BCHW: Tensor) -> Tensor:
        return y_BCHW - self.bias.view(-1, 1, 1)


@final
class FactorOut(ReversibleOperator):
    """(x_BCHW, done_BK): the second half of the channels is finished and moves to done."""

    num_streams: ClassVar[int] = 2

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.num_kept = channels - channels // 2
        self.moved_shape = (channels // 2, height, width)

    def forward(self, x_BCHW: Tensor, done_BK: Tensor) -> Streams:
        kept_BCHW, moved_BCHW = x_BCHW[:, : self.num_kept], x_BCHW[:, self.num_kept :]
        return kept_BCHW.contiguous(), torch.cat([done_BK, moved_BCHW.flatten(1)], dim=1)

    def inverse(self, y_BCHW: Tensor, done_BK: Tensor) -> Streams:
        num_moved = math.prod(self.moved_shape)
        moved_BCHW = done_BK[:, -num_moved:].view(-1, *self.moved_shape)
        return torch.cat([y_BCHW, moved_BCHW], dim=1), done_BK[:, :-num_moved]


class Glow(nn.Module):
    """Images (B, in_channels, image_size, image_size) to log p(x | class) in nats, (B, num_classes).

    steps: actnorm, 1x1 convolution and coupling, per level
    levels: each begins with a squeeze; each but the last ends by finishing half of the channels
    bin_width: distance of neighbouring grey levels in the images; training adds uniform noise of
      that width, so that the density is of a continuous image

    Raises UsageError where the image cannot be halved `levels` times.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        image_size: int,
        steps: int,
        levels: int,
        hidden: int,
        in_channels: int = 1,
        bin_width: float = 1 / 256,
    ) -> None:
        super().__init__()
        if image_size % 2**levels:
            raise UsageError(f"an image of {image_size} pixels cannot be halved {levels} times: lower levels")
        self.bin_width = bin_width
        self.num_dimensions = in_channels * image_size**2
        operators: list[nn.Module] = []
        self._mixings: list[tuple[InvertibleConv1x1, int]] = []
        channels, size = in_channels, image_size
        for level in range(levels):
            channels, size = channels * 4, size // 2
            operators.append(OnFirst(Squeeze()))
            for _ in range(steps):
                mixing = InvertibleConv1x1(channels)
                self._mixings.append((mixing, size * size))
                operators += [OnFirst(Bias(channels)), OnFirst(mixing), CountedCoupling(channels, hidden)]
            if level < levels - 1:
                operators.append(FactorOut(channels, size, size))
                channels -= channels // 2
        self.last_shape = (channels, size, size)
        self.chain = ReversibleChain(operators)
        self.mean_ND = nn.Parameter(0.1 * torch.randn(num_classes, self.num_dimensions))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        noise = torch.rand_like(x_BCHW) if self.training else 0.5
        latent_BD, log_determinant_B = self.encode(x_BCHW + self.bin_width * noise)
        squared_BN = (
            latent_BD.square().sum(1, keepdim=True) - 2 * latent_BD @ self.mean_ND.T + self.mean_ND.square().sum(1)
        )
        log_prior_BN = -0.5 * (squared_BN + self.num_dimensions * math.log(2 * math.pi))
        return log_prior_BN + log_determinant_B.unsqueeze(1)

    def encode(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, D) and the log-determinant of the map to them, (B,)."""
        last_BCHW, done_BK = self.chain((x_BCHW, x_BCHW.new_zeros(len(x_BCHW), 1)))
        constant = torch.stack([mixing.log_determinant(num_pixels) for mixing, num_pixels in self._mixings]).sum()
        return torch.cat([done_BK[:, 1:], last_BCHW.flatten(1)], dim=1), done_BK[:, 0] + constant

    @torch.no_grad()
    def decode(self, latent_BD: Tensor) -> Tensor:
        """The images (B, C, H, W) that `encode` maps to these latents."""
        num_last = math.prod(self.last_shape)
        done_BK = F.pad(latent_BD[:, :-num_last], (1, 0))
        streams: Streams = (latent_BD[:, -num_last:].view(-1, *self.last_shape), done_BK)
        for operator in reversed(self.chain.operators):
            streams = operator.inverse(streams)
        return streams[0]

    def sample(self, class_B: Tensor, temperature: float = 1.0) -> Tensor:
        """One image of each class asked for, (B, C, H, W)."""
        mean_BD = self.mean_ND[class_B]
        return self.decode(mean_BD + temperature * torch.randn_like(mean_BD))


def generative_loss(
    output_BN: Tensor, target_B: Tensor, reduction: str = "sum", *, num_dimensions: int = 64, class_weight: float = 1.0
) -> Tensor:
    """-log p(x | its class) per dimension, plus `class_weight` times the cross-entropy of Bayes' rule, in nats.

    num_dimensions: values in an image, which scales the first term to be comparable between sizes
    """
    density_B = -output_BN.gather(1, target_B.unsqueeze(1)).squeeze(1) / num_dimensions
    loss_B = density_B + class_weight * F.cross_entropy(output_BN, target_B, reduction="none")
    if reduction == "none":
        return loss_B
    return loss_B.sum() if reduction == "sum" else loss_B.mean()


def glow(
    num_classes: int = 10,
    *,
    image_size: int = 8,
    steps: int = 6,
    levels: int = 2,
    hidden: int = 64,
    in_channels: int = 1,
    bin_width: float = 15.9375 / 95.9,
) -> Glow:
    """A small Glow; the defaults fit `revdist.training.datasets:digits`, whose grey levels are 15.9375 / 95.9 apart."""
    return Glow(
        num_classes,
        image_size=image_size,
        steps=steps,
        levels=levels,
        hidden=hidden,
        in_channels=in_channels,
        bin_width=bin_width,
    )


def _scale_and_shift(change_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    log_scale_BCHW, shift_BCHW = change_BCHW.chunk(2, dim=1)
    return _LIMIT * torch.tanh(log_scale_BCHW / _LIMIT), shift_BCHW


def _counted(done_BK: Tensor, log_scale_BCHW: Tensor, sign: int) -> Tensor:
    total_B1 = sign * log_scale_BCHW.flatten(1).sum(1, keepdim=True)
    return done_BK + F.pad(total_B1.to(done_BK.dtype), (0, done_BK.shape[1] - 1))

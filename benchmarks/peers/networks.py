"""The networks that every library of the comparison runs.

    B batch   C channels of one half   H height   W width

A network is a list of couplings, each a pair of branches (F, G):

    y1 = x1 + F(x2)        y2 = x2 + G(y1)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

Couplings = Sequence[tuple[nn.Module, nn.Module]]
"""Pairs (F, G), in the order of the forward."""


def convolution_branch(channels: int) -> nn.Sequential:
    """BN-ReLU-Conv3x3 twice: (B, C, H, W) -> (B, C, H, W)."""
    layers: list[nn.Module] = []
    for _ in range(2):
        convolution = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        layers += [nn.BatchNorm2d(channels), nn.ReLU(), convolution]
    return nn.Sequential(*layers)


def smooth_branch(channels: int) -> nn.Sequential:
    """Conv3x3-SiLU-Conv3x3: twice differentiable and without state."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1)
    )


def couplings(branch: Callable[[], nn.Module], depth: int, *, dtype: torch.dtype = torch.float32) -> Couplings:
    """As many couplings with branches of one kind; the same ones for the same seed."""
    torch.manual_seed(0)
    return [(branch().to(dtype), branch().to(dtype)) for _ in range(depth)]


def parameters(network: Couplings) -> Iterator[nn.Parameter]:
    """Parameters of all branches, in the order of the forward, whichever library runs them."""
    for f, g in network:
        yield from f.parameters()
        yield from g.parameters()


def relative_error(values: Sequence[Tensor | None], reference: Sequence[Tensor]) -> float:
    """L2 norm of the difference over that of the reference, all tensors taken as one; a missing one counts as zero."""
    difference = sum(
        float((reference_i if value is None else reference_i - value).detach().double().square().sum())
        for value, reference_i in zip(values, reference, strict=True)
    )
    norm = sum(float(tensor.detach().double().square().sum()) for tensor in reference)
    return float((difference / norm) ** 0.5)

"""Small chains for the tests of tests/reversible, and the same computation as plain autograd does it."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from revdist.planning.costs import Mode
from revdist.reversible import AdditiveCoupling, AffineCoupling, Coupling, ReversibleChain

torch.set_num_threads(1)

IMAGES = (3, 3, 8, 8)
"""Shape of a batch for `conv_chain`."""

INVERT = (Mode.INVERT, Mode.RECOMPUTE)
"""Modes for `uniform` that keep as little as an operator can."""


def images() -> Tensor:
    return torch.randn(IMAGES, dtype=torch.float64)


def conv_branch(channels: int, *, dropout: float = 0.0, in_place: bool = True) -> nn.Sequential:
    """BN, ReLU, conv, BN, ReLU, dropout, conv."""
    return nn.Sequential(
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=in_place),
        nn.Dropout(dropout),
        nn.Conv2d(channels, channels, 3, padding=1),
    )


def conv_chain(num_blocks: int = 2, *, dropout: float = 0.0, affine: bool = True) -> ReversibleChain:
    """Stem, couplings, down-sampling, couplings, head, in double precision; for images of 3 channels."""
    elements: dict[str, nn.Module] = {"stem": nn.Conv2d(3, 8, 3, padding=1)}
    elements |= {f"narrow{i}": AdditiveCoupling(*branches(4, dropout)) for i in range(num_blocks)}
    elements["down"] = nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 12, 3, stride=2))
    elements |= {f"wide{i}": AdditiveCoupling(*branches(6, dropout)) for i in range(num_blocks)}
    if affine:
        elements["affine"] = AffineCoupling(nn.Conv2d(6, 12, 1), nn.Conv2d(6, 12, 1))
    elements["head"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))
    return ReversibleChain(elements).double()


def branches(channels: int, dropout: float = 0.0) -> tuple[nn.Module, nn.Module]:
    return conv_branch(channels, dropout=dropout), conv_branch(channels, dropout=dropout)


def linear_chain(num_blocks: int = 3, width: int = 6) -> ReversibleChain:
    """Couplings alone, smooth, in double precision; for batches of `width` features."""
    return ReversibleChain(
        [
            AdditiveCoupling(
                nn.Sequential(nn.Linear(width // 2, 5), nn.Tanh(), nn.Linear(5, width // 2)),
                nn.Sequential(nn.Linear(width // 2, 5), nn.SiLU(), nn.Linear(5, width // 2)),
            )
            for _ in range(num_blocks)
        ]
    ).double()


class Plain(nn.Module):
    """The chain's modules as plain autograd runs them; shares the modules."""

    def __init__(self, chain: ReversibleChain) -> None:
        super().__init__()
        self.elements = nn.ModuleList(chain.children())

    def forward(self, x: Tensor) -> Tensor:
        for element in self.elements:
            x = torch.cat(element(*x.chunk(2, dim=1)), dim=1) if isinstance(element, Coupling) else element(x)
        return x


def uniform(chain: ReversibleChain, *preferred: Mode) -> tuple[Mode, ...]:
    """For each operator the first preferred mode that it offers, else SAVE."""
    return tuple(next((mode for mode in preferred if mode in offered), Mode.SAVE) for offered in chain.options())


def schedules(chain: ReversibleChain, num_random: int = 6, seed: int = 0) -> list[tuple[Mode, ...]]:
    """All SAVE, all INVERT, all RECOMPUTE where possible, and random mixtures."""
    draw = random.Random(seed)
    uniforms = [
        uniform(chain, Mode.SAVE),
        uniform(chain, Mode.INVERT, Mode.RECOMPUTE),
        uniform(chain, Mode.INVERT),
        uniform(chain, Mode.RECOMPUTE),
    ]
    mixtures = [tuple(draw.choice(offered) for offered in chain.options()) for _ in range(num_random)]
    return list(dict.fromkeys(itertools.chain(uniforms, mixtures)))


def step(model: nn.Module, x: Tensor, *, seed: int = 3) -> list[Tensor]:
    """Loss, input gradient and parameter gradients of one step on a copy of the input."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    model.zero_grad()
    loss = model(x).square().sum()
    loss.backward()
    assert x.grad is not None
    return [loss.detach(), x.grad, *gradients(model)]


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]


def assert_close(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-9) -> None:
    """Equal relative to the largest entry of all."""
    scale = max(float(t.abs().max()) for t in expected)
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert float((one - other).abs().max()) <= tolerance * scale


def twins(chain: ReversibleChain) -> tuple[ReversibleChain, Plain]:
    """Two independent copies with equal weights: one to run under a schedule, one to run plainly."""
    return copy.deepcopy(chain), Plain(copy.deepcopy(chain))

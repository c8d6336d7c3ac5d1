"""Chains around each operator, and the comparison of their gradients with plain autograd's."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable

import torch
from torch import Tensor, nn

from revdist.planning.costs import Mode
from revdist.reversible.attention import LocalAttention, LSHAttention
from revdist.reversible.chain import ReversibleChain
from revdist.reversible.couplings import AdditiveCoupling, AffineCoupling
from revdist.reversible.feed_forward import ChunkedFeedForward
from revdist.reversible.inplace_abn import InPlaceABN
from revdist.reversible.invertible_conv import InvertibleConv1x1, InvertibleConv2d
from revdist.reversible.momentum import MomentumBlock
from revdist.reversible.ode import ReversibleODE
from revdist.reversible.replay import inside_operator
from revdist.reversible.squeeze import Squeeze, SqueezeHalves

torch.set_num_threads(1)


class Field(nn.Module):
    """A vector field f(t, z) on images."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, t: float, z: Tensor) -> Tensor:
        return torch.tanh(self.conv(z)) * (1 + t)


def conv(channels: int, out: int = 0) -> nn.Sequential:
    out = out or channels
    return nn.Sequential(nn.Conv2d(channels, out, 3, padding=1), nn.SiLU(), nn.Conv2d(out, out, 3, padding=1))


def normed(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.SiLU())


def dense(width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())


def between(operator: nn.Module, *, after: int = 4) -> ReversibleChain:
    """The operator between couplings on 4 and `after` channels."""
    return ReversibleChain(
        [
            AdditiveCoupling(conv(2), normed(2)),
            operator,
            AdditiveCoupling(normed(after // 2), conv(after // 2)),
        ]
    )


def reformer_block(num_chunks: int = 2, dropout: float = 0.1) -> nn.Module:
    attention = nn.Sequential(nn.LayerNorm(8), LSHAttention(8, 2, chunk_length=4, num_rounds=2), nn.Dropout(dropout))
    feed_forward = nn.Sequential(
        nn.LayerNorm(8),
        LocalAttention(8, 2, chunk_length=8),
        ChunkedFeedForward(8, 16, num_chunks=num_chunks, dropout=dropout),
    )
    return AdditiveCoupling(attention, feed_forward)


def ode(method: str, **settings: object) -> ReversibleChain:
    return ReversibleChain(
        [ReversibleODE(Field(3), 3, method=method, **settings), ReversibleODE(Field(3), 2, t0=1, t1=2)]
    )


def image() -> tuple[Tensor, ...]:
    return (torch.randn(3, 4, 6, 4),)


def images() -> tuple[Tensor, ...]:
    return torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)


def sequences() -> tuple[Tensor, ...]:
    return torch.randn(2, 16, 8), torch.randn(2, 16, 8)


@dataclasses.dataclass(frozen=True)
class Case:
    """A chain and what it takes: one tensor, or a pair."""

    chain: Callable[[], ReversibleChain]
    inputs: Callable[[], tuple[Tensor, ...]] = image
    tolerance_bf16: float = 0.05

    def build(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[ReversibleChain, tuple[Tensor, ...]]:
        torch.manual_seed(seed)
        chain = self.chain().to(dtype)
        return chain, tuple(x.to(dtype) for x in self.inputs())


CASES = {
    "affine": Case(lambda: between(AffineCoupling(conv(2, 4), conv(2, 4)))),
    "momentum": Case(lambda: ReversibleChain([MomentumBlock(normed(3)), MomentumBlock(conv(3), gamma=0.5)]), images),
    "momentum_exact": Case(lambda: ReversibleChain([MomentumBlock(normed(3), grid=2**-12) for _ in range(3)]), images),
    "conv1x1": Case(lambda: between(InvertibleConv1x1(4))),
    "conv_circular": Case(lambda: between(InvertibleConv2d(4, 3))),
    "conv_masked": Case(lambda: between(InvertibleConv2d(4, 3, padding="masked"))),
    "conv_masked_reverse": Case(lambda: between(InvertibleConv2d(4, 5, padding="masked", reverse=True))),
    "inplace_abn": Case(lambda: between(InPlaceABN(4)), tolerance_bf16=0.1),
    "inplace_abn_in_branch": Case(
        lambda: between(AdditiveCoupling(nn.Sequential(conv(2), InPlaceABN(2), conv(2)), conv(2))), tolerance_bf16=0.1
    ),
    "squeeze": Case(lambda: between(Squeeze(), after=16)),
    "squeeze_halves": Case(lambda: between(SqueezeHalves(), after=16)),
    "ode_alf": Case(lambda: ode("alf", damping=0.9), images),
    "ode_mccallum_foster": Case(lambda: ode("mccallum_foster", increment="rk4"), images),
    "reformer": Case(
        lambda: ReversibleChain([reformer_block(), reformer_block(num_chunks=1)]), sequences, tolerance_bf16=0.1
    ),
}


@dataclasses.dataclass(frozen=True)
class Step:
    """What one forward and backward gave."""

    outputs: tuple[Tensor, ...]
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


def step(
    chain: ReversibleChain,
    inputs: tuple[Tensor, ...],
    schedule: tuple[Mode, ...] | None,
    *,
    seed: int = 1,
    autocast: bool = False,
    needs_grad: bool = True,
) -> Step:
    """Run forward and backward under a schedule; None: by plain autograd. Leaves the chain as it was."""
    before = {name: value.clone() for name, value in chain.state_dict().items()}
    torch.manual_seed(seed)
    leaves = tuple(x.detach().clone().requires_grad_(needs_grad) for x in inputs)
    given = leaves[0] if len(leaves) == 1 else leaves
    # A tensor made by the chain's own input: the chain's input is not a leaf in a real network.
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if schedule is None:
            with inside_operator():
                outputs = chain(given)
        else:
            chain.set_schedule(schedule)
            outputs = chain(given)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    generator = torch.Generator().manual_seed(3)
    loss = sum((out * torch.randn(out.shape, generator=generator)).tanh().sum() for out in outputs)
    sources = {name: parameter for name, parameter in chain.named_parameters() if parameter.requires_grad}
    sources |= {f"input{index}": leaf for index, leaf in enumerate(leaves) if needs_grad}
    gradients = torch.autograd.grad(loss, list(sources.values()), allow_unused=True)
    found = {name: g for name, g in zip(sources, gradients, strict=True) if g is not None}
    buffers = {name: value.clone() for name, value in chain.named_buffers()}
    chain.load_state_dict(before)
    return Step(tuple(out.detach() for out in outputs), found, buffers)


def schedules(chain: ReversibleChain, num_mixed: int = 4) -> list[tuple[Mode, ...]]:
    """Every mode on all operators that have it, and some random mixtures."""
    options = chain.options()
    uniform = [tuple(mode if mode in modes else Mode.SAVE for modes in options) for mode in Mode]
    generator = random.Random(0)
    mixed = [tuple(generator.choice(modes) for modes in options) for _ in range(num_mixed)]
    return list(dict.fromkeys(itertools.chain(uniform, mixed)))


def all_invert(chain: ReversibleChain) -> tuple[Mode, ...]:
    return tuple(Mode.INVERT if Mode.INVERT in modes else Mode.RECOMPUTE for modes in chain.options())


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Relative L2 distance over everything together."""
    assert found.keys() == expected.keys()
    difference = sum(float((found[k].double() - expected[k].double()).square().sum()) for k in expected)
    size = sum(float(value.double().square().sum()) for value in expected.values())
    return (difference / size) ** 0.5

"""One network, carried out by each library in the way that its own documentation shows.

Every builder takes the same couplings and returns a module that maps (B, 2C, H, W) to (B, 2C, H, W).
Libraries are imported by the builder that needs them, so one that is not installed costs only its rows.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.peers.networks import Couplings


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One way to run the network."""

    key: str
    label: str
    distribution: str
    """The package whose version belongs to the result."""
    build: Callable[[Couplings], nn.Module]
    careful: Callable[[Couplings], nn.Module] | None = None
    """Built for correctness where that is not the default: what the library offers to replay random numbers."""

    @property
    def version(self) -> str:
        return importlib.metadata.version(self.distribution)

    @property
    def installed(self) -> bool:
        try:
            return bool(self.version)
        except importlib.metadata.PackageNotFoundError:
            return False


class Plain(nn.Module):
    """Ordinary autograd: everything the backward needs is kept."""

    def __init__(self, network: Couplings) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(f, g) for f, g in network)

    def forward(self, x: Tensor) -> Tensor:
        halves = x.chunk(2, dim=1)
        del x  # nobody but autograd keeps the input
        for block in self.blocks:
            halves = self.run(block, *halves)
        return torch.cat(halves, dim=1)

    def run(self, block: nn.Module, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        y: tuple[Tensor, Tensor] = block(x1, x2)
        return y


class Checkpointed(Plain):
    """torch.utils.checkpoint around each coupling, in the mode that PyTorch recommends."""

    def run(self, block: nn.Module, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        y: tuple[Tensor, Tensor] = checkpoint(block, x1, x2, use_reentrant=False)
        return y


class _Block(nn.Module):
    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        self.f, self.g = f, g

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        y1 = x1 + self.f(x2)
        return y1, x2 + self.g(y1)


def memcnn(network: Couplings, *, preserve_rng_state: bool = False) -> nn.Module:
    from memcnn import AdditiveCoupling, InvertibleModuleWrapper

    return nn.Sequential(
        *(InvertibleModuleWrapper(AdditiveCoupling(f, g), preserve_rng_state=preserve_rng_state) for f, g in network)
    )


def revlib(network: Couplings) -> nn.Module:
    from revlib import ReversibleSequential

    return ReversibleSequential(*(branch for pair in network for branch in pair))


def revtorch(network: Couplings, *, fix_random_seed: bool = False) -> nn.Module:
    from revtorch import ReversibleBlock, ReversibleSequence

    blocks = [ReversibleBlock(f, g, fix_random_seed=fix_random_seed) for f, g in network]
    return ReversibleSequence(nn.ModuleList(blocks))


class Reformer(nn.Module):
    """reformer-pytorch's sequence, which splits dimension 2 of (batch, position, width): the channels stand there.

    The position is a dimension of size one, so nothing is copied.
    """

    def __init__(self, network: Couplings) -> None:
        super().__init__()
        from reformer_pytorch.reversible import ReversibleSequence

        pairs = [(_WithoutPosition(f), _WithoutPosition(g)) for f, g in network]
        self.sequence = ReversibleSequence(nn.ModuleList(nn.ModuleList(pair) for pair in pairs))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.sequence(x.unsqueeze(1))
        return y.squeeze(1)


class _WithoutPosition(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.branch(x.squeeze(1))
        return y.unsqueeze(1)


PLAIN = Subject(key="plain", label="plain autograd", distribution="torch", build=Plain)

PEERS = (
    Subject(key="checkpoint", label="torch checkpoint", distribution="torch", build=Checkpointed),
    Subject(
        key="memcnn",
        label="memcnn",
        distribution="memcnn",
        build=memcnn,
        careful=lambda network: memcnn(network, preserve_rng_state=True),
    ),
    Subject(key="revlib", label="RevLib", distribution="revlib", build=revlib),
    Subject(
        key="revtorch",
        label="revtorch",
        distribution="revtorch",
        build=revtorch,
        careful=lambda network: revtorch(network, fix_random_seed=True),
    ),
    Subject(key="reformer", label="reformer-pytorch", distribution="reformer-pytorch", build=Reformer),
)


def revdist(network: Couplings, mode: str) -> nn.Module:
    """A chain with every half coupling in one mode."""
    from revdist.reversible import AdditiveCoupling, ReversibleChain

    chain = ReversibleChain([AdditiveCoupling(f, g) for f, g in network])
    chain.set_schedule([mode] * chain.num_operators)
    return chain


REVDIST = tuple(
    Subject(
        key=f"revdist-{mode.lower()}",
        label=f"revdist, all {mode}",
        distribution="revdist",
        build=functools.partial(revdist, mode=mode),
    )
    for mode in ("INVERT", "SAVE")
)

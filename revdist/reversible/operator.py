"""What a chain plans: operators, and the base class a user extends with `forward` and `inverse`.

The value that flows through a chain is a tuple of streams: one tensor, or the two halves that
couplings work on. An `Operator` maps streams to as many streams. It is a light view on the module
that owns the parameters, so a coupling can offer its two halves as two operators without changing
a name in `state_dict`.
"""

from __future__ import annotations

import abc
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from revdist.planning.costs import Mode
from revdist.reversible.buffers import MutableBuffers
from revdist.reversible.collectives import Communication
from revdist.reversible.trace import Layout

if TYPE_CHECKING:
    from revdist.reversible.replay import Replay

Streams = tuple[Tensor, ...]
"""One tensor, or a pair of halves."""


class Operator(abc.ABC):
    """One planned step of a chain.

    A subclass that offers `Mode.INVERT` implements `inverse`. It may also override `rebuild` where
    its inputs and what its forward saved come out of a single run.
    """

    def __init__(self, name: str, *, num_streams: int, modes: tuple[Mode, ...]) -> None:
        self.name = name
        self.num_streams = num_streams
        """1: takes and returns the joined tensor; 2: the pair of halves."""
        self.modes = modes
        """Modes that the operator can take."""
        self.grid: float | None = None
        """To whose multiples the chain rounds the streams, unless the operator before leaves them there."""
        self.mutable_buffers = MutableBuffers()
        self.communication = Communication()
        self.layouts: dict[Hashable, Layout | None] = {}
        """Where its forwards leave what they save, by the conditions they ran under; None: that cannot be told."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    @property
    @abc.abstractmethod
    def module(self) -> nn.Module:
        """The module that the operator runs, with the parameters and buffers it uses."""

    @abc.abstractmethod
    def forward(self, inputs: Streams) -> Streams:
        """Run once; also called again to replay."""

    def inverse(self, outputs: Streams) -> Streams:
        """The inputs that gave these outputs. Called without gradients, under the forward's conditions."""
        raise NotImplementedError(f"operator {self.name} has no inverse")

    def rebuild(self, outputs: Streams, replay: Replay) -> Streams:
        """The inputs, while `replay` captures what the forward saved.

        This default costs one inverse and one forward.
        """
        with replay.inverting():
            inputs = self.inverse(outputs)
        self.rerun(inputs, replay)
        return inputs

    def rerun(self, inputs: Streams, replay: Replay) -> None:
        """Run the forward again under capture, from its inputs."""
        leaves = tuple(replay.leaf(stream, index) for index, stream in enumerate(inputs))
        with replay.capturing():
            self.forward(leaves)


class Ordinary(Operator):
    """A module that maps one tensor to one tensor and has no inverse."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, num_streams=1, modes=(Mode.SAVE, Mode.RECOMPUTE, Mode.OFFLOAD))
        self._module = module

    @property
    def module(self) -> nn.Module:
        return self._module

    def forward(self, inputs: Streams) -> Streams:
        return (self._module(*inputs),)


class Invertible(Operator):
    """A `ReversibleOperator` planned as a whole."""

    def __init__(self, name: str, module: ReversibleOperator) -> None:
        modes = (Mode.SAVE, Mode.INVERT, Mode.RECOMPUTE, Mode.OFFLOAD)
        super().__init__(name, num_streams=module.num_streams, modes=modes)
        self._module = module

    @property
    def module(self) -> nn.Module:
        return self._module

    def forward(self, inputs: Streams) -> Streams:
        return _as_streams(self._module(*inputs))

    def inverse(self, outputs: Streams) -> Streams:
        return _as_streams(self._module.inverse(*outputs))


class ReversibleOperator(nn.Module, abc.ABC):
    """Base class of reversible modules: extend it with `forward` and `inverse`.

    With `num_streams = 1` (the default) both map one tensor to one tensor; with `num_streams = 2`
    they take two halves and return two. `inverse` must give the input of `forward` back from its
    output, and neither may edit its arguments in place.
    """

    num_streams: ClassVar[int] = 1

    @abc.abstractmethod
    def inverse(self, *outputs: Any) -> Any:
        """The inputs that `forward` maps to these outputs."""

    def operators(self, name: str) -> tuple[Operator, ...]:
        """What a chain plans for this module, in the order of the forward."""
        return (Invertible(name, self),)


def operators_of(name: str, module: nn.Module) -> tuple[Operator, ...]:
    """The operators that one element of a chain contributes."""
    if isinstance(module, ReversibleOperator):
        return module.operators(name)
    return (Ordinary(name, module),)


def _as_streams(value: Any) -> Streams:
    return (value,) if isinstance(value, Tensor) else tuple(value)

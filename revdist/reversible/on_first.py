"""A reversible operator on the first of two streams; the second passes by."""

from __future__ import annotations

from typing import Any, ClassVar, final

from torch import Tensor, nn

from revdist.errors import UsageError
from revdist.reversible.operator import Operator, ReversibleOperator, Streams
from revdist.reversible.replay import Replay


@final
class OnFirst(ReversibleOperator):
    """(x, other) -> (inner(x), other), for chains whose second stream is not a half of the first.

    inner: an operator of one stream; it is planned as it would be alone

    Raises UsageError for an inner operator of two streams.
    """

    num_streams: ClassVar[int] = 2

    def __init__(self, inner: ReversibleOperator) -> None:
        super().__init__()
        if inner.num_streams != 1:
            raise UsageError(f"{type(inner).__name__} takes {inner.num_streams} streams: only one is given to it here")
        self.inner = inner

    def forward(self, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(x), other

    def inverse(self, y: Tensor, other: Tensor) -> tuple[Any, Tensor]:
        return self.inner.inverse(y), other

    def operators(self, name: str) -> tuple[Operator, ...]:
        return tuple(_OnFirst(operator) for operator in self.inner.operators(name))


class _OnFirst(Operator):
    def __init__(self, inner: Operator) -> None:
        super().__init__(inner.name, num_streams=2, modes=inner.modes)
        self._inner = inner

    @property
    def module(self) -> nn.Module:
        return self._inner.module

    def forward(self, inputs: Streams) -> Streams:
        return *self._inner.forward(inputs[:1]), inputs[1]

    def inverse(self, outputs: Streams) -> Streams:
        return *self._inner.inverse(outputs[:1]), outputs[1]

    def rebuild(self, outputs: Streams, replay: Replay) -> Streams:
        return *self._inner.rebuild(outputs[:1], replay), outputs[1]

    def rerun(self, inputs: Streams, replay: Replay) -> None:
        self._inner.rerun(inputs[:1], replay)

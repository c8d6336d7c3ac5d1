"""Operators that need not run again to be inverted: what their forward saved follows from x and y.

Inverting costs one inverse and one forward in general, the forward only for autograd's records of
it. Where those records are x, y and small things, making them anew computes nothing.
"""

from __future__ import annotations

import abc
from typing import cast

from torch import Tensor

from revdist.reversible.operator import Invertible, Operator, ReversibleOperator, Streams
from revdist.reversible.replay import Replay


class RecordedOperator(ReversibleOperator):
    """A reversible module of one tensor that can repeat autograd's records of its forward without its work."""

    @abc.abstractmethod
    def record(self, x: Tensor, y: Tensor) -> Tensor:
        """`forward(x)`, whose result y is known: save the same tensors in the same order, compute nothing large."""

    def operators(self, name: str) -> tuple[Operator, ...]:
        return (_Recorded(name, self),)


class _Recorded(Invertible):
    def rebuild(self, outputs: Streams, replay: Replay) -> Streams:
        with replay.inverting():
            inputs = self.inverse(outputs)
        with replay.capturing():
            cast(RecordedOperator, self.module).record(replay.leaf(inputs[0], 0), outputs[0])
        return inputs

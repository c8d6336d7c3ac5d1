"""One run of an operator again, capturing the tensors that its forward saved."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from revdist.reversible.boundary import laid_out
from revdist.reversible.compiler import never_compiled
from revdist.reversible.conditions import Conditions, Inputs


class _Nesting(threading.local):
    active = False


_nesting = _Nesting()


def is_inside_operator() -> bool:
    """Whether this thread is running an operator of a chain: a chain called now is part of that operator."""
    return _nesting.active


class inside_operator:  # noqa: N801
    """Inside, this thread runs an operator. A class, since every operator of every forward enters it."""

    __slots__ = ("_before",)

    def __enter__(self) -> None:
        self._before, _nesting.active = _nesting.active, True

    def __exit__(self, *_: object) -> None:
        _nesting.active = self._before


class Complete(BaseException):
    """Raised inside an operator when all that was wanted of its run is there; never leaves this package."""


class Replay:
    """What an operator's `rebuild` works with: capture, and leaves that require grad as the inputs did.

    Used inside `Conditions.restored`. Where the inputs are not wanted, the run ends with `Complete` as
    soon as everything is captured, which saves what the operator computes last.

    `captured` holds tensors in the order in which they were saved, each with its version then.
    """

    def __init__(
        self,
        conditions: Conditions,
        inputs: Inputs,
        num_expected: int,
        *,
        inputs_wanted: bool,
    ) -> None:
        self._conditions = conditions
        self._inputs = inputs
        self._num_expected = num_expected
        self._inputs_wanted = inputs_wanted
        self._owned_ids: set[int] = set()
        self.captured: list[tuple[Tensor, int]] = []

    @property
    def complete(self) -> bool:
        """Whether as many tensors have been captured as the forward saved."""
        return len(self.captured) >= self._num_expected

    def leaf(self, stream: Tensor, index: int) -> Tensor:
        """Input number `index` with the type it had, as the start of a graph of its own."""
        requires_grad, dtype, strides = self._inputs[index]
        leaf = stream.detach().to(dtype)
        if leaf.stride() != strides and (self._conditions.drew or self._conditions.is_compiled()):
            leaf = laid_out(leaf, strides)  # numbers are drawn, and code is compiled, for one layout in memory
        return leaf.requires_grad_(requires_grad)

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """Run the forward, or its next part, and keep what it saves."""
        with inside_operator(), self._conditions.another_run() as stand_ins, torch.enable_grad():
            self._owned_ids = self._conditions.owned_ids().union(map(id, stand_ins))
            with saved_tensors_hooks(self._capture, _never), self._conditions.statistics.given(self._capture):
                yield

    @contextlib.contextmanager
    def inverting(self) -> Iterator[None]:
        """Run the inverse: nothing is saved."""
        with inside_operator(), self._conditions.another_run(), torch.no_grad():
            yield

    @never_compiled
    def _capture(self, tensor: Tensor) -> None:
        base = tensor._base
        if id(tensor if base is None else base) not in self._owned_ids:
            self.captured.append((tensor.detach(), tensor._version))
            if not self._inputs_wanted and self.complete:
                raise Complete


def _never(_: Any) -> NoReturn:
    raise AssertionError("a replay's graph is never run backward")

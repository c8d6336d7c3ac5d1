"""One run of an operator again, capturing the tensors that its forward saved."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from revdist.reversible.conditions import Conditions


class _Nesting(threading.local):
    active = False


_nesting = _Nesting()


def is_inside_operator() -> bool:
    """Whether this thread is running an operator of a chain: a chain called now is part of that operator."""
    return _nesting.active


@contextlib.contextmanager
def inside_operator() -> Iterator[None]:
    """Mark that an operator runs."""
    before, _nesting.active = _nesting.active, True
    try:
        yield
    finally:
        _nesting.active = before


def is_owned(tensor: Tensor, buffer_ids: set[int]) -> bool:
    """Whether the tensor is a parameter or buffer or a view of one: it stays whatever the schedule says."""
    base = tensor._base
    if base is None:
        base = tensor
    return isinstance(base, torch.nn.Parameter) or id(base) in buffer_ids


class Replay:
    """What an operator's `rebuild` works with: capture, and leaves that require grad as the inputs did.

    Used inside `Conditions.restored`.

    `captured` holds tensors in the order in which they were saved, each with its version then.
    """

    def __init__(
        self,
        conditions: Conditions,
        inputs: tuple[tuple[bool, torch.dtype], ...],
        num_expected: int,
    ) -> None:
        self._conditions = conditions
        self._inputs = inputs
        self._num_expected = num_expected
        self._buffer_ids: set[int] = set()
        self.captured: list[tuple[Tensor, int]] = []

    @property
    def complete(self) -> bool:
        """Whether as many tensors have been captured as the forward saved."""
        return len(self.captured) >= self._num_expected

    def leaf(self, stream: Tensor, index: int) -> Tensor:
        """Input number `index` with the type it had, as the start of a graph of its own."""
        requires_grad, dtype = self._inputs[index]
        return stream.detach().to(dtype).requires_grad_(requires_grad)

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """Run the forward, or its next part, and keep what it saves."""
        self._conditions.rewind()
        self._buffer_ids = self._conditions.buffer_ids()
        hooks = saved_tensors_hooks(self._capture, _never)
        with inside_operator(), self._conditions.notes.reading(), torch.enable_grad(), hooks:
            yield

    @contextlib.contextmanager
    def inverting(self) -> Iterator[None]:
        """Run the inverse: nothing is saved."""
        self._conditions.rewind()
        with inside_operator(), self._conditions.notes.reading(), torch.no_grad():
            yield

    def _capture(self, tensor: Tensor) -> None:
        if not is_owned(tensor, self._buffer_ids):
            self.captured.append((tensor.detach(), tensor._version))


def _never(_: Any) -> NoReturn:
    raise AssertionError("a replay's graph is never run backward")

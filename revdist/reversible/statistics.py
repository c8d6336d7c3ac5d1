"""Batch statistics are taken in the forward only; a replay normalises with them again.

Batch normalisation spends most of its time on mean and variance (nine tenths of it on a CPU), and those
of a rebuilt input differ from the forward's by rounding. So a replay is given the forward's, which
autograd has saved for the backward anyway: as cheap as evaluation, and to the bit what the forward
computes from that input. They stay in every mode, two numbers a channel.

A batch norm that trains saves its input, running mean, running variance, weight, mean and inverse
standard deviation, one after the other, and by this order the last two are told. Where something else is
saved (compiled, cuDNN, a subclass, no running statistics), or a norm is called twice in one forward,
nothing is given and the replay takes statistics of its own.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _BatchNorm

from revdist.reversible.compiler import never_compiled

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_DTYPES = (torch.float32, torch.float64)
"""Types of statistics in which a weight times an inverse deviation is what the kernel makes of the two."""


class BatchStatistics:
    """What the batch norms of one operator took in one forward."""

    __slots__ = ("_expected", "_found", "_norm", "_norms", "_taken")

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        """`modules`: those that train."""
        self._norms = {id(norm._buffers["running_mean"]): norm for norm in _known(modules)}
        self._taken: dict[_BatchNorm, tuple[Tensor, ...]] = {}
        """Mean and inverse deviation; nothing where a norm was called twice."""
        self._norm: _BatchNorm | None = None
        """The norm whose forward is just saving tensors."""
        self._expected: list[int] = []
        """Identities of the parameters and buffers that it saves next."""
        self._found: list[Tensor] = []

    def notice(self, tensor: Tensor, *, owned: bool) -> None:
        """Told of each tensor that the forward saves, in order; `owned` ones are parameters and buffers."""
        if not self._norms:
            return
        norm = self._norms.get(id(tensor)) if owned else None
        if norm is not None:
            self._norm, self._found = norm, []
            self._expected = [id(other) for other in (norm.running_var, norm.weight) if other is not None]
        elif self._norm is not None and not self._goes_on(self._norm, tensor, owned=owned):
            self._norm = None

    def interrupted(self) -> None:
        """Told instead of a tensor that is there no more."""
        self._norm = None

    def _goes_on(self, norm: _BatchNorm, tensor: Tensor, *, owned: bool) -> bool:
        """Whether more of the norm's forward is to come."""
        if self._expected:
            return owned and self._expected.pop(0) == id(tensor)
        if owned or tensor.shape != (norm.num_features,):
            return False
        self._found.append(tensor.detach())
        if len(self._found) < 2:
            return True
        self._taken[norm] = () if norm in self._taken else tuple(self._found)
        return False

    def tensors(self) -> Iterator[Tensor]:
        """What is kept."""
        for found in self._taken.values():
            yield from found

    @property
    def norms(self) -> list[_BatchNorm]:
        """The norms that are given statistics in a replay, so that they update none."""
        return [norm for norm, found in self._taken.items() if found]

    @contextlib.contextmanager
    def given(self, save: Callable[[Tensor], None]) -> Iterator[None]:
        """Inside, the operator's forward runs again: `save` is called with what its batch norms save."""
        norms = self.norms
        for norm in norms:
            mean, inverse_deviation = self._taken[norm]
            norm.__dict__["forward"] = functools.partial(_normalised, norm, mean, inverse_deviation, save)
        try:
            yield
        finally:
            for norm in norms:
                del norm.__dict__["forward"]


def _known(modules: Iterable[nn.Module]) -> Iterator[_BatchNorm]:
    """The batch norms among modules that train whose forward is the one described above.

    Looks into their dictionaries, for every operator of every forward asks and attributes of modules are slow.
    """
    for module in modules:
        if type(module) in _NORMS and "forward" not in module.__dict__:
            mean = module._buffers.get("running_mean")
            if mean is not None and mean.is_cpu and mean.dtype in _DTYPES and "weight" in module._parameters:
                yield cast(_BatchNorm, module)


@never_compiled
def _normalised(
    norm: _BatchNorm, mean: Tensor, inverse_deviation: Tensor, save: Callable[[Tensor], None], x: Tensor
) -> Tensor:
    """The norm's forward with statistics that are known; saves what the norm's own would."""
    if not _is_dense(x):  # another kernel, which multiplies in another order
        return _BatchNorm.forward(norm, x)
    with saved_tensors_hooks(_not_saved, _never_needed):
        # With a variance of one the scale is the forward's to the bit; a variance made from its root is not.
        one = torch.ones_like(inverse_deviation)
        scale = inverse_deviation if norm.weight is None else inverse_deviation * norm.weight
        y = F.batch_norm(x, mean, one, scale, norm.bias, training=False, eps=0.0)
    if y.requires_grad:
        for tensor in (x, mean, inverse_deviation):
            save(tensor)
    return y


def _is_dense(x: Tensor) -> bool:
    if x.is_contiguous():
        return True
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)


def _not_saved(_: Tensor) -> None:
    """Nothing is kept of a graph that is never run backward."""


def _never_needed(_: None) -> NoReturn:
    raise AssertionError("a replay's graph is never run backward")

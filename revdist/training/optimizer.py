"""The optimizer of a run, its learning rate over time, and the memory its state will take."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from revdist.config import OptimizerConfig
from revdist.devices.device import MemoryMeter
from revdist.errors import CheckpointError, FactoryError
from revdist.training.factories import call_factory

_NO_REHEARSAL = (RuntimeError, NotImplementedError, TypeError, ValueError, AssertionError)
"""What an optimizer raises that needs more than gradients to step, or another device (`capturable` asserts it)."""
_WIDE = {bool: torch.bool, int: torch.int64, float: torch.float64}
_NOT_COUNTED = ("params", "lr", "initial_lr")
"""Entries of parameter groups that come from the model, the configuration and the step."""
_FIRST_GROUPS: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[dict[str, Any]]] = weakref.WeakKeyDictionary()
"""The other entries as optimizers were built with them."""
_PIECE = 2**16
"""Elements of a parameter that stand for all of it."""


def build_optimizer(config: OptimizerConfig, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """Call the optimizer's factory with the parameters to train.

    Raises FactoryError when it cannot be imported, rejects its kwargs, or gives no optimizer.
    """
    optimizer = call_factory(config.factory, config.kwargs, parameters)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise FactoryError(f"{config.factory} gave a {type(optimizer).__name__}, not a torch.optim.Optimizer")
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    _FIRST_GROUPS[optimizer] = [dict(group) for group in optimizer.param_groups]
    return optimizer


def counted_in_groups(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], Tensor]:
    """What an optimizer changes in its parameter groups as it steps, by group and key: apex counts steps there.

    Numbers and tensors that are not those it was built with; the learning rate is a function of the step.
    """
    first = _FIRST_GROUPS.get(optimizer, optimizer.param_groups)
    return {
        (index, key): value if isinstance(value, Tensor) else torch.tensor(value, dtype=_WIDE[type(value)])
        for index, (group, before) in enumerate(zip(optimizer.param_groups, first, strict=False))
        for key, value in group.items()
        if key not in _NOT_COUNTED and _is_count(value) and not (key in before and _is_same(before[key], value))
    }


def count_in_group(optimizer: torch.optim.Optimizer, index: int, key: str, value: Tensor) -> None:
    """Put back what `counted_in_groups` found."""
    if index >= len(optimizer.param_groups):
        raise CheckpointError(
            f"the checkpoint has {key!r} of parameter group {index}, and the optimizer has "
            f"{len(optimizer.param_groups)}: it is of another optimizer"
        )
    group = optimizer.param_groups[index]
    is_tensor = isinstance(group.get(key), Tensor)
    group[key] = value.to(group[key].device, copy=True) if is_tensor else value.item()


def _is_count(value: object) -> bool:
    return type(value) in _WIDE or (isinstance(value, Tensor) and value.dim() == 0)


def _is_same(before: object, value: object) -> bool:
    return type(before) is type(value) and bool(before == value)


def learning_rate_factor(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Factor on the configured learning rate at a step: linear warm-up, then the schedule down to zero.

    A function of the step alone, so that a resumed run needs no state for it.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    return (1 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else 1 - progress


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Scale the learning rate that each parameter group started with."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer state that exists."""
    return _tensor_bytes(value for state in optimizer.state.values() for value in state.values())


def coming_state_bytes(config: OptimizerConfig, parameters: Sequence[nn.Parameter]) -> int:
    """Bytes of optimizer state that the first step will create, counted before it exists.

    Runs one step of the same optimizer on copies of the parameters that have shapes and no memory; where
    it cannot step on those, on real ones, a shape at a time. One that cannot step like this at all is
    taken to keep two tensors per parameter, as Adam does.
    """
    shapes = [nn.Parameter(torch.empty_like(parameter, device="meta")) for parameter in parameters]
    try:
        return state_bytes(_rehearse(config, shapes))
    except _NO_REHEARSAL:
        pass
    try:
        return sum(_state_of_shape(config, parameter) * count for parameter, count in _by_shape(parameters))
    except _NO_REHEARSAL:
        return 2 * _tensor_bytes(parameters)


def step_peak_bytes(config: OptimizerConfig, parameters: Sequence[nn.Parameter], meter: MemoryMeter) -> int:
    """Most bytes the optimizer needs on top of its state while it steps.

    Measured on two and on three copies of a piece of the largest parameter. A loop over parameters needs as
    much for three as for two: temporaries of one parameter, beside what is left of the one before. A fused
    loop over all of them (`foreach`, the default on CUDA) needs more with each.
    """
    sizes = [_tensor_bytes([parameter]) for parameter in parameters]
    largest = max(parameters, key=lambda parameter: _tensor_bytes([parameter]))
    piece = _piece(largest)
    scale = max(sizes) / _tensor_bytes([piece])
    if not meter.exact:
        return 2 * sum(sizes)
    try:
        two, three = (_transient_bytes(config, [piece] * count, meter) * scale for count in (2, 3))
    except _NO_REHEARSAL:
        return 2 * sum(sizes)
    others = max(0.0, sum(sizes) / max(sizes) - 2)
    return math.ceil(two + max(0.0, three - two) * others)


def _rehearse(config: OptimizerConfig, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer after one step on these parameters, whose gradients are made for it."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = build_optimizer(config, parameters)
    optimizer.step()
    return optimizer


def _state_of_shape(config: OptimizerConfig, parameter: nn.Parameter) -> int:
    return state_bytes(_rehearse(config, [nn.Parameter(torch.zeros_like(parameter))]))


def _by_shape(parameters: Sequence[nn.Parameter]) -> Iterable[tuple[nn.Parameter, int]]:
    """One parameter of each kind, and how many there are."""
    kinds: dict[object, list[nn.Parameter]] = {}
    for parameter in parameters:
        kinds.setdefault((parameter.shape, parameter.dtype, parameter.device), []).append(parameter)
    return [(same[0], len(same)) for same in kinds.values()]


def _piece(parameter: nn.Parameter) -> Tensor:
    """The first rows of a parameter: about `_PIECE` elements, so that measuring takes little memory."""
    if parameter.dim() == 0:
        return parameter.detach()
    rows = max(1, _PIECE * len(parameter) // max(1, parameter.numel()))
    return parameter.detach()[:rows]


def _transient_bytes(config: OptimizerConfig, pieces: Sequence[Tensor], meter: MemoryMeter) -> int:
    """Peak of a step above what is there between steps."""
    optimizer = _rehearse(config, [nn.Parameter(torch.zeros_like(piece)) for piece in pieces])
    before_bytes = meter.allocated_bytes()
    meter.reset_peak()
    optimizer.step()
    return meter.peak_bytes() - before_bytes


def _tensor_bytes(values: Iterable[object]) -> int:
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))

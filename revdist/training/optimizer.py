"""The optimizer of a run, its learning rate over time, and the memory its state will take."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from revdist.config import OptimizerConfig
from revdist.errors import FactoryError
from revdist.training.factories import call_factory


def build_optimizer(config: OptimizerConfig, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """Call the optimizer's factory with the parameters to train.

    Raises FactoryError when it cannot be imported, rejects its kwargs, or gives no optimizer.
    """
    optimizer = call_factory(config.factory, config.kwargs, parameters)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise FactoryError(f"{config.factory} gave a {type(optimizer).__name__}, not a torch.optim.Optimizer")
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


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

    Runs one step of the same optimizer on copies of the parameters that have shapes and no memory.
    An optimizer that cannot step on those is taken to keep two tensors per parameter, as Adam does.
    """
    shapes = [nn.Parameter(torch.empty_like(parameter, device="meta")) for parameter in parameters]
    for shape in shapes:
        shape.grad = torch.empty_like(shape)
    rehearsal = build_optimizer(config, shapes)
    try:
        rehearsal.step()
    except (RuntimeError, NotImplementedError, TypeError):
        return 2 * _tensor_bytes(parameters)
    return state_bytes(rehearsal)


def step_peak_bytes(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> int:
    """Most bytes the optimizer needs on top of its state while it steps.

    A loop over parameters works on two temporaries of one parameter; a fused loop over all of them
    (`foreach`, the default on CUDA) on one temporary of each.
    """
    sizes = [parameter.numel() * parameter.element_size() for parameter in parameters]
    foreach = optimizer.defaults.get("foreach")
    if foreach or (foreach is None and any(parameter.is_cuda for parameter in parameters)):
        return sum(sizes)
    return 2 * max(sizes, default=0)


def _tensor_bytes(values: Iterable[object]) -> int:
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))

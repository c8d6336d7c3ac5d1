"""Leaving a model exactly as it was, whatever is measured on it in between."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from revdist.reversible.buffers import filled_slots, put_back
from revdist.reversible.chain import ReversibleChain
from revdist.reversible.host_copy import HostCopy


@contextlib.contextmanager
def preserved(model: nn.Module, chain: ReversibleChain) -> Iterator[None]:
    """Inside, steps may be run: every parameter that trains has a gradient allocated, as while training.

    Hooks that wait for accumulated gradients are not called: some step an optimizer, and free the gradient.
    Afterwards gradients, buffers, random state, training flags, schedule and observer are what they
    were. What has to be remembered of them is kept in host memory.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(chain.observe, chain.observer)
        stack.callback(chain.set_schedule, chain.schedule)
        flags = [(module, module.training) for module in model.modules()]
        stack.callback(_set_flags, flags)
        devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
        stack.enter_context(torch.random.fork_rng(devices))
        stack.callback(put_back, filled_slots(model))
        for buffer in model.buffers():
            stack.callback(_write, HostCopy(buffer), buffer)
        for parameter in model.parameters():
            if hooks := parameter._post_accumulate_grad_hooks:
                stack.callback(hooks.update, dict(hooks))
                hooks.clear()
            _allocate_gradient(parameter, stack)
        yield


def _allocate_gradient(parameter: nn.Parameter, stack: contextlib.ExitStack) -> None:
    gradient = parameter.grad
    stack.callback(setattr, parameter, "grad", gradient)
    if gradient is not None:
        stack.callback(_write, HostCopy(gradient), gradient)
    elif parameter.requires_grad:
        parameter.grad = torch.zeros_like(parameter)


def _write(copy: HostCopy, tensor: Tensor) -> None:
    copy.write_to(tensor)


def _set_flags(flags: list[tuple[nn.Module, bool]]) -> None:
    for module, training in flags:
        module.training = training

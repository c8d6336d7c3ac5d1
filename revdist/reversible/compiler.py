"""What torch.compile is to leave alone, and what went through it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import nn
from torch._C._dynamo.eval_frame import _FrameAction, set_code_exec_strategy
from torch._C._dynamo.eval_frame import _FrameExecStrategy as FrameExecStrategy
from torch._dynamo.eval_frame import OptimizedModule

Function = TypeVar("Function", bound=Callable[..., Any])

_SKIP = FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)


def never_compiled(function: Function) -> Function:
    """Keeps the compiler off: it looks at every frame that runs within a compiled branch, also at those of revdist."""
    set_code_exec_strategy(function.__code__, _SKIP)
    return function


def is_compiled(modules: Iterable[nn.Module]) -> bool:
    """Whether one of these modules went through torch.compile."""
    return any(isinstance(module, OptimizedModule) or module._compiled_call_impl is not None for module in modules)

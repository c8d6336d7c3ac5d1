"""Collectives inside an operator run in its forward only; a replay gets their results again.

SyncBatchNorm, a gathered contrastive loss or a mixture of experts talks to other ranks in the middle
of a branch. Ranks have schedules of their own, so a replay that talked again would wait for ranks that
do not replay. The results of the forward are kept (they are small: statistics) and given back.

Collectives are seen where torch dispatches them, whoever calls them. Looking costs some microseconds an
operation, so only operators are watched that called one in their first forward in a process group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from revdist.errors import ReplayDiverged

_IN_PLACE = "c10d"
_FUNCTIONAL = ("_c10d_functional", "_c10d_functional_autograd")
_LOCAL = ("wait_tensor", "_wrap_tensor_autograd")


class Communication:
    """Whether one operator's forward calls collectives, in training and in evaluation."""

    def __init__(self) -> None:
        self._communicates: dict[bool, bool] = {}

    def watch(self, *, training: bool) -> Collectives | None:
        """What to run the next forward under; None where it is known to call none."""
        if not dist.is_available() or not dist.is_initialized() or self._communicates.get(training) is False:
            return None
        return Collectives()

    def learn(self, collectives: Collectives | None, *, training: bool) -> None:
        """Note what a forward that has ended called."""
        if collectives is not None:
            self._communicates[training] = collectives.num_calls > 0


class Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The collectives of one forward. Entered for it, it keeps their results; after `rewind`, it gives them back."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept: list[tuple[Any, list[Tensor]]] = []
        self._position: int | None = None

    @property
    def num_calls(self) -> int:
        return len(self._kept)

    def rewind(self) -> None:
        """From now on repeat the results, from the first on."""
        self._position = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        functional = func.namespace in _FUNCTIONAL
        if not (functional or func.namespace == _IN_PLACE) or func._opname in _LOCAL:
            return func(*args, **kwargs)
        if self._position is None:
            result = func(*args, **kwargs)
            self._kept.append((func, _finished(result, functional=functional)))
            return result
        kept = self._next(func)
        return _fresh(kept) if functional else _overwritten(args, kept)

    def _next(self, func: Any) -> list[Tensor]:
        assert self._position is not None
        if self._position == len(self._kept) or self._kept[self._position][0] is not func:
            raise ReplayDiverged(
                f"an operator calls {func} when run again, but its forward did not: it must call the same collectives "
                "each time"
            )
        self._position += 1
        return self._kept[self._position - 1][1]


def _finished(result: Any, *, functional: bool) -> list[Tensor]:
    """Copies of a collective's results, waited for."""
    leaves, _ = tree_flatten(result)
    if functional:
        return [torch.ops._c10d_functional.wait_tensor(leaf).clone() for leaf in leaves]
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            dist.Work.unbox(leaf).wait()
    return [leaf.clone() for leaf in leaves if isinstance(leaf, Tensor)]


def _fresh(kept: list[Tensor]) -> Any:
    copies = [tensor.clone() for tensor in kept]
    return copies[0] if len(copies) == 1 else copies


def _overwritten(args: tuple[Any, ...], kept: list[Tensor]) -> Any:
    """What an in-place collective returns: its outputs, which are its first argument, and work that is done."""
    work = torch._C._distributed_c10d.FakeWork().boxed()
    if not kept:
        return work  # a barrier, or a send
    outputs, _ = tree_flatten(args[0])
    for output, value in zip(outputs, kept, strict=True):
        output.copy_(value)
    return args[0], work

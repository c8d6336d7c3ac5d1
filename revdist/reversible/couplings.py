"""Couplings: blocks that change one half of their input by a function of the other half.

    y1 = combine(x1, f(x2))        y2 = combine(x2, g(y1))

Gomez, Ren, Urtasun, Grosse, "The Reversible Residual Network", NeurIPS 2017 (additive); Dinh,
Sohl-Dickstein, Bengio, "Density estimation using Real NVP", ICLR 2017 (affine). A coupling is
planned as two operators, F and G decided separately. Inverting one of them runs its branch once:
the run that captures what the forward saved also yields the change to take back.

What it does not do well: the inverse is exact only up to rounding, and with narrow types the error
grows with depth (about 1e-6 relative in fp32 at depth 50, several percent in bf16). An additive
coupling on a `grid` is exact: see `grid`.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from revdist.planning.costs import Mode
from revdist.reversible.grid import add, check_grid, on_grid, subtract
from revdist.reversible.operator import Operator, ReversibleOperator, Streams
from revdist.reversible.replay import Replay


class Half(Operator):
    """Half a coupling: `streams[changed] = combine(streams[changed], branch(the other stream))`."""

    def __init__(
        self,
        name: str,
        coupling: nn.Module,
        branch: str,
        *,
        changed: int,
        combine: Callable[[Tensor, Any], Tensor],
        uncombine: Callable[[Tensor, Any], Tensor],
        grid: float | None = None,
    ) -> None:
        super().__init__(f"{name}.{branch}", num_streams=2, modes=(Mode.SAVE, Mode.INVERT, Mode.OFFLOAD))
        self.grid = grid
        self._coupling = coupling
        self._branch = branch
        self._changed = changed
        self._combine = combine
        self._uncombine = uncombine

    @property
    def module(self) -> nn.Module:
        """The branch, looked up at every run so that a replaced one is noticed."""
        branch = self._coupling._modules[self._branch]  # an attribute of a module takes ten times as long
        assert branch is not None
        return branch

    def forward(self, inputs: Streams) -> Streams:
        kept = inputs[1 - self._changed]
        return self._pair(self._combine(inputs[self._changed], self.module(kept)), kept)

    def inverse(self, outputs: Streams) -> Streams:
        kept = self._as_in_forward(outputs[1 - self._changed])
        return self._pair(self._uncombine(outputs[self._changed], self.module(kept)), kept)

    def rebuild(self, outputs: Streams, replay: Replay) -> Streams:
        kept = self._as_in_forward(outputs[1 - self._changed])
        with replay.capturing():
            change = self.module(replay.leaf(kept, 1 - self._changed))
        with torch.no_grad():
            stream = self._uncombine(outputs[self._changed], change)
        if not replay.complete:  # combine saves something too: affine does, additive does not
            with replay.capturing():
                self._combine(replay.leaf(stream, self._changed), change)
        return self._pair(stream, kept)

    def _as_in_forward(self, kept: Tensor) -> Tensor:
        """With a grid a dense tensor: kernels, and so their rounding, depend on the layout.

        The end of a run gives halves that are parts of the joined tensor; in the forward none was.
        """
        return kept if self.grid is None or kept.is_contiguous() else kept.clone()

    def _pair(self, changed: Tensor, kept: Tensor) -> Streams:
        return (changed, kept) if self._changed == 0 else (kept, changed)


class Coupling(ReversibleOperator):
    """Two branches, each changing one half of the input by a function of the other.

    `f` maps the second half to the change of the first, `g` the new first half to the change of the
    second. A subclass says how a change is combined with a half and taken back.
    """

    num_streams: ClassVar[int] = 2
    branch_names: ClassVar[tuple[str, str]] = ("f", "g")
    """Under which names the branches are registered."""
    grid: float | None = None
    """To whose multiples halves and changes are rounded, if to any."""
    f: nn.Module
    g: nn.Module

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        for name, branch in zip(self.branch_names, (f, g), strict=True):
            self.add_module(name, branch)

    @abc.abstractmethod
    def combine(self, stream: Tensor, change: Any) -> Tensor:
        """The half after the change; `change` is what the branch returned."""

    @abc.abstractmethod
    def uncombine(self, stream: Tensor, change: Any) -> Tensor:
        """The half before `combine` changed it."""

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        f, g = self._branches()
        y1 = self.combine(x1, f(x2))
        return y1, self.combine(x2, g(y1))

    def inverse(self, y1: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
        f, g = self._branches()
        x2 = self.uncombine(y2, g(y1))
        return self.uncombine(y1, f(x2)), x2

    def operators(self, name: str) -> tuple[Operator, ...]:
        return tuple(
            Half(name, self, branch, changed=changed, combine=self.combine, uncombine=self.uncombine, grid=self.grid)
            for changed, branch in enumerate(self.branch_names)
        )

    def _branches(self) -> tuple[nn.Module, nn.Module]:
        f, g = (getattr(self, name) for name in self.branch_names)
        return f, g


class AdditiveCoupling(Coupling):
    """y1 = x1 + f(x2), y2 = x2 + g(y1).

    grid: none, or a power of two below one to whose multiples the branches' outputs are rounded, and the
      halves where they enter a run of such couplings. Then the inverse is exact, and every schedule
      gives the same gradients to the bit, as long as the halves stay below `grid.exact_below` (2048 for
      2^-12 in fp32) and the branches repeat themselves to the bit. Gradients pass the rounding as if
      it were not there. Beyond that range the inverse is off by rounding, as without a grid.

    Raises UsageError for a grid that is no such power.
    """

    def __init__(self, f: nn.Module, g: nn.Module, *, grid: float | None = None) -> None:
        super().__init__(f, g)
        if grid is not None:
            check_grid(grid)
        self.grid = grid

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        if self.grid is not None:
            x1, x2 = on_grid(x1, self.grid), on_grid(x2, self.grid)
        return super().forward(x1, x2)

    def combine(self, stream: Tensor, change: Tensor) -> Tensor:
        return stream + change if self.grid is None else add(stream, change, self.grid)

    def uncombine(self, stream: Tensor, change: Tensor) -> Tensor:
        return stream - change if self.grid is None else subtract(stream, change, self.grid)

    def extra_repr(self) -> str:
        return "" if self.grid is None else f"grid={self.grid:g}"


class AffineCoupling(Coupling):
    """y1 = x1 * exp(s) + t with (s, t) = f(x2), and y2 likewise with g(y1).

    Each branch returns twice the channels of its input along `dim`, first s, then t. s is squashed to
    (-limit, limit) by a tanh so that neither direction overflows.
    """

    def __init__(self, f: nn.Module, g: nn.Module, *, dim: int = 1, limit: float = 2.0) -> None:
        super().__init__(f, g)
        self.dim = dim
        self.limit = limit

    def combine(self, stream: Tensor, change: Tensor) -> Tensor:
        log_scale, shift = self._split(change)
        return stream * torch.exp(log_scale) + shift

    def uncombine(self, stream: Tensor, change: Tensor) -> Tensor:
        log_scale, shift = self._split(change)
        return (stream - shift) * torch.exp(-log_scale)

    def _split(self, change: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = change.chunk(2, dim=self.dim)
        return self.limit * torch.tanh(log_scale / self.limit), shift

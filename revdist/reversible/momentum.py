"""The momentum block: a residual network whose steps remember a velocity, and so run backward.

    x position   v velocity   f the residual function   gamma the momentum

Source: Sander, Ablin, Blondel, Peyre, "Momentum Residual Neural Networks", ICML 2021:

    v' = gamma v + (1 - gamma) f(x)        x' = x + v'

which inverts as x = x' - v', v = (v' - (1 - gamma) f(x)) / gamma. Any residual block becomes
reversible so, at full width and with the same parameters. Inverting runs f once.

Pitfall, the information buffer (Maclaurin, Duvenaud, Adams, "Gradient-based Hyperparameter
Optimization through Reversible Learning", ICML 2015): multiplying by gamma < 1 pushes
log2(1 / gamma) bits of v off its end at every step, and dividing brings back rounding noise in
their place. Errors of v grow by 1 / gamma per inverted step, by gamma^-L over L of them: 190-fold
at gamma = 0.9 and L = 50 (harmless in fp32), 10^15-fold at 0.5 and 50 (everything is lost). So

- leave gamma at 0.9 or above, or let the planner cut runs of INVERT (`max_reconstruction_error`);
- or ask for `grid`, say 2^-12, and the lost bits are kept: x and v live on multiples of `grid`, v
  is divided as a whole number, v / grid = q d + r with gamma = n / d, and the remainder r is noted, a
  byte per element in every mode. A rebuilt pair then equals the forward's to the bit, as long as
  |x| and |v| stay below 2^23 grid in fp32 (2048 for 2^-12) and f repeats itself to the bit.

gamma = 0 would be an ordinary residual network, which cannot be inverted.
"""

from __future__ import annotations

from fractions import Fraction
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from revdist.errors import NotInvertible, UsageError
from revdist.planning.costs import Mode
from revdist.reversible.grid import Pass, check_grid, on_grid, rounded, whole
from revdist.reversible.notes import noted
from revdist.reversible.operator import Operator, ReversibleOperator, Streams
from revdist.reversible.replay import Replay, is_inside_operator

_MAX_DENOMINATOR = 256
"""Remainders fit a byte."""


@final
class MomentumBlock(ReversibleOperator):
    """(x, v) -> (x', v'), two tensors of one shape that f maps to itself.

    gamma: 0 < gamma <= 1; with `grid`, the nearest fraction with a denominator up to 256
    grid: none, or a power of two to whose multiples x and v are rounded, which makes the inverse
      exact. Gradients pass the rounding as if it were not there.

    Outside a chain, the exact inverse undoes the latest forward. Raises UsageError for a gamma or
    grid that cannot be.
    """

    num_streams: ClassVar[int] = 2

    def __init__(self, f: nn.Module, *, gamma: float = 0.9, grid: float | None = None) -> None:
        super().__init__()
        if not 0 < gamma <= 1:
            raise UsageError(f"gamma {gamma} must lie in (0, 1]: at 0 nothing of the velocity is left to invert from")
        self.f = f
        self.grid = grid
        self.ratio: Fraction | None = None
        if grid is not None:
            check_grid(grid)
            self.ratio = Fraction(gamma).limit_denominator(_MAX_DENOMINATOR)
            gamma = float(self.ratio)
            if gamma == 0:
                raise UsageError(f"gamma is nearest to 0 among fractions up to 1/{_MAX_DENOMINATOR}: raise it")
        self.gamma = gamma
        self._latest: Tensor | None = None

    def forward(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.grid is None:
            v = torch.add(v * self.gamma, self.f(x), alpha=1 - self.gamma)
        else:
            x = on_grid(x, self.grid)
            v = self._exact(v, self.f(x).to(v.dtype))
        return x + v, v

    def inverse(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        x = x - v
        return x, self.velocity(v, self.f(x))

    def velocity(self, v: Tensor, change: Tensor) -> Tensor:
        """The velocity before the step, from the one after it and f(x)."""
        if self.grid is None or self.ratio is None:
            return torch.sub(v, change, alpha=1 - self.gamma) / self.gamma
        remainder = noted(self, self._latest_remainder)
        kept = whole(v - rounded(change.to(v.dtype) * (1 - self.gamma), self.grid), self.grid)
        quotient = kept.div_(self.ratio.numerator, rounding_mode="floor")
        return quotient.mul_(self.ratio.denominator).add_(remainder).mul_(self.grid).to(v.dtype)

    def _exact(self, v: Tensor, change: Tensor) -> Tensor:
        assert self.grid is not None
        assert self.ratio is not None
        with torch.no_grad():
            steps = whole(v, self.grid)
            denominator = self.ratio.denominator
            remainder = noted(self, lambda: steps.remainder(denominator).to(torch.uint8))
            self._latest = None if is_inside_operator() else remainder  # a chain keeps its own, for as long as needed
            kept = steps.div_(denominator, rounding_mode="floor").mul_(self.ratio.numerator).mul_(self.grid)
            after = kept.to(v.dtype) + rounded(change * (1 - self.gamma), self.grid)
        passed: Tensor = Pass.apply(after, (self.gamma, 1 - self.gamma), v, change)  # type: ignore[no-untyped-call]
        return passed

    def _latest_remainder(self) -> Tensor:
        if self._latest is None:
            raise NotInvertible("an exact MomentumBlock inverts with the remainders of a forward; there has been none")
        return self._latest

    def operators(self, name: str) -> tuple[Operator, ...]:
        return (_Step(name, self),)

    def extra_repr(self) -> str:
        return f"gamma={self.gamma:g}" + ("" if self.grid is None else f", grid={self.grid:g}")


class _Step(Operator):
    """A momentum block in a chain: one run of f yields both what it saved and the velocity before it."""

    def __init__(self, name: str, block: MomentumBlock) -> None:
        super().__init__(name, num_streams=2, modes=(Mode.SAVE, Mode.INVERT, Mode.OFFLOAD))
        self.grid = block.grid
        self._block = block

    @property
    def module(self) -> nn.Module:
        return self._block

    def forward(self, inputs: Streams) -> Streams:
        return self._block(*inputs)  # type: ignore[no-any-return]

    def inverse(self, outputs: Streams) -> Streams:
        return self._block.inverse(*outputs)

    def rebuild(self, outputs: Streams, replay: Replay) -> Streams:
        x, v = outputs
        x = (x - v).detach()
        with replay.capturing():
            change = self._block.f(replay.leaf(x, 0))
        with replay.inverting():
            return x, self._block.velocity(v, change)

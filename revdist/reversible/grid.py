"""Numbers on a grid: additions that round nothing away, so that subtractions give the terms back.

Multiples of a power of two are added and subtracted exactly as long as the results stay below
2^p grid, p the bits of the significand: 2^24 grid in fp32, of which half is left as a margin. So a
stream that enters on the grid, and is changed by multiples of it alone, can be taken back to the
bit. Gradients pass the rounding as if it were not there (straight through).
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from revdist.errors import UsageError


def check_grid(grid: float) -> None:
    """Raises UsageError where a grid is not a power of two below one."""
    if not 0 < grid < 1 or Fraction(grid).numerator != 1:  # the denominator of a float is a power of two
        raise UsageError(f"grid {grid} must be a power of two below one, such as 2 ** -12")


def exact_below(grid: float, dtype: torch.dtype) -> float:
    """The magnitude below which additions on the grid are exact: 2^23 grid for torch.float32."""
    return grid / torch.finfo(dtype).eps


def rounded(x: Tensor, grid: float) -> Tensor:
    """The nearest multiple of the grid. Scaling by a power of two is exact."""
    return (x.detach() / grid).round_().mul_(grid)


def whole(x: Tensor, grid: float) -> Tensor:
    """How many grid steps, in double precision: exact as far as `exact_below`, and what is not finite stays so."""
    return (x.double() / grid).round_()


def on_grid(x: Tensor, grid: float) -> Tensor:
    """A stream where it enters: rounded, and in fp32 where autocast has narrowed it.

    Raises UsageError for a narrow type without autocast, whose significand is too short for a grid.
    """
    if torch.finfo(x.dtype).bits < 32:
        if not torch.is_autocast_enabled(x.device.type):
            raise UsageError(
                f"a stream of {x.dtype} is exact below {exact_below(grid, x.dtype):g} only on the grid {grid:g}: "
                "keep the model in float32 and use autocast"
            )
        x = x.float()
    passed: Tensor = Pass.apply(rounded(x, grid), (1.0,), x)  # type: ignore[no-untyped-call]
    return passed


def add(stream: Tensor, change: Tensor, grid: float) -> Tensor:
    """stream + change, the change rounded to the grid on which the stream is."""
    total = _rounded_change(stream, change, grid).add_(stream.detach())
    passed: Tensor = Pass.apply(total, (1.0, 1.0), stream, change)  # type: ignore[no-untyped-call]
    return passed


def subtract(stream: Tensor, change: Tensor, grid: float) -> Tensor:
    """What `add` made the stream from. Not differentiable."""
    return stream.detach() - _rounded_change(stream, change, grid)


def _rounded_change(stream: Tensor, change: Tensor, grid: float) -> Tensor:
    return rounded(change.detach().to(stream.dtype), grid)


class Pass(torch.autograd.Function):
    """A value computed without a graph, as a linear function of its sources: `apply(value, factors, *sources)`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factors: tuple[float, ...], *sources: Tensor) -> Tensor:
        ctx.factors = factors
        ctx.dtypes = tuple(source.dtype for source in sources)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        terms = zip(ctx.factors, ctx.dtypes, ctx.needs_input_grad[2:], strict=True)
        return None, None, *(_scaled(grad, factor).to(dtype) if needed else None for factor, dtype, needed in terms)


def _scaled(grad: Tensor, factor: float) -> Tensor:
    return grad if factor == 1 else grad * factor

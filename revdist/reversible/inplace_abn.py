"""Batch normalisation and an invertible activation in one operator that keeps only its output.

    B batch   C channels   N positions in a channel (batch and space)

Source: Rota Bulo, Porzi, Kontschieder, "In-Place Activated BatchNorm for Memory-Optimized Training
of DNNs", CVPR 2018. With leaky ReLU as phi,

    y = phi(z)   z = gamma xhat + beta   xhat = (x - mean) / std

the backward needs xhat and the sign of z, and both follow from y, which the next convolution keeps
anyway: the input of the normalisation need not be kept (half of a BN-ReLU network's activations).
Given the batch's mean and std, which are noted, x follows too: the operator inverts.

Pitfalls
- gamma near zero: xhat = (z - beta) / gamma then magnifies the rounding of z. As in the paper,
  gamma never acts as less than `floor`: the scale is copysign(|gamma| + floor, gamma), so gamma
  itself has gradients everywhere, zero included. The relative error of xhat is at most about
  2^-24 |beta| / floor in fp32. `from_batch_norm` takes `floor` off, so that what it returns computes
  what the BatchNorm did wherever |gamma| >= floor.
- The activation must invert: leaky ReLU with a positive slope (0.01) or none (slope 1). Plain ReLU
  does not, and with slope 1e-4 the negative side loses nothing in fp32 but all in bf16.
- In bf16 (autocast) y has 8 bits, and so has the xhat of the backward.
- Statistics are those of the micro-batch and this rank. Running statistics are updated once a step.
"""

from __future__ import annotations

from typing import Any, Self, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revdist.errors import NotInvertible, UsageError
from revdist.reversible.notes import noted
from revdist.reversible.recorded import RecordedOperator
from revdist.reversible.replay import is_inside_operator

Statistics = tuple[Tensor, Tensor]
"""Mean and 1 / std per channel."""


@final
class InPlaceABN(RecordedOperator):
    """(B, C, ...) -> (B, C, ...): batch norm, then leaky ReLU with slope `negative_slope` (1: none).

    Parameters and buffers are named and shaped as BatchNorm's, so state dicts are interchangeable.
    floor: least absolute value by which a channel is scaled

    Outside a chain, `inverse` undoes the latest forward. Raises NotInvertible where there was none,
    UsageError for a slope or floor that is not positive.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        channels: int,
        *,
        negative_slope: float = 0.01,
        floor: float = 1e-3,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        if not (negative_slope > 0 and floor > 0):
            raise UsageError(
                f"negative_slope {negative_slope} and floor {floor} must be positive: otherwise nothing inverts"
            )
        self.negative_slope, self.floor, self.eps, self.momentum = negative_slope, floor, eps, momentum
        self.weight = nn.Parameter(torch.full((channels,), 1 - floor))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self._latest: Statistics | None = None

    @classmethod
    def from_batch_norm(cls, norm: nn.Module, *, negative_slope: float = 0.01, floor: float = 1e-3) -> Self:
        """The same function as a BatchNorm1d, 2d or 3d with scale and running statistics, and an activation."""
        state = norm.state_dict()
        if "weight" not in state or "running_mean" not in state:
            raise UsageError(f"{norm} has no scale or no running statistics to take over")
        made = cls(len(state["weight"]), negative_slope=negative_slope, floor=floor, eps=float(norm.eps))  # type: ignore[arg-type]
        made.momentum = 0.1 if norm.momentum is None else float(norm.momentum)  # type: ignore[arg-type]
        state["weight"] = torch.copysign((state["weight"].abs() - floor).clamp(min=0), state["weight"])
        made.to(state["weight"].device, state["weight"].dtype).load_state_dict(state)
        return made.train(norm.training)

    def forward(self, x_BCN: Tensor) -> Tensor:
        with torch.no_grad():
            if self.training and x_BCN.numel() == x_BCN.shape[1]:
                raise UsageError("the statistics of one value per channel say nothing: use a batch of two, or eval()")
            fresh: list[Tensor] = []
            statistics = noted(self, lambda: self._measure(x_BCN, fresh))
            self._latest = None if is_inside_operator() else statistics  # a chain keeps its own
            z_BCN = fresh[0] if fresh else self._scaled(x_BCN, statistics)
            y_BCN = F.leaky_relu_(z_BCN, self.negative_slope)
        return self._recorded(x_BCN, y_BCN, statistics)

    def inverse(self, y_BCN: Tensor) -> Tensor:
        mean_C, invstd_C = noted(self, self._latest_statistics)
        xhat_BCN = self._normalised(y_BCN)
        return xhat_BCN.div_(_by_channel(invstd_C, y_BCN)).add_(_by_channel(mean_C, y_BCN)).to(y_BCN.dtype)

    def record(self, x: Tensor, y: Tensor) -> Tensor:
        return self._recorded(x, y, noted(self, self._latest_statistics))

    def _recorded(self, x_BCN: Tensor, y_BCN: Tensor, statistics: Statistics) -> Tensor:
        """y, known already, as autograd's function of x."""
        known = (y_BCN.detach(),)
        settings = (self.training, self.negative_slope, self.floor)
        inputs = (x_BCN, self.weight, self.bias, statistics[1])
        recorded: tuple[Tensor, Tensor] = _NormaliseAndActivate.apply(*inputs, known, *settings)  # type: ignore[no-untyped-call]
        return recorded[0]

    def _measure(self, x_BCN: Tensor, fresh: list[Tensor]) -> Statistics:
        """The statistics to normalise with; in training also z, into `fresh`, out of the same kernel."""
        if not self.training:
            return self.running_mean.clone(), (self.running_var + self.eps).rsqrt()
        running = self.running_mean, self.running_var
        scale_C = _scale(self.weight, self.floor)
        z_BCN, mean_C, invstd_C = torch.native_batch_norm(
            x_BCN, scale_C, self.bias, *running, True, self.momentum, self.eps
        )
        self.num_batches_tracked.add_(1)
        fresh.append(z_BCN)
        return mean_C, invstd_C

    def _scaled(self, x_BCN: Tensor, statistics: Statistics) -> Tensor:
        mean_C, invstd_C = statistics
        scale_C = _scale(self.weight, self.floor)
        return F.batch_norm(x_BCN, mean_C, invstd_C.pow(-2) - self.eps, scale_C, self.bias, eps=self.eps)

    def _latest_statistics(self) -> Statistics:
        if self._latest is None:
            raise NotInvertible("InPlaceABN inverts with the statistics of a forward, and there has been none")
        return self._latest

    def _normalised(self, y_BCN: Tensor) -> Tensor:
        scale_C = _scale(self.weight, self.floor)
        return _normalised(_accurate(y_BCN), scale_C, self.bias, self.negative_slope)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, negative_slope={self.negative_slope}, floor={self.floor}"


class _NormaliseAndActivate(torch.autograd.Function):
    """y as a function of x, saving y and nothing else as large.

    y comes in a tuple, hidden from autograd. 1 / std is an output, so that a double backward sees it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_BCN: Tensor,
        weight_C: Tensor,
        bias_C: Tensor,
        invstd_C: Tensor,
        y_BCN: tuple[Tensor],
        training: bool,
        negative_slope: float,
        floor: float,
    ) -> tuple[Tensor, Tensor]:
        invstd_C = invstd_C.clone()
        ctx.training, ctx.negative_slope, ctx.floor = training, negative_slope, floor
        ctx.save_for_backward(y_BCN[0], invstd_C, weight_C, bias_C)
        ctx.set_materialize_grads(False)
        return y_BCN[0], invstd_C

    @staticmethod
    def backward(ctx: Any, grad_y_BCN: Tensor | None, grad_invstd_C: Tensor | None) -> tuple[Tensor | None, ...]:
        y_BCN, invstd_C, weight_C, bias_C = ctx.saved_tensors
        if grad_y_BCN is None:
            grad_y_BCN = torch.zeros_like(y_BCN)
        scale_C = _scale(weight_C, ctx.floor)
        grad_z_BCN = torch.where(y_BCN < 0, grad_y_BCN * ctx.negative_slope, grad_y_BCN)
        if ctx.training and grad_invstd_C is None and not torch.is_grad_enabled():
            z_BCN = F.leaky_relu(y_BCN, 1 / ctx.negative_slope)
            grads = _fused_backward(grad_z_BCN, z_BCN, scale_C, bias_C, invstd_C)
        else:
            xhat_BCN = _normalised(_accurate(y_BCN), scale_C, bias_C, ctx.negative_slope)
            factor_C = scale_C * invstd_C
            grads = _plain_backward(_accurate(grad_z_BCN), xhat_BCN, factor_C, invstd_C, grad_invstd_C, ctx.training)
        return grads[0].to(y_BCN.dtype), *grads[1:], *(None,) * 5


Gradients = tuple[Tensor, Tensor, Tensor]
"""Of x, of the scale and of the bias."""


def _fused_backward(grad_z_BCN: Tensor, z_BCN: Tensor, scale_C: Tensor, bias_C: Tensor, invstd_C: Tensor) -> Gradients:
    """torch's own kernel, told that z is the input of a normalisation with mean beta and std gamma."""
    grads: Gradients = torch.ops.aten.native_batch_norm_backward(
        grad_z_BCN, z_BCN, scale_C**2 * invstd_C, None, None, bias_C, 1 / scale_C, True, 0.0, [True, True, True]
    )
    return grads


def _plain_backward(
    grad_z_BCN: Tensor,
    xhat_BCN: Tensor,
    factor_C: Tensor,
    invstd_C: Tensor,
    grad_invstd_C: Tensor | None,
    training: bool,
) -> Gradients:
    """The same in operations that can be differentiated again; `factor_C` is gamma / std."""
    dims = [0, *range(2, xhat_BCN.dim())]
    count = xhat_BCN.numel() // xhat_BCN.shape[1]
    grad_bias_C = grad_z_BCN.sum(dims)
    grad_scale_C = (grad_z_BCN * xhat_BCN).sum(dims)
    centred_BCN = grad_z_BCN
    if training:
        mean_BCN, slope_BCN = (_by_channel(g / count, xhat_BCN) for g in (grad_bias_C, grad_scale_C))
        centred_BCN = grad_z_BCN - mean_BCN - xhat_BCN * slope_BCN
    grad_x_BCN = centred_BCN * _by_channel(factor_C, xhat_BCN)
    if training and grad_invstd_C is not None:
        grad_x_BCN = grad_x_BCN - xhat_BCN * _by_channel(grad_invstd_C * invstd_C**2 / count, xhat_BCN)
    return grad_x_BCN, grad_scale_C, grad_bias_C


def _scale(weight_C: Tensor, floor: float) -> Tensor:
    """gamma, at least `floor` away from zero. Its derivative is one everywhere."""
    return weight_C + torch.copysign(torch.full_like(weight_C, floor), weight_C.detach())


def _normalised(y_BCN: Tensor, scale_C: Tensor, bias_C: Tensor, negative_slope: float) -> Tensor:
    z_BCN = torch.where(y_BCN < 0, y_BCN / negative_slope, y_BCN)
    return (z_BCN - _by_channel(bias_C, y_BCN)) / _by_channel(scale_C, y_BCN)


def _by_channel(value_C: Tensor, like_BCN: Tensor) -> Tensor:
    return value_C.view(1, -1, *(1,) * (like_BCN.dim() - 2))


def _accurate(x: Tensor) -> Tensor:
    """At least fp32: statistics and the inverse of half precision lose too much in itself."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

"""Invertible convolutions: 1x1 by LU factors, k x k circular by FFT, k x k masked by substitution.

    B batch   C, O channels in and out (equal)   H height   W width   N pixels   T taps of a kernel
    k kernel size   p = k // 2   U, V frequencies of height and width

Sources
- 1x1: Kingma, Dhariwal, "Glow", NeurIPS 2018, section 3.2 and equation 10: weight = P L (U + diag s).
- circular: Hoogeboom, van den Berg, Welling, "Emerging Convolutions for Generative Normalizing
  Flows", ICML 2019, section 3.2: a circular convolution is one C x C matrix per frequency.
- masked: the same paper, section 3.1: with the kernel masked to pixels that come earlier, the
  convolution is a triangular matrix, and its inverse is substitution, pixel after pixel.

What they do not do well
- The error of a rebuilt input is the rounding error times the condition number of the linear map.
  They start well conditioned; training may change that: `condition_number` tells, `revdist.check`
  measures, and a profile's reconstruction error bounds how long runs of INVERT may get.
- All three run in the dtype of their input, never in autocast's: in bfloat16 the inverse would
  return 8 bits.
- Substitution takes W + p H rounds of small kernels: exact, but slower than the forward. Prefer
  the circular form where wrapping around the border is acceptable.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from revdist.errors import NotInvertible, UsageError
from revdist.reversible.operator import ReversibleOperator
from revdist.reversible.recorded import RecordedOperator

_FREQUENCIES = 64
"""Frequencies solved at a time."""

_CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class InvertibleConv1x1(RecordedOperator):
    """Mix the channels of (B, C, ...), one to three spatial dimensions, with an invertible matrix.

    weight = P L (U + diag(sign exp(log_scale))): P a fixed permutation, L and U unit triangular.
    It starts as a random rotation, and stays invertible whatever the optimizer does.
    """

    permutation: Tensor
    sign: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels < 1:
            raise UsageError(f"channels must be at least 1, not {channels}")
        rotation_CC = nn.init.orthogonal_(torch.empty(channels, channels, dtype=torch.float64))
        permutation_CC, lower_CC, upper_CC = torch.linalg.lu(rotation_CC)
        diagonal_C = upper_CC.diagonal()
        default = torch.get_default_dtype()
        self.lower = nn.Parameter(lower_CC.tril(-1).to(default))
        self.upper = nn.Parameter(upper_CC.triu(1).to(default))
        self.log_scale = nn.Parameter(diagonal_C.abs().log().to(default))
        self.register_buffer("sign", diagonal_C.sign().to(default))
        self.register_buffer("permutation", permutation_CC.argmax(dim=1))

    def _triangles(self) -> tuple[Tensor, Tensor]:
        eye_CC = torch.eye(len(self.sign), dtype=self.lower.dtype, device=self.lower.device)
        lower_CC = self.lower.tril(-1) + eye_CC
        upper_CC = self.upper.triu(1) + torch.diag(self.sign * self.log_scale.exp())
        return lower_CC, upper_CC

    def weight(self) -> Tensor:
        """The matrix that mixes channels, (O, C)."""
        lower_CC, upper_CC = self._triangles()
        return (lower_CC @ upper_CC)[self.permutation]

    def inverse_weight(self) -> Tensor:
        """Its inverse, (C, O), from the factors in double precision: no general solver involved."""
        lower_CC, upper_CC = (factor.double() for factor in self._triangles())
        eye_CC = torch.eye(len(lower_CC), dtype=torch.float64, device=lower_CC.device)
        half_CC = torch.linalg.solve_triangular(lower_CC, eye_CC, upper=False, unitriangular=True)
        inverse_CC: Tensor = torch.linalg.solve_triangular(upper_CC, half_CC, upper=True)
        return inverse_CC[:, self.permutation].to(self.lower.dtype)

    def forward(self, x_BCN: Tensor) -> Tensor:
        with _dtype_of_the_stream(x_BCN):
            return _mixed(x_BCN, self.weight().to(x_BCN.dtype), ())

    def inverse(self, y_BCN: Tensor) -> Tensor:
        with _dtype_of_the_stream(y_BCN):
            return _mix(y_BCN, self.inverse_weight().to(y_BCN.dtype))

    def record(self, x: Tensor, y: Tensor) -> Tensor:
        with _dtype_of_the_stream(x):
            return _mixed(x, self.weight().to(x.dtype), (y.detach(),))

    def log_determinant(self, num_pixels: int) -> Tensor:
        """log|det| of the map on one sample of `num_pixels` pixels, a scalar."""
        return num_pixels * self.log_scale.sum()

    def condition_number(self) -> float:
        """Largest over smallest singular value of the weight: how much a rebuilt input magnifies rounding."""
        return float(torch.linalg.cond(self.weight().detach().double()))

    def extra_repr(self) -> str:
        return f"channels={len(self.sign)}"


class InvertibleConv2d(ReversibleOperator):
    """A stride-1 k x k convolution of (B, C, H, W) that can be undone.

    padding="circular": the image wraps around; any kernel with nonsingular frequencies.
    padding="masked": zero padding; output pixels see pixels before them in raster order (after
      them with reverse=True), so stack one of each for a full receptive field. Invertible whatever
      the optimizer does: its determinant is the product of exp(log_scale).

    Raises NotInvertible from `inverse` where a circular kernel has become singular, UsageError for
    sizes that cannot be.
    """

    def __init__(
        self, channels: int, kernel_size: int = 3, *, padding: str = "circular", reverse: bool = False
    ) -> None:
        super().__init__()
        if padding not in ("circular", "masked"):
            raise UsageError(f"padding {padding!r} is neither 'circular' nor 'masked'")
        if channels < 1 or kernel_size < 1 or kernel_size % 2 == 0:
            raise UsageError(f"channels must be positive and kernel_size odd, not {channels} and {kernel_size}")
        if reverse and padding == "circular":
            raise UsageError("reverse orders masked convolutions; a circular one has no order")
        self.padding, self.reverse, self.reach = padding, reverse, kernel_size // 2
        rows = kernel_size if padding == "circular" else self.reach + 1
        # Off the centre the spectral norms add up to about a half: far from singular at the start.
        std = 0.25 / (max(1, rows * kernel_size - 1) * math.sqrt(channels))
        weight_OCkk = torch.randn(channels, channels, rows, kernel_size) * std
        if padding == "circular":
            weight_OCkk[:, :, self.reach, self.reach] = nn.init.orthogonal_(torch.empty(channels, channels))
            self.register_parameter("log_scale", None)
        else:
            self.log_scale = nn.Parameter(torch.zeros(channels))
        self.weight = nn.Parameter(weight_OCkk)

    def kernel(self) -> Tensor:
        """The kernel that `forward` applies, masked where it is, (O, C, rows, k)."""
        if self.log_scale is None:
            return self.weight
        before_k = torch.arange(self.weight.shape[-1], device=self.weight.device) < self.reach
        centre_OC = self.weight[:, :, -1, self.reach].tril(-1) + torch.diag(self.log_scale.exp())
        last_OCk = self.weight[:, :, -1] * before_k
        last_OCk = last_OCk + F.pad(centre_OC.unsqueeze(-1), (self.reach, self.reach))
        return torch.cat([self.weight[:, :, :-1], last_OCk.unsqueeze(2)], dim=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        p = self.reach
        with _dtype_of_the_stream(x_BCHW):
            kernel_OCkk = self.kernel().to(x_BCHW.dtype)
            if self.padding == "circular":
                return F.conv2d(F.pad(x_BCHW, (p, p, p, p), mode="circular"), kernel_OCkk)
            if self.reverse:
                return F.conv2d(F.pad(x_BCHW, (p, p, 0, p)), kernel_OCkk.flip(2, 3))
            return F.conv2d(F.pad(x_BCHW, (p, p, p, 0)), kernel_OCkk)

    def inverse(self, y_BCHW: Tensor) -> Tensor:
        with _dtype_of_the_stream(y_BCHW):
            # Neither FFTs nor triangular solves know half precision; what comes out is rounded back.
            solved = torch.promote_types(y_BCHW.dtype, torch.float32)
            kernel_OCkk = self.kernel().to(y_BCHW.dtype).to(solved)
            return self._solve(y_BCHW.to(solved), kernel_OCkk).to(y_BCHW.dtype)

    def _solve(self, y_BOHW: Tensor, kernel_OCkk: Tensor) -> Tensor:
        if self.padding == "circular":
            return _divide_frequencies(y_BOHW, kernel_OCkk)
        if self.reverse:
            return _substitute(y_BOHW.flip(2, 3), kernel_OCkk).flip(2, 3)
        return _substitute(y_BOHW, kernel_OCkk)

    def log_determinant(self, height: int, width: int) -> Tensor:
        """log|det| of the map on one sample of height x width pixels, a scalar."""
        if self.log_scale is not None:
            return height * width * self.log_scale.sum()
        return torch.linalg.slogdet(_spectrum(self.kernel(), height, width, width)).logabsdet.sum()

    def condition_number(self, height: int, width: int) -> float:
        """Largest over smallest singular value of the map on height x width pixels.

        Circular: exact, from the frequencies. Masked: from the dense matrix, for small images.
        """
        with torch.no_grad():
            if self.padding == "circular":
                values = torch.linalg.svdvals(_spectrum(self.kernel(), height, width, width))
                return float(values.max() / values.min())
            size = self.weight.shape[0] * height * width
            eye = torch.eye(size, dtype=self.weight.dtype, device=self.weight.device)
            return float(torch.linalg.cond(self.forward(eye.view(size, -1, height, width)).flatten(1)))

    def extra_repr(self) -> str:
        order = ", reverse=True" if self.reverse else ""
        size = f"channels={len(self.weight)}, kernel_size={self.weight.shape[-1]}"
        return f"{size}, padding={self.padding!r}{order}"


def _dtype_of_the_stream(x: Tensor) -> torch.autocast:
    """No autocast: an inverse can return no more bits than its forward kept."""
    return torch.autocast(x.device.type, enabled=False)


class _Mix(torch.autograd.Function):
    """`_mix` that saves its arguments alone. A result that is known comes in a tuple, hidden from autograd."""

    @staticmethod
    def forward(ctx: Any, x_BCN: Tensor, weight_OC: Tensor, known: tuple[Tensor, ...]) -> Tensor:
        ctx.save_for_backward(x_BCN, weight_OC)
        return known[0] if known else _mix(x_BCN, weight_OC)

    @staticmethod
    def backward(ctx: Any, grad_BON: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_BCN, weight_OC = ctx.saved_tensors
        grad_x_BCN = _mix(grad_BON, weight_OC.T) if ctx.needs_input_grad[0] else None
        grad_weight_OC = None
        if ctx.needs_input_grad[1]:
            grad_weight_OC = torch.einsum("bon,bcn->oc", grad_BON.flatten(2), x_BCN.flatten(2))
        return grad_x_BCN, grad_weight_OC, None


def _mixed(x_BCN: Tensor, weight_OC: Tensor, known: tuple[Tensor, ...]) -> Tensor:
    mixed: Tensor = _Mix.apply(x_BCN, weight_OC, known)  # type: ignore[no-untyped-call]
    return mixed


def _mix(x_BCN: Tensor, weight_OC: Tensor) -> Tensor:
    convolution = _CONVOLUTIONS.get(x_BCN.dim())
    if convolution is None:
        raise UsageError(f"a 1x1 convolution takes (batch, channels, 1 to 3 dimensions), not {tuple(x_BCN.shape)}")
    return convolution(x_BCN, weight_OC[(...,) + (None,) * (x_BCN.dim() - 2)])


def _spectrum(kernel_OCkk: Tensor, height: int, width: int, num_columns: int) -> Tensor:
    """One channel matrix per frequency of the circular convolution, (height * num_columns, O, C), complex."""
    return _at_frequencies(kernel_OCkk, _phases(kernel_OCkk, height, width, num_columns))


def _phases(kernel_OCkk: Tensor, height: int, width: int, num_columns: int) -> Tensor:
    """How each tap turns at each frequency, (height * num_columns, taps), complex.

    y[i] = sum_a w[a] x[i + a - p] has the spectrum sum_a w[a] exp(2 pi i u (a - p) / H) at frequency u.
    """
    size = kernel_OCkk.shape[-1]
    offset_k = torch.arange(size, dtype=torch.float64, device=kernel_OCkk.device) - size // 2
    angle_Uk = torch.arange(height, device=offset_k.device)[:, None] * offset_k / height
    angle_Vk = torch.arange(num_columns, device=offset_k.device)[:, None] * offset_k / width
    angle_UVkk = 2 * math.pi * (angle_Uk[:, None, :, None] + angle_Vk[None, :, None, :])
    phase_UVkk = torch.polar(torch.ones_like(angle_UVkk), angle_UVkk)
    return phase_UVkk.view(height * num_columns, size * size).to(kernel_OCkk.dtype.to_complex())


def _at_frequencies(kernel_OCkk: Tensor, phase_NT: Tensor) -> Tensor:
    taps_TM = kernel_OCkk.flatten(2).flatten(0, 1).T.to(phase_NT.dtype)
    return (phase_NT @ taps_TM).view(len(phase_NT), *kernel_OCkk.shape[:2])


def _divide_frequencies(y_BOHW: Tensor, kernel_OCkk: Tensor) -> Tensor:
    """Solve one linear system per frequency, a block of them at a time: matrices of all would outweigh activations."""
    height, width = y_BOHW.shape[-2:]
    y_BOHV = torch.fft.rfft2(y_BOHW)
    y_NOB = y_BOHV.flatten(2).permute(2, 1, 0)
    phase_NT = _phases(kernel_OCkk, height, width, y_BOHV.shape[-1])
    blocks = [slice(start, start + _FREQUENCIES) for start in range(0, len(phase_NT), _FREQUENCIES)]
    try:
        solved = [torch.linalg.solve(_at_frequencies(kernel_OCkk, phase_NT[n]), y_NOB[n]) for n in blocks]
    except LinAlgError:
        raise NotInvertible(
            "a circular convolution has become singular at some frequency: lower the learning rate, "
            "decay its kernel towards the identity, or use padding='masked'"
        ) from None
    x_NCB = torch.cat(solved)
    x_BCHW: Tensor = torch.fft.irfft2(x_NCB.permute(2, 1, 0).reshape(y_BOHV.shape), s=(height, width))
    return x_BCHW


def _substitute(y_BOHW: Tensor, kernel_OCkk: Tensor) -> Tensor:
    """Solve for pixels in raster order; pixels (i, j) with equal j + i (p + 1) do not see each other.

    kernel: (O, C, p + 1, k), its last row zero right of the centre, whose tap is lower triangular.
    """
    height, width = y_BOHW.shape[-2:]
    size = kernel_OCkk.shape[-1]
    p = size // 2
    tap_T = torch.arange(p * size + p, device=y_BOHW.device)  # every tap before the centre
    tap_rows, tap_cols = tap_T // size, tap_T % size
    taps_OCT = kernel_OCkk[:, :, tap_rows, tap_cols]
    eye_OC = torch.eye(len(kernel_OCkk), dtype=y_BOHW.dtype, device=y_BOHW.device)
    centre_CO = torch.linalg.solve_triangular(kernel_OCkk[:, :, p, p], eye_OC, upper=False)
    x_BCHW = F.pad(torch.zeros_like(y_BOHW, memory_format=torch.contiguous_format), (p, p, p, 0))
    for wave in range(width + (height - 1) * (p + 1)):
        first = max(0, -((width - 1 - wave) // (p + 1)))
        rows = torch.arange(first, min(height - 1, wave // (p + 1)) + 1, device=y_BOHW.device)
        cols = wave - rows * (p + 1)
        seen_BCNT = x_BCHW[:, :, rows[:, None] + tap_rows, cols[:, None] + tap_cols]
        left_BON = y_BOHW[:, :, rows, cols] - torch.einsum("oct,bcnt->bon", taps_OCT, seen_BCNT)
        x_BCHW[:, :, rows + p, cols + p] = torch.einsum("co,bon->bcn", centre_CO, left_BON)
    return x_BCHW[:, :, p:, p : p + width]

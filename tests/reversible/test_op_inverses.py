"""Operators give their input back, on shapes and weights that hypothesis chooses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import Field, conv
from torch import Tensor, nn

from revdist.errors import NotInvertible, UsageError
from revdist.reversible import AffineCoupling, ReversibleOperator
from revdist.reversible.inplace_abn import InPlaceABN
from revdist.reversible.invertible_conv import InvertibleConv1x1, InvertibleConv2d
from revdist.reversible.momentum import MomentumBlock
from revdist.reversible.ode import ReversibleODE
from revdist.reversible.squeeze import Squeeze, SqueezeHalves

OPERATORS = {
    "affine": lambda c: AffineCoupling(conv(c, 2 * c), conv(c, 2 * c)),
    "momentum": lambda c: MomentumBlock(conv(c)),
    "momentum_exact": lambda c: MomentumBlock(conv(c), gamma=0.875, grid=2**-12),
    "conv1x1": InvertibleConv1x1,
    "conv_circular": lambda c: InvertibleConv2d(c, 3),
    "conv_masked": lambda c: InvertibleConv2d(c, 3, padding="masked"),
    "conv_masked_reverse": lambda c: InvertibleConv2d(c, 5, padding="masked", reverse=True),
    "inplace_abn": InPlaceABN,
    "squeeze": lambda c: Squeeze(),
    "squeeze_halves": lambda c: SqueezeHalves(),
    "alf": lambda c: ReversibleODE(Field(c), 4),
    "alf_damped": lambda c: ReversibleODE(Field(c), 4, damping=0.8),
    "mccallum_foster": lambda c: ReversibleODE(Field(c), 4, method="mccallum_foster", increment="rk4"),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}

shapes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.sampled_from([2, 4, 8]), st.sampled_from([2, 4, 6]))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", OPERATORS)
@settings(max_examples=15, deadline=None)
@given(shape=shapes, seed=st.integers(0, 10**6), layout=st.sampled_from(["plain", "channels_last", "transposed"]))
def test_inverse_gives_the_input_back(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], seed: int, layout: str
) -> None:
    torch.manual_seed(seed)
    operator: ReversibleOperator = OPERATORS[name](shape[1]).to(dtype)
    inputs = tuple(torch.randn(shape, dtype=dtype) for _ in range(operator.num_streams))
    if name == "momentum_exact":
        inputs = tuple((x / 2**-12).round() * 2**-12 for x in inputs)
    if layout == "channels_last":
        inputs = tuple(x.contiguous(memory_format=torch.channels_last) for x in inputs)
    if layout == "transposed":
        inputs = tuple(x.mT.contiguous().mT for x in inputs)
    with torch.no_grad():
        outputs = operator(*inputs)
        kept = [out.clone() for out in ((outputs,) if isinstance(outputs, Tensor) else outputs)]
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        rebuilt = operator.inverse(*outputs)
    for found, expected in zip((rebuilt,) if isinstance(rebuilt, Tensor) else rebuilt, inputs, strict=True):
        assert found.shape == expected.shape
        assert found.dtype == expected.dtype
        assert relative(found, expected) < TOLERANCE[dtype]
    for out, before in zip(outputs, kept, strict=True):
        torch.testing.assert_close(out, before, rtol=0, atol=0, msg="the inverse edited its argument")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_squeezing_is_exact_in_every_type(dtype: torch.dtype) -> None:
    x_BCHW = torch.randn(2, 3, 4, 6).to(dtype)
    squeeze = Squeeze()
    assert squeeze(x_BCHW).shape == (2, 12, 2, 3)
    torch.testing.assert_close(squeeze.inverse(squeeze(x_BCHW)), x_BCHW, rtol=0, atol=0)


def test_squeezing_says_which_size_does_not_fit() -> None:
    with pytest.raises(UsageError, match="5 x 4 pixels into blocks of 2"):
        Squeeze()(torch.randn(1, 1, 5, 4))


@pytest.mark.parametrize(
    "operator",
    [
        InvertibleConv1x1(3),
        InvertibleConv2d(3, 3),
        InvertibleConv2d(3, 3, padding="masked"),
        InvertibleConv2d(3, 3, padding="masked", reverse=True),
    ],
    ids=["1x1", "circular", "masked", "reverse"],
)
def test_log_determinants_are_those_of_the_jacobian(operator: nn.Module) -> None:
    torch.manual_seed(0)
    operator = operator.double()
    for parameter in operator.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    x_BCHW = torch.randn(1, 3, 4, 5, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(operator, x_BCHW).reshape(60, 60)
    sizes = (20,) if isinstance(operator, InvertibleConv1x1) else (4, 5)
    expected = torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(operator.log_determinant(*sizes), expected, rtol=1e-10, atol=1e-10)
    condition = operator.condition_number() if len(sizes) == 1 else operator.condition_number(*sizes)
    assert condition == pytest.approx(float(torch.linalg.cond(jacobian)), rel=1e-6)


def test_circular_convolution_wraps_and_matches_its_frequencies() -> None:
    operator = InvertibleConv2d(2, 3).double()
    x_BCHW = torch.randn(1, 2, 4, 5, dtype=torch.float64)
    shifted = operator(x_BCHW.roll((1, 2), dims=(2, 3)))
    torch.testing.assert_close(shifted, operator(x_BCHW).roll((1, 2), dims=(2, 3)))


def test_a_singular_circular_kernel_is_an_error_not_an_input() -> None:
    operator = InvertibleConv2d(1, 3)
    operator.weight.data.fill_(0)
    with pytest.raises(NotInvertible, match="singular"):
        operator.inverse(torch.randn(1, 1, 4, 4))


def test_masked_pixels_see_earlier_pixels_only() -> None:
    operator = InvertibleConv2d(2, 3, padding="masked").double()
    x_BCHW = torch.zeros(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(operator(x_BCHW)[0, :, 2, 2].sum(), x_BCHW)
    seen = gradient[0].abs().sum(0) > 0
    assert seen[1, 1:4].all()
    assert seen[2, 1:3].all()
    assert seen.sum() == 5


def test_a_convolution_in_half_precision_inverts_to_half_precision() -> None:
    for operator in (InvertibleConv1x1(4), InvertibleConv2d(4, 3), InvertibleConv2d(4, 3, padding="masked")):
        x_BCHW = torch.randn(2, 4, 6, 6).bfloat16()
        with torch.no_grad():
            rebuilt = operator.inverse(operator(x_BCHW))
        assert rebuilt.dtype == torch.bfloat16
        assert relative(rebuilt.float(), x_BCHW.float()) < 0.02


@pytest.mark.parametrize("gamma", [0.5, 0.9, 1.0])
def test_an_exact_momentum_block_loses_no_bit_over_fifty_steps(gamma: float) -> None:
    torch.manual_seed(0)
    blocks = [MomentumBlock(conv(2), gamma=gamma, grid=2**-12) for _ in range(50)]
    grid = 2.0**-12
    state = tuple((torch.randn(2, 2, 4, 4) / grid).round() * grid for _ in range(2))
    expected = state
    with torch.no_grad():
        for block in blocks:
            state = block(*state)
        for block in reversed(blocks):
            state = block.inverse(*state)
    for found, reference in zip(state, expected, strict=True):
        torch.testing.assert_close(found, reference, rtol=0, atol=0)


def test_without_the_buffer_momentum_loses_what_the_docstring_says() -> None:
    torch.manual_seed(0)
    blocks = [MomentumBlock(conv(2), gamma=0.5) for _ in range(50)]
    state = expected = tuple(torch.randn(2, 2, 4, 4) for _ in range(2))
    with torch.no_grad():
        for block in blocks:
            state = block(*state)
        for block in reversed(blocks):
            state = block.inverse(*state)
    assert not relative(state[1], expected[1]) < 1


@pytest.mark.parametrize("gamma", [0.0, 1e-9, -1e-4])
def test_in_place_abn_inverts_where_gamma_is_near_zero(gamma: float) -> None:
    torch.manual_seed(0)
    norm = InPlaceABN(3)
    norm.weight.data.fill_(gamma)
    norm.bias.data.fill_(0.5)
    x_BCHW = torch.randn(8, 3, 5, 5)
    with torch.no_grad():
        rebuilt = norm.inverse(norm(x_BCHW))
    assert relative(rebuilt, x_BCHW) < 2 * 2**-24 * 0.5 / norm.floor
    norm(x_BCHW).square().sum().backward()
    assert norm.weight.grad is not None
    assert norm.weight.grad.abs().min() > 0


def test_in_place_abn_inverts_with_running_statistics_in_evaluation() -> None:
    norm = InPlaceABN(3).eval()
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    x_BCHW = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(norm.inverse(norm(x_BCHW)), x_BCHW)


def test_in_place_abn_needs_a_forward_to_invert() -> None:
    with pytest.raises(NotInvertible, match="there has been none"):
        InPlaceABN(3).inverse(torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize(("method", "order"), [("alf", 2), ("mccallum_foster", 2)])
def test_ode_steps_converge_with_their_order(method: str, order: int) -> None:
    class Decay(nn.Module):
        def forward(self, t: float, z: Tensor) -> Tensor:
            return -z * (1 + t)

    z = torch.ones(1, dtype=torch.float64)
    exact = torch.exp(torch.tensor(-1.5, dtype=torch.float64))
    errors = []
    for num_steps in (20, 40):
        ode = ReversibleODE(Decay(), num_steps, method=method)
        errors.append(float((ode(*ode.start(z))[0] - exact).abs()))
    assert errors[0] / errors[1] > 2 ** (order - 0.3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: InvertibleConv1x1(0),
        lambda: InvertibleConv2d(2, 2),
        lambda: InvertibleConv2d(2, 3, padding="zeros"),
        lambda: InvertibleConv2d(2, 3, reverse=True),
        lambda: InvertibleConv1x1(2)(torch.randn(3, 2)),
        lambda: InPlaceABN(2, negative_slope=0.0),
        lambda: InPlaceABN(2)(torch.randn(1, 2)),
        lambda: InPlaceABN.from_batch_norm(nn.BatchNorm2d(2, affine=False)),
        lambda: MomentumBlock(conv(2), gamma=0.0),
        lambda: MomentumBlock(conv(2), grid=0.3),
        lambda: MomentumBlock(conv(2), gamma=1e-4, grid=2**-8),
        lambda: ReversibleODE(Field(2), 0),
        lambda: ReversibleODE(Field(2), 1, damping=0.5),
        lambda: ReversibleODE(Field(2), 1, mixing=0.0),
        lambda: ReversibleODE(Field(2), 1, method="euler"),  # type: ignore[arg-type]
        lambda: ReversibleODE(Field(2), 1, increment="heun"),  # type: ignore[arg-type]
        lambda: Squeeze(0),
    ],
)
def test_what_cannot_be_is_refused(make: object) -> None:
    with pytest.raises(UsageError):
        make()  # type: ignore[operator]

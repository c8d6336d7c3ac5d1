"""`revdist.check` passes what inverts and says what is wrong with what does not."""

import random

import pytest
import torch
from operator_cases import CASES
from torch import Tensor, nn

from revdist.errors import UsageError
from revdist.reversible import AdditiveCoupling, ReversibleOperator
from revdist.reversible.attention import LSHAttention
from revdist.reversible.check import Check, check
from revdist.reversible.inplace_abn import InPlaceABN
from revdist.reversible.momentum import MomentumBlock

torch.set_num_threads(1)


class Scale(ReversibleOperator):
    """y = x * e^scale, done right; the others break one thing each."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.exp()

    def inverse(self, y: Tensor) -> Tensor:
        return y * (-self.scale).exp()


class NoInverse(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class WrongInverse(Scale):
    def inverse(self, y: Tensor) -> Tensor:
        return y * self.scale.exp()


class RaisingInverse(Scale):
    def inverse(self, y: Tensor) -> Tensor:
        raise NotImplementedError("later")


class EditsInput(Scale):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.scale.exp())


class EditsOutput(Scale):
    def inverse(self, y: Tensor) -> Tensor:
        return y.mul_((-self.scale).exp())


class OwnChance(Scale):
    def forward(self, x: Tensor) -> Tensor:
        return x * random.random()


class RoundsToHalf(Scale):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).bfloat16()


class BatchNormOnThePath(Scale):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def inverse(self, y: Tensor) -> Tensor:
        std = (self.norm.running_var + self.norm.eps).sqrt()
        return (y - self.norm.bias) / self.norm.weight * std + self.norm.running_mean


class IllConditioned(Scale):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1e5 * x.mean()

    def inverse(self, y: Tensor) -> Tensor:
        return y - 1e5 * y.mean() / (1 + 1e5)


class WrongShape(Scale):
    def inverse(self, y: Tensor) -> Tensor:
        return super().inverse(y)[:, :3]


class Pair(Scale):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Infinite(Scale):
    def forward(self, x: Tensor) -> Tensor:
        return x / 0


class Choosing(Scale):
    """Inverts to rounding, but its gradient depends on the order of nearly equal values."""

    def forward(self, x: Tensor) -> Tensor:
        hard = (x * 2**23).round().remainder(2) - 0.5  # the last bits of x
        return x * 1.1 + 1e-9 * hard + (self.scale * hard - (self.scale * hard).detach())

    def inverse(self, y: Tensor) -> Tensor:
        return y / 1.1


SAMPLE = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", [name for name in CASES if name != "reformer"])
def test_every_operator_of_ours_passes(name: str) -> None:
    chain, inputs = CASES[name].build(torch.float32)
    for module in chain.children():
        sample = inputs
        if name.startswith("momentum_exact"):
            sample = tuple((x * 4096).round() / 4096 for x in inputs)
        if isinstance(module, AdditiveCoupling) and module is not next(iter(chain.children())):
            continue  # takes what comes before it
        assert check(module, sample if len(sample) == 2 else sample[0]).ok


def test_a_passing_check_says_how_exact_it_is() -> None:
    found = check(Scale(), SAMPLE)
    assert found == Check(
        name="Scale",
        problems=(),
        deterministic=True,
        reconstruction_error=found.reconstruction_error,
        gradient_error=found.gradient_error,
    )
    assert 0 <= found.reconstruction_error < 1e-6
    assert found.gradient_error is not None
    assert found.gradient_error < 1e-6
    assert str(found).startswith("Scale inverts: its rebuilt input is off by")


@pytest.mark.parametrize(
    ("operator", "problem"),
    [
        (NoInverse(), "no method `inverse`"),
        (WrongInverse(), "inverse does not undo forward"),
        (RaisingInverse(), "inverse raised NotImplementedError: later"),
        (EditsInput(), "forward edits its input in place"),
        (EditsOutput(), "inverse edits its argument in place"),
        (OwnChance(), "not deterministic"),
        (RoundsToHalf(), "bits that the output lacks"),
        (BatchNormOnThePath(), "but not in eval()"),
        (IllConditioned(), "rounding is magnified"),
        (WrongShape(), r"inverse returns the shape (8, 3) for an input of (8, 6)"),
        (Pair(), "forward returns 2 values, not one tensor"),
        (Infinite(), "infinite or undefined"),
        (Choosing(), "changes much with little of its input"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_is_wrong_is_said(operator: nn.Module, problem: str) -> None:
    found = check(operator, SAMPLE)
    assert not found.ok
    assert problem in str(found)
    assert "cannot be trained reversibly" in str(found)


def test_nothing_is_left_changed() -> None:
    torch.manual_seed(7)
    operator = AdditiveCoupling(nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5)), nn.Linear(3, 3))
    before = {name: value.clone() for name, value in operator.state_dict().items()}
    state, sample = torch.get_rng_state(), SAMPLE.clone()
    assert check(operator, sample).ok
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(sample, SAMPLE, rtol=0, atol=0)
    for name, value in operator.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert all(p.grad is None for p in operator.parameters())


def test_a_buffer_that_forward_replaces_is_put_back() -> None:
    class Counting(Scale):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("table", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls = self.calls + 1
            self.table = torch.zeros(len(x))
            return super().forward(x)

    operator = Counting()
    calls = operator.calls
    assert check(operator, SAMPLE).ok
    assert operator.calls is calls
    assert calls == 0
    assert len(operator.table) == len(SAMPLE)  # what has grown stays, as caches do


def test_statistics_and_buckets_that_are_noted_pass() -> None:
    assert check(InPlaceABN(6), SAMPLE).ok
    x_BTD = torch.randn(2, 16, 8)
    assert check(AdditiveCoupling(LSHAttention(8, 2, chunk_length=4), nn.Linear(8, 8)), (x_BTD, x_BTD)).ok


def test_a_module_that_is_no_subclass_is_checked_too() -> None:
    class Swap(nn.Module):
        def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
            return x2 * 2, x1

        def inverse(self, y1: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
            return y2, y1 / 2

    assert check(Swap(), (SAMPLE, SAMPLE + 1)).reconstruction_error == 0


def test_the_tolerance_can_be_set_and_integers_are_refused() -> None:
    assert check(MomentumBlock(nn.Linear(6, 6)), (SAMPLE, SAMPLE)).ok
    assert not check(MomentumBlock(nn.Linear(6, 6)), (SAMPLE, SAMPLE), tolerance=1e-12).ok
    assert not check(MomentumBlock(nn.Linear(6, 6)), (SAMPLE, SAMPLE), tolerance=0.0).ok
    with pytest.raises(UsageError, match="floating-point"):
        check(Scale(), torch.arange(3))

"""Couplings on a grid: every schedule, and every change of it, gives the same numbers to the bit."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revdist.errors import UsageError
from revdist.models.revnet import RevNet, revnet_digits
from revdist.planning.costs import Mode
from revdist.reversible import AdditiveCoupling, MomentumBlock, ReversibleChain, check, find_chain
from revdist.reversible.grid import exact_below, on_grid
from revdist.reversible.reconstruction import reconstructions

GRID = 2.0**-12

torch.set_num_threads(1)


def small_revnet(grid: float | None = GRID) -> RevNet:
    torch.manual_seed(0)
    return RevNet((3, 3), (8, 8, 16), num_classes=3, in_channels=1, grid=grid)


def step(model: nn.Module, images: Tensor, labels: Tensor, *, autocast: bool, demoted_bytes: int = 0) -> None:
    """Gradients of one batch; what `demoted_bytes` names is released between forward and backward."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = F.cross_entropy(model(images).float(), labels)
    find_chain(model).demote(demoted_bytes)
    loss.backward()


def assert_same_bits(model: nn.Module, other: nn.Module) -> None:
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert one.grad is not None, name
        assert torch.equal(one.grad, two.grad), name
        assert torch.equal(one, two), name
    for (name, one), two in zip(model.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16-autocast"])
def test_200_steps_under_random_schedules_end_in_the_same_bits_as_saving_everything(autocast):
    draw = random.Random(1)
    model = small_revnet()
    saving = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (model, saving)]
    chain = find_chain(model)
    used: set[Mode] = set()
    for _ in range(200):
        images, labels = torch.randn(4, 1, 8, 8), torch.randint(3, (4,))
        if draw.random() < 0.5:
            chain.set_schedule([draw.choice(modes) for modes in chain.options()])
        used.update(chain.schedule)
        step(model, images, labels, autocast=autocast, demoted_bytes=draw.choice((0, 0, 20_000)))
        step(saving, images, labels, autocast=autocast)
        assert_same_bits(model, saving)
        for optimizer in optimizers:
            optimizer.step()
    assert used == set(Mode)
    assert chain.demoted_bytes > 0


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16-autocast"])
@pytest.mark.parametrize("mode", [Mode.INVERT, Mode.RECOMPUTE, Mode.OFFLOAD])
def test_one_step_in_one_mode_has_the_bits_of_saving(mode, autocast):
    model = small_revnet()
    saving = copy.deepcopy(model)
    chain = find_chain(model)
    chain.set_schedule([mode if mode in modes else modes[0] for modes in chain.options()])
    images, labels = torch.randn(4, 1, 8, 8), torch.randint(3, (4,))
    step(model, images, labels, autocast=autocast)
    step(saving, images, labels, autocast=autocast)
    assert_same_bits(model, saving)


def test_without_a_grid_the_bits_differ():
    """Or the tests above would show nothing."""
    model = small_revnet(grid=None)
    saving = copy.deepcopy(model)
    chain = find_chain(model)
    chain.set_schedule([Mode.INVERT if Mode.INVERT in modes else modes[0] for modes in chain.options()])
    images, labels = torch.randn(4, 1, 8, 8), torch.randint(3, (4,))
    step(model, images, labels, autocast=False)
    step(saving, images, labels, autocast=False)
    with pytest.raises(AssertionError):
        assert_same_bits(model, saving)


def test_the_gradient_passes_the_rounding_as_if_it_were_not_there():
    branch = nn.Linear(2, 2).double()
    plain, exact = AdditiveCoupling(branch, branch), AdditiveCoupling(branch, branch, grid=2.0**-40)
    x = torch.randn(3, 2, dtype=torch.float64)

    def gradient(coupling: nn.Module) -> Tensor:
        x1, x2 = x.clone().requires_grad_(), (x + 1).requires_grad_()
        torch.cat(coupling(x1, x2)).square().sum().backward()
        return torch.cat([x1.grad, x2.grad])

    torch.testing.assert_close(gradient(exact), gradient(plain), rtol=1e-10, atol=1e-10)


def test_the_stream_is_on_the_grid_from_the_entrance_on_with_and_without_gradients():
    coupling = AdditiveCoupling(nn.Linear(2, 2), nn.Linear(2, 2), grid=GRID)
    chain = ReversibleChain([nn.Linear(4, 4), coupling, copy.deepcopy(coupling)])
    x = torch.randn(5, 4)
    trained = chain(x)
    with torch.no_grad():
        plain = chain(x)
    assert torch.equal(trained, plain)
    assert torch.equal(plain / GRID, (plain / GRID).round())


def test_autocast_keeps_the_stream_in_fp32():
    chain = ReversibleChain([nn.Linear(4, 4), AdditiveCoupling(nn.Linear(2, 2), nn.Linear(2, 2), grid=GRID)])
    with torch.autocast("cpu", torch.bfloat16):
        assert chain(torch.randn(5, 4)).dtype == torch.float32


def test_a_narrow_stream_without_autocast_is_refused():
    coupling = AdditiveCoupling(nn.Identity(), nn.Identity(), grid=GRID).bfloat16()
    halves = torch.randn(2, 2).bfloat16()
    with pytest.raises(UsageError, match="autocast"):
        coupling(halves, halves)


@pytest.mark.parametrize("grid", [0.0, -0.5, 0.3, 1.0, 2.0, float("nan"), float("inf")])
def test_a_grid_is_a_power_of_two_below_one(grid):
    with pytest.raises(UsageError, match="power of two"):
        AdditiveCoupling(nn.Identity(), nn.Identity(), grid=grid)


def test_a_profile_shows_exactness_within_the_range_and_its_loss_beyond():
    torch.manual_seed(0)
    chain = ReversibleChain([AdditiveCoupling(nn.Linear(3, 3), nn.Linear(3, 3), grid=GRID) for _ in range(2)])
    within = torch.randn(8, 6)
    assert not any(found.error for found in reconstructions(chain, (within,)))
    beyond = within * 64 * exact_below(GRID, torch.float32)
    assert exact_below(GRID, torch.float32) == 2048
    assert any(found.error for found in reconstructions(chain, (beyond,)))


def test_check_says_whether_a_sample_is_within_the_range():
    torch.manual_seed(0)
    coupling = AdditiveCoupling(nn.Linear(3, 3), nn.Linear(3, 3), grid=GRID)
    sample = torch.randn(8, 6)
    assert check(coupling, sample).reconstruction_error == 0
    found = check(coupling, sample * 1e6)
    assert "leaves the range" in found.problems[0]


@pytest.mark.parametrize("gamma", [0.9, 1 / 3, 1.0])
def test_momentum_beyond_the_range_is_inexact_and_nothing_worse(gamma):
    """Steps of the grid may be more than integers count; what is not finite has to show in the loss."""
    exact, plain = (MomentumBlock(nn.Identity(), gamma=gamma, grid=grid) for grid in (2**-20, None))
    x = torch.zeros(6)
    v = torch.tensor([3000.0, -3000.0, 1e30, float("inf"), float("-inf"), float("nan")])
    found, expected = exact(x, v)[1], plain(x, v)[1]
    torch.testing.assert_close(found[:3], expected[:3])
    assert not found[3:].isfinite().any()


def test_momentum_is_exact_up_to_the_end_of_the_range():
    torch.manual_seed(0)
    for gamma in (0.9, 1 / 3, 255 / 256, 1.0):
        block = MomentumBlock(nn.Identity(), gamma=gamma, grid=2**-20)
        v = (torch.rand(1000) * 2 - 1) * 0.999 * exact_below(2**-20, torch.float32)
        x, v = torch.zeros(1000), on_grid(v, 2**-20)
        assert all(map(torch.equal, block.inverse(*block(x, v)), (x, v)))


def test_the_builders_take_a_grid():
    couplings = [m for m in revnet_digits(grid=GRID).modules() if isinstance(m, AdditiveCoupling)]
    assert couplings
    assert all(coupling.grid == GRID for coupling in couplings)

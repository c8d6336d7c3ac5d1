"""Gradients of a chain are those of plain autograd, under every schedule."""

from __future__ import annotations

import copy

import pytest
import torch
from reversible_models import (
    IMAGES,
    INVERT,
    Plain,
    assert_close,
    conv_chain,
    gradients,
    linear_chain,
    schedules,
    step,
    twins,
    uniform,
)
from torch import nn

from revdist.planning.costs import Mode
from revdist.reversible import AdditiveCoupling, ReversibleChain, ReversibleOperator


@pytest.mark.parametrize("index", range(10))
def test_every_schedule_gives_the_gradients_of_plain_autograd(index):
    torch.manual_seed(0)
    chain, plain = twins(conv_chain(dropout=0.2))
    x = torch.randn(IMAGES, dtype=torch.float64)
    expected = step(plain, x)
    schedule = schedules(chain)[index]
    chain.set_schedule(schedule)
    assert_close(step(chain, x), expected)
    for name, buffer in chain.named_buffers():
        torch.testing.assert_close(buffer, dict(_renamed(plain))[name])


def _renamed(plain: Plain):
    names = [name for name, _ in conv_chain().named_children()]
    for name, buffer in plain.named_buffers():
        _, number, rest = name.split(".", 2)
        yield f"{names[int(number)]}.{rest}", buffer


def test_float32_gradients_are_close_at_depth():
    torch.manual_seed(0)
    chain, plain = twins(ReversibleChain([AdditiveCoupling(_smooth(8), _smooth(8)) for _ in range(50)]))
    x = torch.randn(16, 16)
    expected = step(plain, x)
    chain.set_schedule(uniform(chain, *INVERT))
    actual = step(chain, x)
    error = sum(float((a - b).square().sum()) for a, b in zip(actual, expected, strict=True)) ** 0.5
    norm = sum(float(b.square().sum()) for b in expected) ** 0.5
    assert error / norm < 2e-5


def _smooth(width: int) -> nn.Module:
    last = nn.Linear(width, width)
    nn.init.normal_(last.weight, std=0.05)
    return nn.Sequential(nn.Linear(width, width), nn.SiLU(), last)


def test_gradcheck_through_inversion():
    torch.manual_seed(0)
    chain = linear_chain(2, 4)
    chain.set_schedule(uniform(chain, *INVERT))
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(chain, (x,))
    assert torch.autograd.gradgradcheck(chain, (x,))


def test_pair_in_pair_out():
    torch.manual_seed(0)
    chain, plain = twins(linear_chain())
    chain.set_schedule(uniform(chain, *INVERT))
    halves = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    y1, y2 = chain(halves)
    (y1.square().sum() + y2.sum()).backward()
    y = plain(torch.cat(halves, dim=1))
    (y[:, :3].square().sum() + y[:, 3:].sum()).backward()
    assert_close(gradients(chain), gradients(plain))


def test_gradient_through_one_output_only():
    torch.manual_seed(0)
    chain, plain = twins(linear_chain())
    chain.set_schedule(uniform(chain, *INVERT))
    halves = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    chain(halves)[0].square().sum().backward()
    plain(torch.cat(halves, dim=1))[:, :3].square().sum().backward()
    assert_close(gradients(chain), gradients(plain))


def test_halves_of_unequal_size_around_an_ordinary_operator():
    torch.manual_seed(0)

    def build():
        return ReversibleChain(
            [
                AdditiveCoupling(nn.Linear(2, 3), nn.Linear(3, 2)),
                nn.Linear(5, 5),
                AdditiveCoupling(nn.Linear(2, 3), nn.Linear(3, 2)),
            ]
        ).double()

    chain = build()
    plain = copy.deepcopy(chain)
    x = torch.randn(4, 5, dtype=torch.float64)
    expected = step(plain, x)
    for schedule in schedules(chain):
        chain.set_schedule(schedule)
        assert_close(step(chain, x), expected)
    pair = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    assert [half.shape for half in chain(pair)] == [half.shape for half in pair]


class Rotation(ReversibleOperator):
    """One stream: multiplies by an orthogonal matrix, then shifts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.generator = nn.Parameter(torch.randn(width, width))
        self.shift = nn.Parameter(torch.randn(width))

    def matrix(self):
        return torch.linalg.matrix_exp(self.generator - self.generator.T)

    def forward(self, x):
        return torch.tanh(x @ self.matrix() * 0.1) + self.shift

    def inverse(self, y):
        return torch.atanh(y - self.shift) / 0.1 @ self.matrix().T


class Swap(ReversibleOperator):
    """Two streams, no parameters, nothing saved."""

    num_streams = 2

    def forward(self, x1, x2):
        return x2, x1

    def inverse(self, y1, y2):
        return y2, y1


def test_operators_of_the_users_own():
    torch.manual_seed(0)
    chain = ReversibleChain(
        [nn.Linear(6, 6), Rotation(6), AdditiveCoupling(nn.Linear(3, 3), nn.Tanh()), Swap(), Rotation(6)]
    ).double()
    x = torch.randn(5, 6, dtype=torch.float64) * 0.3
    expected = step(chain, x)
    for schedule in schedules(chain, num_random=12):
        chain.set_schedule(schedule)
        assert_close(step(chain, x), expected)


def test_inverting_runs_each_branch_twice_a_step():
    calls = []
    chain = linear_chain(3)
    for coupling in chain.children():
        coupling.f.register_forward_pre_hook(lambda *_: calls.append(1))
    chain.set_schedule(uniform(chain, *INVERT))
    chain(torch.randn(2, 6, dtype=torch.float64)).sum().backward()
    assert len(calls) == 6


def test_saving_runs_each_branch_once():
    calls = []
    chain = linear_chain(3)
    for coupling in chain.children():
        coupling.f.register_forward_pre_hook(lambda *_: calls.append(1))
    chain(torch.randn(2, 6, dtype=torch.float64)).sum().backward()
    assert len(calls) == 3


def test_schedules_switch_between_steps_and_a_forward_keeps_its_own():
    torch.manual_seed(0)
    chain, plain = twins(linear_chain())
    x = torch.randn(4, 6, dtype=torch.float64)
    chain.set_schedule(uniform(chain, *INVERT))
    loss = chain(x).square().sum()
    chain.set_schedule(uniform(chain, Mode.SAVE))
    loss.backward()
    plain(x).square().sum().backward()
    assert_close(gradients(chain), gradients(plain))


def test_gradients_accumulate_over_forwards_that_are_alive_together():
    torch.manual_seed(0)
    chain, plain = twins(conv_chain(1, dropout=0.3))
    chain.set_schedule(uniform(chain, *INVERT))
    batches = torch.randn(3, *IMAGES, dtype=torch.float64)
    for model in (chain, plain):
        torch.manual_seed(5)
        losses = [model(x).square().sum() for x in batches]
        for loss in losses:
            loss.backward()
    assert_close(gradients(chain), gradients(plain))

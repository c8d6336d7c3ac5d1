"""Whatever autograd offers works through a chain."""

from __future__ import annotations

import gc

import pytest
import torch
from reversible_models import (
    INVERT,
    assert_close,
    conv_chain,
    gradients,
    images,
    linear_chain,
    schedules,
    step,
    twins,
    uniform,
)
from torch import nn

from revdist.planning.costs import Mode
from revdist.reversible import AdditiveCoupling, ReversibleChain, find_chain


def test_double_backward(modes):
    torch.manual_seed(0)
    chain, plain = twins(linear_chain())
    chain.set_schedule(uniform(chain, *modes))
    x = torch.randn(4, 6, dtype=torch.float64)
    for model in (chain, plain):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
        gradient.square().sum().backward()
    assert_close(gradients(chain), gradients(plain))


@pytest.mark.parametrize("schedule", range(8))
def test_backward_twice_and_thrice_with_retain_graph(schedule):
    torch.manual_seed(0)
    chain, plain = twins(conv_chain(1, dropout=0.2))
    chain.set_schedule(schedules(chain)[schedule])
    x = images()
    for model in (chain, plain):
        torch.manual_seed(2)
        loss = model(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
        loss.backward()
    assert_close(gradients(chain), gradients(plain))


def test_backward_twice_without_retain_graph_raises_as_in_plain_autograd(modes):
    chain = conv_chain(1)
    chain.set_schedule(uniform(chain, *modes))
    loss = chain(images()).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_autograd_grad_on_parameters(modes):
    torch.manual_seed(0)
    chain, plain = twins(conv_chain(1))
    chain.set_schedule(uniform(chain, *modes))
    x = images()
    for index in (0, 3, 7):
        mine = torch.autograd.grad(chain(x).square().sum(), list(chain.parameters())[index])
        theirs = torch.autograd.grad(plain(x).square().sum(), list(plain.parameters())[index])
        assert_close(mine, theirs)
    mine = torch.autograd.grad(chain(x).square().sum(), list(chain.parameters()))
    assert_close(mine, torch.autograd.grad(plain(x).square().sum(), list(plain.parameters())))


def test_two_losses_on_one_forward(modes):
    torch.manual_seed(0)
    chain, plain = twins(linear_chain())
    chain.set_schedule(uniform(chain, *modes))
    x = torch.randn(4, 6, dtype=torch.float64)
    for model in (chain, plain):
        output = model(x)
        output[:, :2].sum().backward(retain_graph=True)
        output.square().sum().backward()
    assert_close(gradients(chain), gradients(plain))


def test_a_function_that_reads_its_saved_tensors_twice(modes):
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return x * weight

        @staticmethod
        def backward(ctx, grad):
            x = ctx.saved_tensors[0]
            weight = ctx.saved_tensors[1]
            return grad * weight, (grad * x).sum(0)

    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3))

        def forward(self, x):
            return Scale.apply(torch.tanh(x), self.weight)

    torch.manual_seed(0)
    chain, plain = twins(ReversibleChain([AdditiveCoupling(Branch(), Branch()) for _ in range(3)]).double())
    chain.set_schedule(uniform(chain, *modes))
    x = torch.randn(4, 6, dtype=torch.float64)
    assert_close(step(chain, x), step(plain, x))


def test_parameter_hooks_fire_once(modes):
    chain = conv_chain(1)
    chain.set_schedule(uniform(chain, *modes))
    fired = []
    for parameter in chain.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: fired.append(id(p)))
    chain(images()).sum().backward()
    assert sorted(fired) == sorted(id(p) for p in chain.parameters())


def test_a_chain_inside_an_operator_is_part_of_it():
    torch.manual_seed(0)
    inner = linear_chain(2, 4)
    inner.set_schedule(uniform(inner, *INVERT))
    chain = ReversibleChain([AdditiveCoupling(inner, linear_chain(1, 4)), linear_chain(2, 8)]).double()
    x = torch.randn(4, 8, dtype=torch.float64)
    expected = step(chain, x)
    for schedule in schedules(chain):
        chain.set_schedule(schedule)
        assert_close(step(chain, x), expected)
    assert find_chain(nn.Sequential(chain, nn.Linear(8, 8))) is chain


def test_gradient_checkpointing_around_the_chain(modes):
    torch.manual_seed(0)
    chain, plain = twins(conv_chain(1, dropout=0.2))
    chain.set_schedule(uniform(chain, *modes))
    x = images().requires_grad_()
    torch.manual_seed(1)
    torch.utils.checkpoint.checkpoint(chain, x, use_reentrant=False).square().sum().backward()
    torch.manual_seed(1)
    plain(x).square().sum().backward()
    assert_close(gradients(chain), gradients(plain))


@pytest.mark.slow
def test_compiled_branches(modes):
    torch.manual_seed(0)
    chain, plain = twins(linear_chain(2))
    for coupling in chain.children():
        coupling.f = torch.compile(coupling.f, backend="aot_eager")
    chain.set_schedule(uniform(chain, *modes))
    x = torch.randn(4, 6, dtype=torch.float64)
    for _ in range(2):
        assert_close(step(chain, x), step(plain, x))


@pytest.mark.parametrize("compiled", [True, False])
def test_compiled_code_runs_again_on_the_layout_it_was_made_for(compiled):
    """Halves at the end of a run are parts of one tensor; in the forward the second branch got one by itself."""
    layouts = []

    def note(run):
        def noting(*inputs):
            layouts.extend(tensor.stride() for tensor in inputs if tensor.dim() == 4)
            return run(*inputs)

        return noting

    branch = nn.Sequential(nn.ReLU(), nn.Hardtanh())
    if compiled:
        branch = torch.compile(branch, backend=lambda graph, _: note(graph.forward))
    else:
        branch[0].forward = note(branch[0].forward)
    chain = ReversibleChain([AdditiveCoupling(nn.Identity(), branch)])
    chain.set_schedule(uniform(chain, Mode.INVERT))
    chain(torch.randn(2, 4, 3, 3, requires_grad=True)).square().sum().backward()
    assert len(layouts) == 2
    assert len(set(layouts)) == (1 if compiled else 2)


def test_a_forward_that_is_never_followed_by_a_backward_leaves_nothing_behind(modes):
    chain = conv_chain(1)
    chain.set_schedule(uniform(chain, *modes))
    gc.collect()
    gc.disable()  # reference cycles would keep activations alive until the collector comes
    try:
        output = chain(images())
        assert chain.live_records()
        del output
        assert not chain.live_records()
    finally:
        gc.enable()


def test_functional_transforms_run_the_chain_plainly(modes):
    """torch.func does not allow saved-tensor hooks; gradients are right, without their memory savings."""
    torch.manual_seed(0)
    chain, plain = twins(linear_chain())
    chain.set_schedule(uniform(chain, *modes))
    x = torch.randn(6, dtype=torch.float64)

    def loss(model):
        return lambda x: model(x[None]).square().sum()

    torch.testing.assert_close(torch.func.grad(loss(chain))(x), torch.func.grad(loss(plain))(x))

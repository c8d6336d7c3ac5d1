"""Where everything is kept plain autograd runs, with nothing of the chain's in between; demotion finds it even so."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from reversible_models import assert_close, conv_branch, conv_chain, gradients, images, linear_chain, twins
from torch import nn

from revdist.planning.costs import Mode
from revdist.reversible import AdditiveCoupling, AffineCoupling, ReversibleChain
from revdist.reversible.saved_tensors import SavedTensors

ALL = 2**60


def saving(chain):
    chain.set_schedule([Mode.SAVE] * chain.num_operators)
    return chain


def learnt(chain, x, *, steps=1):
    """The chain after steps from which it knows where its operators leave what they save."""
    state, random_state = copy.deepcopy(chain.state_dict()), torch.get_rng_state()
    for _ in range(steps):
        chain(x).square().sum().backward()
    chain.load_state_dict(state)
    chain.zero_grad()
    torch.set_rng_state(random_state)
    return chain


class Square(torch.autograd.Function):
    """A node written in Python, which saves three things, one of them nothing."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x, None, scale)
        return scale * x.square()

    @staticmethod
    def backward(ctx, grad):
        x, _, scale = ctx.saved_tensors
        return 2 * grad * scale * x, (grad * x.square()).sum()


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.1))

    def forward(self, x):
        return Square.apply(x, self.scale)


class Several(nn.Module):
    """Saves lists of tensors, views of parameters, and one tensor twice."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, channels) / channels)

    def forward(self, x):
        mixed = torch.einsum("oc,bchw->bohw", self.weight.t(), x)
        parts = torch.stack([mixed.tanh(), x.sigmoid(), mixed.cos()])
        return parts.prod(0) + torch.maximum(mixed, x)


class Checkpointed(nn.Module):
    """Has hooks of its own on what it saves."""

    def __init__(self, channels):
        super().__init__()
        self.inner = conv_branch(channels)

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)


def chain_of(branch):
    torch.manual_seed(0)
    return ReversibleChain([AdditiveCoupling(branch(), branch()) for _ in range(3)]).double()


def affine():
    torch.manual_seed(0)
    branches = [nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Tanh()) for _ in range(4)]
    return ReversibleChain([AffineCoupling(*branches[:2]), AffineCoupling(*branches[2:])]).double()


def wide(batch=3):
    return torch.randn(batch, 8, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


CHAINS = {
    "convolutions, dropout": (lambda: conv_chain(1, dropout=0.2), images),
    "affine": (affine, wide),
    "python nodes": (lambda: chain_of(Scaled), wide),
    "lists and views": (lambda: chain_of(lambda: Several(4)), wide),
    "checkpointed": (lambda: chain_of(lambda: Checkpointed(4)), wide),
}


@pytest.fixture
def packs(monkeypatch):
    """What the chain's hooks have been given."""
    seen = []
    for name in ("_keep", "_note"):
        original = getattr(SavedTensors, name)

        def spied(saved, tensor, original=original):
            seen.append(saved._operator.name)
            return original(saved, tensor)

        monkeypatch.setattr(SavedTensors, name, spied)
    return seen


def test_where_everything_is_kept_no_hook_is_called(packs):
    chain = saving(conv_chain(2))
    x = images()
    learnt(chain, x)
    assert packs
    packs.clear()
    expected = gradients_of(chain, x)
    last = chain.operator_names[-1]
    assert set(packs) <= {last}  # nothing behind it could own what it leaves to autograd
    with torch.autograd.graph.save_on_cpu():  # hooks of others: the chain's take precedence again
        assert_close(gradients_of(chain, x), expected)
    assert set(packs) > {last}


def gradients_of(chain, x, *, demoted=False):
    chain.zero_grad()
    torch.manual_seed(5)
    loss = chain(x).square().sum()
    if demoted:
        chain.demote(ALL)
    loss.backward()
    return gradients(chain)


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("never_inverted", [False, True])
def test_what_was_left_to_autograd_can_be_demoted(name, never_inverted, packs):
    build, batch = CHAINS[name]
    chain, x = saving(build()), batch()
    if never_inverted:
        chain.never_inverted = frozenset(range(chain.num_operators))
    expected = gradients_of(copy.deepcopy(chain), x)
    learnt(chain, x)
    packs.clear()
    torch.manual_seed(5)
    chain.zero_grad()
    loss = chain(x).square().sum()
    left_alone = not packs or set(packs) == {chain.operator_names[-1]}
    assert left_alone or name == "checkpointed"
    released = chain.demote(ALL)
    if not never_inverted or name == "convolutions, dropout":  # else a branch that is run again saves its input alone
        assert released > 0
    if name != "checkpointed":
        assert len(set(packs)) > 1
    loss.backward()
    assert_close(gradients(chain), expected)
    assert chain.demote(ALL) == 0


def test_a_chain_that_learnt_under_other_conditions_has_right_gradients_when_demoted():
    chain, plain = twins(saving(conv_chain(1, dropout=0.2)))
    x = images().requires_grad_()
    for train, frozen, wants_input in [(True, False, False), (False, False, True), (True, True, True)] * 2:
        for model in (chain, plain):
            model.train(train)
            for parameter in list(model.parameters())[:2]:  # of the stem
                parameter.requires_grad_(not frozen)
        inputs = x if wants_input else x.detach()
        for demoted in (False, True):
            assert_close(gradients_of(chain, inputs, demoted=demoted), gradients_of(plain, inputs))


def test_a_branch_that_was_replaced_is_not_taken_for_the_one_before(packs):
    """Modules and parameters are as many, so only its nodes tell."""
    chain = saving(linear_chain(2))
    x = torch.randn(4, 6, dtype=torch.float64)
    learnt(chain, x)
    width = chain.get_submodule("1.f.0").in_features
    coupling = chain.get_submodule("1")
    coupling.f = nn.Sequential(nn.Linear(width, 5), nn.Softplus(), nn.Linear(5, width)).double()
    expected = gradients_of(copy.deepcopy(chain), x)
    for known in (False, True, True):
        packs.clear()
        assert_close(gradients_of(chain, x, demoted=True), expected)
        assert ("1.f" in packs) is known  # refused once, and learnt from the next forward on


def test_a_saved_tensor_that_was_edited_is_not_demoted_and_refused_by_autograd():
    chain = saving(conv_chain(1))
    x = images()
    learnt(chain, x)
    loss = chain(x).sum()
    x.zero_()
    chain.demote(ALL)
    with pytest.raises(Exception, match=r"modified by an inplace operation|edited in place"):
        loss.backward()


def test_demoted_before_and_not_between_two_backwards_of_a_kept_graph():
    chain = saving(conv_chain(1))
    x = images()
    once = gradients_of(copy.deepcopy(chain), x)
    learnt(chain, x)
    for demoted in (False, True):
        chain.zero_grad()
        loss = chain(x).square().sum()
        if demoted:
            assert chain.demote(ALL) > 0
        loss.backward(retain_graph=True)
        assert chain.demote(ALL) == 0
        loss.backward()
        assert_close(gradients(chain), [2 * gradient for gradient in once])


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("demoted", [False, True])
@pytest.mark.parametrize("pair", [False, True])
def test_a_forward_without_a_backward_leaves_nothing_behind(pair, demoted, mixed):
    torch.manual_seed(0)
    chain = saving(ReversibleChain([AdditiveCoupling(conv_branch(4), conv_branch(4)) for _ in range(3)]).double())
    x = tuple(wide().chunk(2, dim=1)) if pair else wide()
    if mixed:
        chain.set_schedule([Mode.SAVE, Mode.INVERT] * 3)
    gc.collect()
    gc.disable()  # cycles would keep activations alive until the collector comes
    try:
        for _ in range(3):
            outputs = chain(x)
            assert chain.live_records()
            if demoted:
                chain.demote(ALL)
            del outputs
            assert not chain.live_records()
    finally:
        gc.enable()


def test_demotion_while_the_loss_of_a_step_that_is_over_is_still_there():
    """Its nodes written in Python raise where they are asked for what the backward has freed."""
    torch.manual_seed(0)
    chain = saving(ReversibleChain([Scaled(), nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh(), nn.Conv2d(4, 4, 1))]))
    losses = []
    for _ in range(4):
        losses.append(chain(torch.randn(2, 4, 3, 3)).square().sum())
        assert chain.demote(1) > 0
        losses[-1].backward()


def test_a_chain_whose_output_needs_no_gradient_runs_again_and_again():
    class Largest(nn.Module):
        def forward(self, x):
            return x.argmax(1)

    chain = saving(ReversibleChain([nn.Conv2d(4, 4, 1), Largest()]))
    for _ in range(3):
        assert not chain(torch.randn(2, 4, 3, 3)).requires_grad


@pytest.mark.parametrize("kept", ["first", "second"])
def test_half_of_the_output_may_be_dropped(kept):
    torch.manual_seed(0)
    chain = saving(ReversibleChain([AdditiveCoupling(conv_branch(4), conv_branch(4)) for _ in range(3)]).double())
    plain = copy.deepcopy(chain)
    found = []
    for model, demoted in ((plain, False), (chain, False), (chain, False), (chain, True)):
        model.zero_grad()
        first, second = model(tuple(wide().chunk(2, dim=1)))
        half = first if kept == "first" else second
        del first, second
        if demoted:
            model.demote(ALL)
        half.square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for other in found[1:]:
        assert_close(other, found[0])


def test_a_very_long_chain_is_freed_without_deep_recursion():
    chain = saving(ReversibleChain([nn.Tanh() for _ in range(20_000)]))
    x = torch.randn(2, requires_grad=True)
    for _ in range(2):
        output = chain(x)
        del output
    chain(x).sum().backward()
    assert x.grad is not None


def test_memory_falls_during_the_backward_as_in_plain_autograd(activated):
    meter = activated(2**29).meter()
    torch.manual_seed(0)
    chain = saving(ReversibleChain([AdditiveCoupling(conv_branch(4), conv_branch(4)) for _ in range(4)]))
    stem = nn.Conv2d(3, 8, 3, padding=1)
    x = torch.randn(8, 3, 16, 16)
    for parameter in (*stem.parameters(), *chain.parameters()):
        parameter.grad = torch.zeros_like(parameter)
    levels: list[int] = []
    for parameter in chain.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: levels.append(meter.allocated_bytes()))
    freed = []
    for body in (lambda x: chain._run_plainly((x,))[0], chain, chain):
        loss = body(stem(x)).sum()
        before = meter.allocated_bytes()
        levels.clear()
        loss.backward()
        freed.append([before - level for level in levels])
        del loss
    plain, _, own = freed
    two_streams = 2 * 8 * 4 * 16 * 16 * 4
    assert all(one >= other - two_streams for one, other in zip(own, plain, strict=True))

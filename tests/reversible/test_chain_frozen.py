"""Frozen parts, and the input and output of a chain: what other runtimes break, and must not break here."""

from __future__ import annotations

import copy

import pytest
import torch
from reversible_models import (
    INVERT,
    assert_close,
    conv_chain,
    gradients,
    images,
    linear_chain,
    step,
    twins,
    uniform,
)
from torch import nn

from revdist.errors import BoundaryModified
from revdist.planning.costs import Mode
from revdist.reversible import AdditiveCoupling, ReversibleChain


def test_a_frozen_stem_and_an_input_without_grad_train_all_the_rest(modes):
    torch.manual_seed(0)
    chain, plain = twins(conv_chain())
    chain.set_schedule(uniform(chain, *modes))
    for model, stem in ((chain, chain.get_submodule("stem")), (plain, plain.elements[0])):
        stem.requires_grad_(False)
        torch.manual_seed(1)
        model(images()).square().sum().backward()
    assert all(p.grad is not None for p in chain.parameters() if p.requires_grad)
    assert_close(gradients(chain), gradients(plain))


@pytest.mark.parametrize("frozen", [(1,), (2, 3), (0, 1, 2), (1, 3, 4), (4, 5)])
def test_frozen_operators_in_the_middle(frozen, modes):
    torch.manual_seed(0)
    chain, plain = twins(conv_chain(1, affine=True))
    chain.set_schedule(uniform(chain, *modes))
    for model in (list(chain.children()), list(plain.elements)):
        for index in frozen:
            model[index].requires_grad_(False)
    x = images()
    chain(x).square().sum().backward()
    plain(x).square().sum().backward()
    assert_close(gradients(chain), gradients(plain))


def test_one_frozen_branch_of_each_coupling():
    torch.manual_seed(0)
    chain, plain = twins(conv_chain(affine=False))
    chain.set_schedule(uniform(chain, *INVERT))
    for model in (chain, plain):
        for module in model.modules():
            if isinstance(module, AdditiveCoupling):
                module.g.requires_grad_(False)
    x = images()
    chain(x).square().sum().backward()
    plain(x).square().sum().backward()
    assert_close(gradients(chain), gradients(plain))


def test_everything_frozen_and_no_input_grad_gives_no_graph():
    chain = conv_chain(1).requires_grad_(False)
    assert not chain(images()).requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_the_input_and_its_views_keep_their_values(training, modes):
    chain = conv_chain(1).train(training)
    chain.set_schedule(uniform(chain, *modes))
    x = images()
    view, copied = x[1:], x.clone()
    loss = chain(x).sum()
    assert torch.equal(x, copied)
    loss.backward()
    assert torch.equal(x, copied)
    assert torch.equal(view, copied[1:])


def test_a_skip_connection_around_the_chain(modes):
    torch.manual_seed(0)
    chain, plain = twins(linear_chain())
    chain.set_schedule(uniform(chain, *modes))
    x = torch.randn(4, 6, dtype=torch.float64)
    (chain(x) + x).square().sum().backward()
    (plain(x) + x).square().sum().backward()
    assert_close(gradients(chain), gradients(plain))


@pytest.mark.parametrize("in_place", [False, True])
def test_a_relu_before_the_chain(in_place, modes):
    torch.manual_seed(0)
    chain, plain = twins(linear_chain())
    chain.set_schedule(uniform(chain, *modes))
    before = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=in_place)).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    assert_close(step(nn.Sequential(before, chain), x), step(nn.Sequential(copy.deepcopy(before), plain), x))


def test_editing_the_output_in_place_is_refused_when_it_is_rebuilt_from():
    chain = linear_chain()
    chain.set_schedule(uniform(chain, *INVERT))
    output = chain(torch.randn(4, 6, dtype=torch.float64))
    output.mul_(2)
    with pytest.raises(BoundaryModified, match="the output of the chain was edited in place"):
        output.sum().backward()


def test_editing_a_view_of_the_output_in_place_is_refused():
    chain = linear_chain()
    chain.set_schedule(uniform(chain, *INVERT))
    output = chain(torch.randn(4, 6, dtype=torch.float64))
    output[:, 2].zero_()
    with pytest.raises(BoundaryModified):
        output.sum().backward()


def test_editing_the_output_in_place_is_fine_when_nothing_is_rebuilt_from_it():
    torch.manual_seed(0)
    chain, plain = twins(linear_chain())
    x = torch.randn(4, 6, dtype=torch.float64)
    chain(x).mul_(2).sum().backward()
    plain(x).mul_(2).sum().backward()
    assert_close(gradients(chain), gradients(plain))


def test_editing_the_input_in_place_is_refused_when_it_is_needed():
    chain = conv_chain(1)
    chain.set_schedule(uniform(chain, Mode.RECOMPUTE))
    x = images()
    loss = chain(x).sum()
    x.zero_()
    with pytest.raises(BoundaryModified, match="the input of operator stem"):
        loss.backward()


def test_editing_a_saved_tensor_in_place_is_refused():
    chain = conv_chain(1)
    x = images()
    loss = chain(x).sum()
    x.zero_()
    with pytest.raises(BoundaryModified, match="operator stem"):
        loss.backward()


def test_an_operator_that_edits_its_input_in_place_is_refused_at_once():
    chain = ReversibleChain({"linear": nn.Linear(6, 6), "relu": nn.ReLU(inplace=True)})
    with pytest.raises(BoundaryModified, match="the input of operator relu"):
        chain(torch.randn(2, 6))


def test_stepping_the_optimizer_before_the_backward_is_refused():
    chain = linear_chain()
    chain.set_schedule(uniform(chain, *INVERT))
    loss = chain(torch.randn(4, 6, dtype=torch.float64)).sum()
    with torch.no_grad():
        chain.get_parameter("1.f.0.bias").add_(1)
    with pytest.raises(BoundaryModified, match=r"a parameter of operator 1\.f"):
        loss.backward()


def test_giving_a_parameter_other_data_before_the_backward_is_refused():
    chain = linear_chain()
    chain.set_schedule(uniform(chain, *INVERT))
    loss = chain(torch.randn(4, 6, dtype=torch.float64)).sum()
    bias = chain.get_parameter("1.f.0.bias")
    bias.data = bias.data * 1.5
    with pytest.raises(BoundaryModified, match=r"a parameter of operator 1\.f"):
        loss.backward()


def test_editing_a_frozen_weight_before_the_backward_is_refused():
    """Its operator saves nothing else, so nothing of it is rebuilt or looked at otherwise."""
    chain = ReversibleChain({"stem": nn.Linear(6, 6), "frozen": nn.Linear(6, 6).requires_grad_(False)})
    loss = chain(torch.randn(2, 6)).sum()
    with torch.no_grad():
        chain.get_parameter("frozen.weight").mul_(2)
    with pytest.raises(BoundaryModified, match="operator frozen"):
        loss.backward()

"""Every operator, under every mode and mixtures of them, has the gradients of plain autograd."""

import copy

import pytest
import torch
from operator_cases import CASES, all_invert, distance, schedules, step
from torch import Tensor

from revdist.planning.costs import Mode

names = pytest.mark.parametrize("name", CASES)


@names
def test_gradients_in_double_precision(name: str) -> None:
    chain, inputs = CASES[name].build()
    expected = step(chain, inputs, None)
    for schedule in schedules(chain):
        found = step(chain, inputs, schedule)
        assert distance(found.gradients, expected.gradients) < 1e-9, schedule
        for out, reference in zip(found.outputs, expected.outputs, strict=True):
            torch.testing.assert_close(out, reference, rtol=0, atol=0)


@names
def test_gradients_in_single_precision(name: str) -> None:
    chain, inputs = CASES[name].build(torch.float32)
    expected = step(chain, inputs, None)
    for schedule in schedules(chain, num_mixed=2):
        assert distance(step(chain, inputs, schedule).gradients, expected.gradients) < 2e-5, schedule


@names
def test_gradients_under_autocast(name: str) -> None:
    chain, inputs = CASES[name].build(torch.float32)
    expected = step(chain, inputs, None, autocast=True)
    for schedule in schedules(chain, num_mixed=2):
        found = step(chain, inputs, schedule, autocast=True)
        assert distance(found.gradients, expected.gradients) < CASES[name].tolerance_bf16, schedule


@names
def test_inputs_need_no_gradient(name: str) -> None:
    chain, inputs = CASES[name].build()
    expected = step(chain, inputs, None, needs_grad=False)
    found = step(chain, inputs, all_invert(chain), needs_grad=False)
    assert distance(found.gradients, expected.gradients) < 1e-9


@names
def test_frozen_parameters_before_trainable_ones(name: str) -> None:
    chain, inputs = CASES[name].build()
    for parameter in list(chain.parameters())[:-1]:
        parameter.requires_grad_(False)
    expected = step(chain, inputs, None)
    found = step(chain, inputs, all_invert(chain))
    assert distance(found.gradients, expected.gradients) < 1e-9


@names
def test_buffers_are_updated_once(name: str) -> None:
    chain, inputs = CASES[name].build()
    expected = step(chain, inputs, None).buffers
    for schedule in schedules(chain, num_mixed=1):
        for key, value in step(chain, inputs, schedule).buffers.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-12, atol=1e-12, msg=f"{key}: {schedule}")


@names
def test_evaluation_and_no_grad_agree_with_plain(name: str) -> None:
    chain, inputs = CASES[name].build()
    chain.eval()
    expected = step(chain, inputs, None)
    found = step(chain, inputs, all_invert(chain))
    assert distance(found.gradients, expected.gradients) < 1e-9
    with torch.no_grad():
        outputs = chain(inputs[0] if len(inputs) == 1 else inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    for out, reference in zip(outputs, expected.outputs, strict=True):
        torch.testing.assert_close(out, reference, rtol=0, atol=0)


@names
def test_gradcheck_of_inverting(name: str) -> None:
    chain, inputs = CASES[name].build()
    if name == "momentum_exact":
        pytest.skip("rounding to a grid has no numerical derivative; its gradients are compared above")
    chain.set_schedule(all_invert(chain))

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(5)  # the same dropout and the same hashes at every evaluation
        outputs = chain(tensors[0] if len(tensors) == 1 else tensors)
        return (outputs,) if isinstance(outputs, Tensor) else outputs

    leaves = (
        tuple(x[:1].requires_grad_() for x in inputs)
        if "abn" not in name
        else tuple(x.requires_grad_() for x in inputs)
    )
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True, atol=1e-6)


@names
def test_second_derivatives(name: str) -> None:
    chain, inputs = CASES[name].build()

    def penalty(schedule: tuple[Mode, ...] | None) -> dict[str, Tensor]:
        torch.manual_seed(1)
        chain.set_schedule(schedule or (Mode.SAVE,) * chain.num_operators)
        leaves = tuple(x.detach().clone().requires_grad_() for x in inputs)
        outputs = chain(leaves[0] if len(leaves) == 1 else leaves)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        loss = sum(out.pow(3).sum() for out in outputs)
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        norm = sum(g.square().sum() for g in first)
        sources = dict(chain.named_parameters())
        found = torch.autograd.grad(norm, list(sources.values()), allow_unused=True)
        return {key: g for key, g in zip(sources, found, strict=True) if g is not None}

    assert distance(penalty(all_invert(chain)), penalty(None)) < 1e-8


@names
def test_a_graph_can_be_run_backward_twice(name: str) -> None:
    chain, inputs = CASES[name].build()
    chain.set_schedule(all_invert(chain))
    outputs = chain(inputs[0] if len(inputs) == 1 else inputs)
    loss = sum(out.square().sum() for out in ((outputs,) if isinstance(outputs, Tensor) else outputs))
    parameters = list(chain.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(loss, parameters, allow_unused=True)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@names
def test_what_is_saved_can_be_released_within_the_step(name: str) -> None:
    chain, inputs = CASES[name].build()
    expected = step(chain, inputs, None).gradients
    chain.set_schedule((Mode.SAVE,) * chain.num_operators)
    before = copy.deepcopy(chain.state_dict())
    torch.manual_seed(1)
    leaves = tuple(x.clone().requires_grad_() for x in inputs)
    outputs = chain(leaves[0] if len(leaves) == 1 else leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    assert chain.demote(2**40) > 0
    generator = torch.Generator().manual_seed(3)
    loss = sum((out * torch.randn(out.shape, generator=generator)).tanh().sum() for out in outputs)
    sources = dict(chain.named_parameters()) | {f"input{i}": leaf for i, leaf in enumerate(leaves)}
    found = torch.autograd.grad(loss, list(sources.values()), allow_unused=True)
    chain.load_state_dict(before)
    gradients = {key: g for key, g in zip(sources, found, strict=True) if g is not None}
    assert distance(gradients, expected) < 1e-9


@names
def test_copies_and_state_dicts_carry_over(name: str) -> None:
    chain, inputs = CASES[name].build()
    expected = step(chain, inputs, None)
    twin = copy.deepcopy(chain)
    twin.load_state_dict(chain.state_dict())
    assert distance(step(twin, inputs, all_invert(twin)).gradients, expected.gradients) < 1e-9

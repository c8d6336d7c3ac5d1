"""The RevNet family: parameter counts of the paper, shapes, and gradients under any schedule."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from revdist import models
from revdist.errors import UsageError
from revdist.planning.costs import Mode
from revdist.reversible import AdditiveCoupling, find_chain

torch.set_num_threads(1)


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("factory", "num_classes", "millions", "num_reversible"),
    [
        (models.revnet38, 10, 0.46, 6),
        (models.revnet110, 10, 1.73, 24),
        (models.revnet164, 10, 1.75, 24),
        (models.revnet56, 1000, 27.55, 5),
        (models.revnet104, 1000, 45.43, 13),
    ],
)
def test_sizes_are_those_of_the_paper(factory, num_classes, millions, num_reversible):
    with torch.device("meta"):
        model = factory(num_classes=num_classes)
    assert round(num_parameters(model) / 1e6, 2) == millions
    couplings = [module for module in model.modules() if isinstance(module, AdditiveCoupling)]
    assert len(couplings) == num_reversible
    assert find_chain(model) is model.chain


@pytest.mark.parametrize(
    ("factory", "shape", "num_classes"),
    [
        (models.revnet38, (2, 3, 32, 32), 7),
        (models.revnet164, (2, 3, 32, 32), 10),
        (models.revnet_digits, (2, 1, 8, 8), 10),
        (models.revnet56, (1, 3, 64, 64), 5),
    ],
)
def test_images_to_logits(factory, shape, num_classes):
    model = factory(num_classes=num_classes).eval()
    with torch.no_grad():
        assert model(torch.randn(shape)).shape == (shape[0], num_classes)


def test_operators_have_readable_names():
    names = models.revnet_digits(units=(2, 1)).chain.operator_names
    assert names == ("stem", "stage1_unit1", "stage1_unit2.f", "stage1_unit2.g", "stage2_unit1", "head")


def test_gradients_are_the_same_whether_saved_or_rebuilt():
    torch.manual_seed(0)
    saved = models.revnet_digits(units=(3, 2), filters=(8, 8, 16)).double()
    rebuilt = copy.deepcopy(saved)
    rebuilt.chain.set_schedule([modes[1] for modes in rebuilt.chain.options()])
    assert Mode.INVERT in rebuilt.chain.schedule
    images, target = torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.tensor([1, 2, 3, 4])
    for model in (saved, rebuilt):
        nn.functional.cross_entropy(model(images), target).backward()
    for one, other in zip(saved.parameters(), rebuilt.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("units", "filters", "bottleneck", "message"),
    [
        ((3, 3), (32, 32), False, "2 stages need 3 filter counts"),
        ((3, 0), (32, 32, 64), False, "at least one unit"),
        ((), (32,), False, "at least one unit"),
        ((3,), (32, 33), False, "multiples of 2"),
        ((3,), (32, 36), True, "multiples of 8"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(units, filters, bottleneck, message):
    with pytest.raises(UsageError, match=message):
        models.RevNet(units, filters, num_classes=10, bottleneck=bottleneck)

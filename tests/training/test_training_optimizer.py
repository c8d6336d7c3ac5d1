"""The optimizer, its schedule and the memory its state takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from revdist.config import OptimizerConfig
from revdist.errors import FactoryError
from revdist.training.optimizer import (
    build_optimizer,
    coming_state_bytes,
    learning_rate_factor,
    set_learning_rate,
    state_bytes,
)

OPTIMIZERS = [
    ("SGD", {"lr": 0.1, "momentum": 0}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("Adam", {}),
    ("AdamW", {"amsgrad": True}),
    ("RMSprop", {"momentum": 0.5}),
    ("Adagrad", {}),
    ("NAdam", {}),
    ("Adafactor", {}),
    ("ASGD", {}),
    ("AdamW", {"fused": True}),
]


@pytest.mark.parametrize(("name", "kwargs"), OPTIMIZERS)
def test_state_is_counted_before_it_exists(name: str, kwargs: dict[str, Any]) -> None:
    config = OptimizerConfig(factory=f"torch.optim:{name}", kwargs=kwargs)
    model = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.Linear(20, 5))
    counted = coming_state_bytes(config, list(model.parameters()))
    optimizer = build_optimizer(config, list(model.parameters()))
    model(torch.ones(1, 30)).sum().backward()
    optimizer.step()
    assert counted == state_bytes(optimizer)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("LBFGS", {}),  # its step needs a closure
        ("Adam", {"capturable": True}),  # asserts that parameters are on a GPU
        ("RMSprop", {"capturable": True}),
    ],
)
def test_an_optimizer_that_cannot_rehearse_is_taken_to_keep_two_tensors_a_parameter(
    name: str, kwargs: dict[str, Any]
) -> None:
    config = OptimizerConfig(factory=f"torch.optim:{name}", kwargs=kwargs)
    assert coming_state_bytes(config, [torch.nn.Parameter(torch.zeros(10))]) == 80


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [0.5, 1, 1, 1, 1]), ("linear", [0.5, 1, 1, 0.75, 0.5]), ("cosine", [0.5, 1, 1, 0.853553, 0.5])],
)
def test_the_learning_rate_warms_up_and_follows_its_schedule(schedule: Any, expected: list[float]) -> None:
    config = OptimizerConfig(schedule=schedule, warmup_steps=2)
    assert [learning_rate_factor(config, step, 6) for step in range(5)] == pytest.approx(expected)


def test_each_group_keeps_its_own_rate() -> None:
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": 0.4}, {"params": [torch.zeros(1)]}], lr=0.2)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    set_learning_rate(optimizer, 0.5)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.05]


def test_something_else_than_an_optimizer_is_refused() -> None:
    with pytest.raises(FactoryError, match="not a torch"):
        build_optimizer(OptimizerConfig(factory="builtins:list", kwargs={}), [torch.nn.Parameter(torch.zeros(1))])

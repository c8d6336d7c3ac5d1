"""What a run is made of is checked before anything is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from replicas import run_config

from revdist.errors import BudgetTooSmall, ConfigError, FactoryError, OutOfDeviceMemory, UsageError
from revdist.training.parts import build_parts
from revdist.training.shortage import explain_shortage

CPU = torch.device("cpu")


def test_every_rank_builds_the_same_model() -> None:
    config = run_config(seed=4)
    first, again = (build_parts(config, CPU).model.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert first["0.weight"].dtype == torch.float64


def test_the_length_follows_from_epochs_and_batch() -> None:
    parts = build_parts(run_config(global_batch=12, epochs=3), CPU)
    assert parts.num_steps == 15
    assert parts.order.num_samples == 50


@pytest.mark.parametrize(
    ("error", "changes", "said"),
    [
        (FactoryError, {"model": {"factory": "small_models:classifier", "kwargs": {"width": 3}}}, "width=3"),
        (FactoryError, {"model": {"factory": "builtins:dict"}}, "gave a dict, not a torch.nn.Module"),
        (ConfigError, {"model": {"factory": "torch.nn:Identity"}}, "without a trainable parameter"),
        (
            UsageError,
            {"model": {"factory": "torch.nn:Linear", "kwargs": {"in_features": 1, "out_features": 1}}},
            "chain",
        ),
        (FactoryError, {"data": {"factory": "builtins:int"}}, "must give"),
        (ConfigError, {"data": {"factory": "small_models:images", "kwargs": {"num_samples": 0}}}, "no sample"),
        (ConfigError, {"global_batch": 51}, "50 training samples"),
        (FactoryError, {"loss": "torch:no_such_loss"}, "no_such_loss"),
    ],
)
def test_what_cannot_be_trained_says_why(error: type[UsageError], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(error, match=said):
        build_parts(run_config(**changes), CPU)


def test_a_device_without_room_says_how_much_the_smallest_plan_needs(ledger_device: Any) -> None:
    device = ledger_device(40 * 1024)
    device.activate()
    error = explain_shortage(run_config(micro_batch=12), device, free_bytes=40 * 1024)
    assert isinstance(error, BudgetTooSmall)
    assert "40.0 KiB" in str(error)
    assert "cpu-0" in str(error)
    # The smallest plan is the margin of 1 MiB and one micro-batch of 12 small images.
    assert 2**20 < error.minimum_bytes < 2 * 2**20


def test_a_device_that_should_have_had_room_is_not_said_to_miss_a_byte(ledger_device: Any) -> None:
    device = ledger_device(2**26)
    device.activate()
    error = explain_shortage(run_config(micro_batch=12), device, free_bytes=2**26)
    assert isinstance(error, OutOfDeviceMemory)
    assert error.facts["needed_bytes"] < 2**26
    assert "64.0 MiB were free" in str(error)
    assert "revdist devices" in str(error)

"""What training takes besides activations: predicted before the first step, never less than measured."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from replicas import assert_no_failure, run_config, run_replicas
from torch import nn

from revdist.config import OptimizerConfig
from revdist.devices.cpu import CpuDevice
from revdist.training.optimizer import build_optimizer, step_peak_bytes
from revdist.training.replicated import Replicated
from revdist.training.reports import PlanReport

pytestmark = pytest.mark.usefixtures("devices_folder")

KIB = 2**10
OPTIMIZERS = [
    ("SGD", {"lr": 0.1, "momentum": 0}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
    ("Adam", {"weight_decay": 0.1}),
    ("AdamW", {"amsgrad": True}),
    ("AdamW", {"fused": True}),
    ("Adadelta", {}),
    ("Adagrad", {}),
    ("RMSprop", {"momentum": 0.5}),
    ("Rprop", {}),
]


@pytest.fixture
def meter():
    device = CpuDevice.open("memory", capacity_bytes=2**30)
    device.activate()
    if not device.enforced:
        pytest.skip("no C++ compiler: the CPU device counts nothing")
    yield device.meter()
    device.deactivate()


def settled_bytes(meter):
    """Gloo's own thread lets go of what it has broadcast a moment later."""
    bytes_, last = meter.allocated_bytes(), -1
    while bytes_ != last:
        time.sleep(0.1)
        last, bytes_ = bytes_, meter.allocated_bytes()
    return bytes_


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(("name", "kwargs"), OPTIMIZERS)
def test_the_optimizer_step_needs_no_more_than_predicted(name, kwargs, foreach, meter):
    if kwargs.get("fused") and foreach:
        pytest.skip("one or the other")
    config = OptimizerConfig(factory=f"torch.optim:{name}", kwargs={**kwargs, "foreach": foreach})
    parameters = [nn.Parameter(torch.randn(size, 256)) for size in (256, 128, 1024, 512, 1024, 64)]
    predicted = step_peak_bytes(config, parameters, meter)
    optimizer = build_optimizer(config, parameters)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    before = meter.allocated_bytes()
    meter.reset_peak()
    optimizer.step()
    measured = meter.peak_bytes() - before
    largest = max(parameter.nbytes for parameter in parameters)
    assert measured <= predicted <= measured * 1.1 + largest + KIB


def test_an_optimizer_that_cannot_rehearse_is_taken_to_need_two_tensors_a_parameter(meter):
    config = OptimizerConfig(factory="torch.optim:LBFGS", kwargs={})
    assert step_peak_bytes(config, [nn.Parameter(torch.zeros(10))], meter) == 80


@pytest.mark.parametrize("as_view", [True, False])
def test_gradients_and_buckets_are_there_before_the_first_step(as_view, meter):
    """Also where the first step accumulates: its gradients lie in the buckets, or where they will stay."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(6)))
        batch = torch.randn(1, 128), torch.zeros(1, dtype=torch.long)
        parameter_bytes = sum(parameter.nbytes for parameter in model.parameters())
        before = meter.allocated_bytes()
        replicated = Replicated(model, nn.functional.cross_entropy, "fp32", gradient_as_bucket_view=as_view)
        fixed = settled_bytes(meter) - before
        assert fixed == pytest.approx(parameter_bytes * (1 if as_view else 2), rel=0.01)
        temporaries = parameter_bytes // 6 + 8 * KIB
        for _ in range(3):
            replicated.start_step()
            meter.reset_peak()
            for reduce in (False, True):
                replicated.backward(batch, 1.0, reduce=reduce)
            assert meter.peak_bytes() - before <= fixed + max(temporaries, replicated.rebuild_bytes + KIB)
        replicated.disconnect()
    finally:
        dist.destroy_process_group()


WHOLE = {
    "activations dominate": ({"depth": 6, "norm": True}, {"size": 24}, {}),
    "plain SGD that accumulates": (
        {"depth": 6, "norm": True},
        {"size": 24},
        {"kwargs": {"lr": 0.01, "momentum": 0}},
    ),
    "parameters dominate": ({"depth": 2, "wide": True}, {"size": 6}, {"factory": "torch.optim:AdamW", "kwargs": {}}),
}


@pytest.mark.parametrize("schedule", ["save", "invert"])
@pytest.mark.parametrize("name", WHOLE)
def test_no_step_of_a_run_takes_more_than_its_plan_predicts(name: str, schedule: str, tmp_path: Path) -> None:
    model, data, optimizer = WHOLE[name]
    changes: dict[str, Any] = {"optimizer": optimizer} if optimizer else {}
    config = run_config(
        model={"factory": "small_models:classifier", "kwargs": model},
        data={"factory": "small_models:images", "kwargs": data},
        planning={"schedule": schedule, "profile_repeats": 1, "profile_cache": False, "profile_first": True},
        precision="fp32",
        micro_batch=6,
        epochs=None,
        steps=4,
        **changes,
    )
    outcome = run_replicas([config], [(12,)], tmp_path)
    assert_no_failure(outcome)
    plan, *later = (report.plan for report in outcome.of_kind(PlanReport))
    assert all(each.schedule.modes == plan.schedule.modes for each in later)  # the solver's plan may come in time
    peaks = [step.rows[0].peak_bytes for step in outcome.steps()]
    assert max(peaks) <= plan.predicted_peak_bytes <= max(peaks) * 1.05 + 4 * KIB

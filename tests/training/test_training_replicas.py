"""Replicas with unequal shares and different schedules train as one process does on the whole batch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from replicas import assert_no_failure, run_config, run_replicas
from small_models import classifier, images

from revdist.config import RunConfig
from revdist.training.data import DataOrder, fetch
from revdist.training.optimizer import learning_rate_factor
from revdist.training.reports import EndReport, EventReport, PlanReport

pytestmark = pytest.mark.usefixtures("devices_folder")


def train_alone(
    config: RunConfig, *, dtype: torch.dtype, left_out: Collection[int] = (), **model: Any
) -> dict[str, torch.Tensor]:
    """The whole run in one process, written as anyone would: final parameters by name. left_out: steps not taken."""
    torch.manual_seed(config.seed)
    network = classifier(**model).to(dtype)
    optimizer = torch.optim.SGD(network.parameters(), **config.optimizer.kwargs)
    train, _ = images()
    order = DataOrder(num_samples=len(train), global_batch=config.global_batch, seed=config.seed)
    num_steps = order.num_steps(epochs=config.epochs, steps=config.steps)
    for step in range(num_steps):
        if step in left_out:
            continue
        inputs, target = fetch(train, order.batch(step))
        optimizer.zero_grad()
        F.cross_entropy(network(inputs.to(dtype)), target).backward()
        if config.optimizer.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(network.parameters(), config.optimizer.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = config.optimizer.kwargs["lr"] * learning_rate_factor(config.optimizer, step, num_steps)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in network.named_parameters()}


def largest_difference(state: dict[str, torch.Tensor], alone: dict[str, torch.Tensor]) -> float:
    """Of all parameters, relative to the largest entry of each."""
    return max(
        float((state[f"model/{name}"] - parameter).abs().max() / parameter.abs().max())
        for name, parameter in alone.items()
    )


def in_modes(schedules: Sequence[str], *, profile_first: bool = False, **changes: Any) -> list[RunConfig]:
    """A configuration per rank, each with its own schedule."""
    planning = {"profile_repeats": 1, "profile_cache": False, "profile_first": profile_first}
    return [run_config(planning={**planning, "schedule": schedule}, **changes) for schedule in schedules]


def test_unequal_shares_and_schedules_give_the_weights_of_one_process(tmp_path: Path) -> None:
    configs = in_modes(["save", "invert"], optimizer={"kwargs": {"lr": 0.05, "momentum": 0.9}, "clip_norm": 0.5})
    outcome = run_replicas(configs, [(9, 3)], tmp_path)
    assert_no_failure(outcome)
    assert {report.plan.schedule.strip for report in outcome.of_kind(PlanReport)} == {"SSSSSS", "IIIIII"}
    assert largest_difference(outcome.state(), train_alone(configs[0], dtype=torch.float64)) < 1e-10


def test_changing_shares_use_every_sample_once_and_change_no_weight(tmp_path: Path) -> None:
    configs = in_modes(["invert", "save"], micro_batch=2)
    generations = [(9, 3), (1, 11), (6, 6), (11, 1), (4, 8)]
    outcome = run_replicas(configs, generations, tmp_path)
    assert_no_failure(outcome)
    steps = outcome.steps()
    # An order given after a step reaches the agreement of the next one: each generation holds for two steps.
    assert [tuple(row.share for row in step.rows) for step in steps] == [g for g in generations for _ in range(2)]
    assert [sum(row.samples for row in step.rows) for step in steps] == [12, 12, 12, 12, 2] * 2
    assert largest_difference(outcome.state(), train_alone(configs[0], dtype=torch.float64)) < 1e-10


def test_single_precision_differs_by_rounding_only(tmp_path: Path) -> None:
    configs = in_modes(["save", "invert"], precision="fp32")
    outcome = run_replicas(configs, [(5, 7)], tmp_path)
    assert_no_failure(outcome)
    # 10 steps of a 3-block network: rounding of 2**-24 a sum, INVERT's reconstruction included.
    assert largest_difference(outcome.state(), train_alone(configs[0], dtype=torch.float32)) < 2e-5


@pytest.mark.parametrize(
    ("phase", "passes", "micro_batch"),
    [("forward", [2], None), ("backward", [2], None), ("first backward", [4], 3)],
    ids=["forward", "backward", "before the first gradient of a step's last micro-batch"],
)
def test_a_rank_out_of_memory_loses_no_step_and_no_sample(
    phase: str, passes: list[int], micro_batch: int | None, tmp_path: Path
) -> None:
    model = {"factory": "small_models:short_of_memory", "kwargs": {"rank": 1, "passes": passes, "phase": phase}}
    configs = in_modes(["auto", "auto"], profile_first=True, model=model, steps=4, epochs=None, micro_batch=micro_batch)
    outcome = run_replicas(configs, [(6, 6)], tmp_path)
    assert_no_failure(outcome)
    shortages = [event for event in outcome.of_kind(EventReport) if event.kind == "out-of-memory"]
    assert [event.rank for event in shortages] == [1]
    assert [step.step for step in outcome.steps()] == [1, 2, 3, 4]
    assert largest_difference(outcome.state(), train_alone(configs[0], dtype=torch.float64)) < 1e-10


def test_a_stopped_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    configs = in_modes(["save", "invert"])
    stopped = run_replicas(configs, [(9, 3)], tmp_path, stop_after=3)
    assert_no_failure(stopped)
    assert [end.stopped for end in stopped.of_kind(EndReport)] == [True, True]
    assert stopped.steps()[-1].step == 4  # asked after step 3, agreed on in step 4
    resumed = run_replicas(configs, [(2, 10)], tmp_path, resume=True)
    assert_no_failure(resumed)
    assert [step.step for step in resumed.steps()] == list(range(5, 11))
    assert largest_difference(resumed.state(), train_alone(configs[0], dtype=torch.float64)) < 1e-10


def test_the_score_is_that_of_the_whole_test_data(tmp_path: Path) -> None:
    outcome = run_replicas(in_modes(["save", "invert"], steps=1, epochs=None), [(11, 1)], tmp_path)
    assert_no_failure(outcome)
    scores = [end.score for end in outcome.of_kind(EndReport)]
    assert scores[0] == scores[1]
    assert scores[0].samples == 21
    state = outcome.state()
    network = classifier().double()
    network.load_state_dict({name.removeprefix("model/"): t for name, t in state.items() if name.startswith("model/")})
    inputs, target = fetch(images()[1], torch.arange(21).numpy())
    output = network(inputs.double()).detach()
    assert scores[0].loss == pytest.approx(float(F.cross_entropy(output, target)), rel=1e-12)
    assert scores[0].accuracy == pytest.approx(float((output.argmax(1) == target).double().mean()))

"""Checkpoints are whole or absent, and loading one runs nothing that is in it."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from group_ranks import on_ranks, rendezvous
from small_models import classifier

from revdist.config import OptimizerConfig
from revdist.errors import CheckpointError
from revdist.training import checkpoint
from revdist.training.checkpoint_files import Progress, check_same_run, newest
from revdist.training.group import Group
from revdist.training.host_tensors import Staging
from revdist.training.optimizer import build_optimizer, set_learning_rate
from revdist.training.state import load_training_state, send_state, state_home, training_state


def progress(step: int) -> Progress:
    return Progress(step=step, seed=7, global_batch=4, num_samples=9, generation=2, shares=(1, 3))


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = classifier(norm=True)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(3, 1, 6, 6)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_a_state_comes_back_bit_equal(tmp_path: Path) -> None:
    model, optimizer = trained()
    saved = checkpoint.save(tmp_path, Staging().copy(training_state(model, optimizer)), progress(5))
    torch.manual_seed(1)
    other = classifier(norm=True)
    other_optimizer = torch.optim.AdamW(other.parameters())
    load_training_state(other, other_optimizer, checkpoint.read_state(saved))
    before, after = training_state(model, optimizer), training_state(other, other_optimizer)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert saved.contents().progress == progress(5)
    for network, stepper in ((model, optimizer), (other, other_optimizer)):
        network(torch.ones(2, 1, 6, 6)).sum().backward()
        stepper.step()
    gradients_apart = [p.grad is not None for p in other.parameters()]
    assert all(gradients_apart)


class CountingSGD(torch.optim.SGD):
    """Counts its steps in its parameter groups, as apex's optimizers do."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            group["seen"] = group.get("seen", torch.zeros(())) + 0.5
        super().step(closure)


def test_what_an_optimizer_counts_in_its_groups_comes_back(tmp_path: Path) -> None:
    config = OptimizerConfig(factory=f"{__name__}:CountingSGD", kwargs={"lr": 0.1, "momentum": 0.5})
    (before, optimizer), (after, other) = (
        (model, build_optimizer(config, list(model.parameters()))) for model in (classifier(), classifier())
    )
    for parameter in before.parameters():
        parameter.grad = torch.ones_like(parameter)
    for _ in range(3):
        optimizer.step()
    set_learning_rate(optimizer, 0.5)
    state = training_state(before, optimizer)
    assert sorted(name for name in state if name.startswith("optimizer-groups/")) == [
        "optimizer-groups/0/seen",
        "optimizer-groups/0/step",
    ]
    saved = checkpoint.save(tmp_path, Staging().copy(state), progress(3))
    load_training_state(after, other, checkpoint.read_state(saved))
    assert other.param_groups[0]["step"] == 3
    assert other.param_groups[0]["seen"] == 1.5
    assert other.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize(
    ("key", "group", "place"),
    [
        ("step", {}, "cpu"),
        ("step", {"fused": True}, "meta"),
        ("step", {"capturable": True}, "meta"),
        ("exp_avg", {}, "meta"),
    ],
)
def test_state_of_a_scalar_lies_where_its_optimizer_looks_for_it(key: str, group: dict[str, Any], place: str) -> None:
    parameter = torch.nn.Parameter(torch.zeros((), dtype=torch.float64, device="meta"))
    home, dtype = state_home(parameter, group, key, torch.float32)
    assert (home.type, dtype) == (place, torch.float32 if key == "step" else torch.float64)


def test_who_lacks_the_state_gets_it_and_who_has_it_keeps_its_own() -> None:
    def work(rank: int, group: Group, ports: list[int]) -> Any:
        group.join(rendezvous(rank, 3, ports[0]))
        model, optimizer = trained() if rank != 1 else (classifier(norm=True), None)
        optimizer = optimizer or torch.optim.AdamW(model.parameters())
        kept = next(iter(model.parameters())).data_ptr(), id(next(iter(optimizer.state.values()), None))
        word = send_state(model, optimizer, f"from {rank}", source=2, is_missing=rank == 1)
        is_kept = kept == (next(iter(model.parameters())).data_ptr(), id(next(iter(optimizer.state.values()), None)))
        return (
            word,
            is_kept,
            {name: tensor.numpy() for name, tensor in Staging().copy(training_state(model, optimizer)).items()},
        )

    has, lacked, source = on_ranks(3, work)
    assert (has[0], lacked[0], source[0]) == ("from 2",) * 3
    assert (has[1], lacked[1]) == (True, False)
    assert lacked[2].keys() == source[2].keys()
    assert all((lacked[2][name] == value).all() for name, value in source[2].items())


def test_torch_reads_it_by_itself(tmp_path: Path) -> None:
    saved = checkpoint.save(tmp_path, {"model/x": torch.arange(5.0), "model/n": torch.tensor(3)}, progress(1))
    state = {"model/x": torch.zeros(5), "model/n": torch.tensor(0)}
    torch.distributed.checkpoint.load(state, checkpoint_id=str(saved), no_dist=True)
    assert torch.equal(state["model/x"], torch.arange(5.0))
    assert int(state["model/n"]) == 3


def test_no_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="start the run without --resume"):
        newest(tmp_path / "nothing")


class Malice:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch malice",)


def test_an_index_that_names_other_classes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved = checkpoint.save(tmp_path, {"model/x": torch.ones(2)}, progress(1))
    (Path(str(saved)) / ".metadata").write_bytes(pickle.dumps(Malice()))
    with pytest.raises(CheckpointError, match="which no checkpoint needs"):
        checkpoint.read_state(saved)
    assert not (tmp_path / "malice").exists()


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    model, optimizer = trained()
    state = {name: tensor.clone() for name, tensor in training_state(model, optimizer).items()}
    other = classifier(depth=2, norm=True)
    with pytest.raises(CheckpointError, match="another model: only the checkpoint has"):
        load_training_state(other, torch.optim.AdamW(other.parameters()), state)
    state["model/0.weight"] = torch.ones(1)
    with pytest.raises(CheckpointError, match=r"'0.weight' is \(1,\) there and"):
        load_training_state(model, optimizer, state)


@pytest.mark.parametrize("change", [{"seed": 8}, {"global_batch": 5}, {"num_samples": 10}])
def test_another_data_order_is_refused(change: dict[str, int]) -> None:
    same = {"seed": 7, "global_batch": 4, "num_samples": 9}
    check_same_run(progress(1), **same)
    with pytest.raises(CheckpointError, match=next(iter(change))):
        check_same_run(progress(1), **{**same, **change})

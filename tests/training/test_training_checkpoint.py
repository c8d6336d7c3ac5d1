"""Checkpoints are whole or absent, and loading one runs nothing that is in it."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import classifier

from revdist.errors import CheckpointError
from revdist.training import checkpoint
from revdist.training.checkpoint_files import Progress, check_same_run, newest
from revdist.training.host_tensors import Staging
from revdist.training.state import load_training_state, training_state


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

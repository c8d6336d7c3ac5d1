"""Training goes on while it is saved, and hears of it when that fails."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from replicas import run_config

from revdist.devices.build import cache_folder
from revdist.devices.cpu import CpuDevice
from revdist.errors import CheckpointError
from revdist.planning.costs import Mode, Option, Profile
from revdist.training import saving
from revdist.training.checkpoint import read_state
from revdist.training.checkpoint_files import checkpoints, newest_whole, read_profiles
from revdist.training.optimizer import build_optimizer
from revdist.training.orders import Shares
from revdist.training.parts import Parts, build_parts
from revdist.training.profile_cache import load_profile, store_profile
from revdist.training.saving import Saver

SHARES = Shares(generation=3, by_rank=(9, 3), reason="share")


class GatedFileSystem(MemoryFileSystem):
    """Memory behind a gate: nothing is written while it is closed, or at all where it is broken."""

    protocol = "gated"
    gate = threading.Event()
    broken: Exception | None = None
    store: dict[str, Any] = {}
    pseudo_dirs = [""]

    def open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if "w" in mode:
            assert self.gate.wait(60), "the test left the gate closed"
            if self.broken:
                raise self.broken
        return super().open(path, mode, **kwargs)


@pytest.fixture
def gated(tmp_path: Path) -> Iterator[type[GatedFileSystem]]:
    fsspec.register_implementation("gated", GatedFileSystem, clobber=True)
    GatedFileSystem.gate.set()
    GatedFileSystem.broken = None
    yield GatedFileSystem
    GatedFileSystem.gate.set()


class Run:
    """A model that has taken a step, its saver, and the events that it told."""

    def __init__(
        self, place: str | Path, *, wide: bool = False, optimizer: dict[str, Any] | None = None, **checkpoint: Any
    ) -> None:
        model = {"factory": "small_models:classifier", "kwargs": {"wide": wide}}
        changes = {} if optimizer is None else {"optimizer": optimizer}
        self.config = run_config(model=model, checkpoint=checkpoint, planning={"profile_cache": True}, **changes)
        self.parts: Parts = build_parts(self.config, torch.device("cpu"))
        self.optimizer = build_optimizer(self.config.optimizer, self.parts.trainable)
        self.events: list[tuple[str, str, dict[str, Any]]] = []
        self.saver = Saver(self.config, place, lambda kind, detail, **facts: self.events.append((kind, detail, facts)))
        self.train(0.1)

    def train(self, gradient: float) -> None:
        for parameter in self.parts.trainable:
            parameter.grad = torch.full_like(parameter, gradient)
        self.optimizer.step()

    def save(self, step: int, rank: int = 0) -> None:
        self.saver.save(self.parts, self.optimizer, step=step, rank=rank, shares=SHARES)

    def parameters(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.parts.model.parameters()]

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _, _ in self.events]


def test_training_goes_on_while_a_state_is_written(gated: type[GatedFileSystem], tmp_path: Path) -> None:
    run = Run(f"gated://{tmp_path}")
    before = run.parameters()
    gated.gate.clear()
    run.save(1)
    run.train(0.5)
    assert run.events == []  # not yet whole
    gated.gate.set()
    run.saver.finish()
    ((kind, detail, facts),) = run.events
    assert (kind, facts["saved_step"]) == ("checkpoint", 1)
    assert detail.endswith("/step-000000001")
    assert facts["bytes"] > 0
    state = read_state(newest_whole(f"gated://{tmp_path}").checkpoint)
    for (name, _), parameter in zip(run.parts.model.named_parameters(), before, strict=True):
        assert torch.equal(state[f"model/{name}"], parameter), name


def test_the_next_save_waits_for_the_one_before(gated: type[GatedFileSystem], tmp_path: Path) -> None:
    run = Run(f"gated://{tmp_path}")
    gated.gate.clear()
    run.save(1)
    second = threading.Thread(target=run.save, args=(2,))
    second.start()
    second.join(0.3)
    assert second.is_alive()
    gated.gate.set()
    second.join(60)
    run.saver.finish()
    assert [facts["saved_step"] for _, _, facts in run.events] == [1, 2]


def test_a_write_that_never_ends_does_not_hold_up_the_others(
    gated: type[GatedFileSystem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "_SLOW_WRITE_S", 0.1)
    run = Run(f"gated://{tmp_path}")
    gated.gate.clear()
    run.save(1)
    run.save(2)
    assert run.kinds == ["checkpoint-failed"]
    assert "no checkpoint of step 2: the one before it is being written for more than" in run.events[0][1]
    gated.gate.set()
    run.saver.finish()
    assert [found.step for found in checkpoints(f"gated://{tmp_path}")] == [1]


@pytest.mark.parametrize("resumed", [False, True])
def test_a_step_that_is_saved_is_not_written_again(resumed: bool, gated: type[GatedFileSystem], tmp_path: Path) -> None:
    """A URL's checkpoint would be missing while the same is written in its place."""
    run = Run(f"gated://{tmp_path}")
    run.save(1)
    run.saver.finish()
    if resumed:
        run = Run(f"gated://{tmp_path}")
        assert run.saver._read(run.parts, run.optimizer) == 1
    gated.broken = OSError(28, "No space left on device")
    run.save(1)
    run.saver.finish()
    assert newest_whole(f"gated://{tmp_path}").checkpoint.step == 1


def test_a_torn_checkpoint_that_was_passed_by_counts_no_more(tmp_path: Path) -> None:
    run = Run(tmp_path, keep=2)
    for step in (5, 10):
        run.save(step)
    run.saver.finish()
    (tmp_path / "step-000000010" / ".metadata").unlink()
    run = Run(tmp_path, keep=2)
    assert run.saver._read(run.parts, run.optimizer) == 5
    run.save(12)
    run.saver.finish()
    assert [found.step for found in checkpoints(tmp_path)] == [5, 10, 12]


def test_the_state_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(1)
    run.saver.finish()
    other = Run(tmp_path, optimizer={"factory": "torch.optim:AdamW", "kwargs": {}})
    with pytest.raises(
        CheckpointError, match=r"of torch\.optim:SGD, and optimizer\.factory is torch\.optim:AdamW: set it"
    ):
        other.saver._read(other.parts, other.optimizer)


def test_a_full_disk_is_an_event_and_the_end_of_the_run_raises_it(gated: type[GatedFileSystem], tmp_path: Path) -> None:
    run = Run(f"gated://{tmp_path}")
    run.save(1)
    run.saver.finish()
    gated.broken = OSError(28, "No space left on device")
    run.save(2)
    run.train(0.1)
    with pytest.raises(CheckpointError, match=r"newest there is: gated://.*step-000000001: .*No space left on device"):
        run.saver.finish()
    assert run.kinds == ["checkpoint", "checkpoint-failed"]
    assert "free space there, or set checkpoint.location" in run.events[-1][1]
    gated.broken = None
    run.save(3)
    run.saver.finish()  # the last one counts
    assert [found.step for found in checkpoints(f"gated://{tmp_path}")] == [1, 3]


class ThrottledError(Exception):
    """What the client of a storage may raise of its own."""


def test_an_error_of_a_storages_own_kind_is_told_too(gated: type[GatedFileSystem], tmp_path: Path) -> None:
    run = Run(f"gated://{tmp_path}")
    gated.broken = ThrottledError("slow down")
    run.save(1)
    with pytest.raises(CheckpointError, match=r"there is none before it: .*ThrottledError: slow down"):
        run.saver.finish()
    assert run.kinds == ["checkpoint-failed"]


def test_a_failing_replica_waits_for_the_write_under_way(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(1)
    run.saver.close()
    assert [found.step for found in checkpoints(tmp_path)] == [1]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path / "saved")
    run.save(1, rank=1)
    run.saver.finish()
    assert not (tmp_path / "saved").exists()


def test_the_policy_of_the_configuration_holds(tmp_path: Path) -> None:
    run = Run(tmp_path, keep=1, keep_every_steps=3)
    for step in range(1, 6):
        run.save(step)
    run.saver.finish()
    assert [found.step for found in checkpoints(tmp_path)] == [3, 5]


def test_saving_and_reading_take_no_memory_of_the_device(
    ledger_device: Callable[..., CpuDevice], tmp_path: Path
) -> None:
    device = ledger_device(64 * 2**20)
    device.activate("saving")
    run = Run(tmp_path, wide=True)
    meter = device.meter()
    before_bytes = meter.allocated_bytes()
    meter.reset_peak()
    for step in (1, 2):
        run.save(step)
    run.saver.finish()
    state_bytes = run.events[-1][2]["bytes"]
    assert state_bytes > 2**20
    assert meter.allocated_bytes() == before_bytes
    assert meter.peak_bytes() - before_bytes < 2**13  # torch's generator gives its state as a tensor of 5 kB
    state = read_state(checkpoints(tmp_path)[-1])
    assert sum(tensor.nbytes for tensor in state.values()) == state_bytes
    assert meter.allocated_bytes() == before_bytes


def profile(key: str) -> Profile:
    option = Option(Mode.SAVE, held_bytes=8, working_bytes=4, extra_s=0.0)
    made = Profile.from_options([[option]])
    return Profile.from_json(json.dumps({**json.loads(made.to_json()), "key": key}))


def test_profiles_reach_the_cache_of_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REVDIST_CACHE_DIR", str(tmp_path / "cache"))
    known, elsewhere = profile("a" * 32), profile("../" + "b" * 29)
    run = Run(tmp_path / "saved")
    run.saver.remember([known, elsewhere])
    run.save(1)
    run.saver.finish()
    assert read_profiles(tmp_path / "saved") == (known, elsewhere)
    run.saver.recall_profiles()
    assert load_profile("a" * 32) == known
    assert [path.name for path in cache_folder().iterdir()] == [f"profile-{'a' * 32}.json"]  # no path leads out of it


@pytest.mark.parametrize("variable", ["REVDIST_CACHE_DIR", "XDG_CACHE_HOME"])
def test_profiles_lie_in_the_cache_folder_that_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.delenv("REVDIST_CACHE_DIR", raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "cache"))
    known = profile("c" * 32)
    store_profile(known)
    assert [path.name for path in (tmp_path / "cache").rglob("profile-*.json")] == [f"profile-{known.key}.json"]
    assert load_profile(known.key) == known


def test_a_cache_folder_of_somebody_else_is_as_good_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REVDIST_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("os.getuid", lambda: -1)
    store_profile(profile("c" * 32))
    assert load_profile("c" * 32) is None
    assert not list(tmp_path.iterdir())

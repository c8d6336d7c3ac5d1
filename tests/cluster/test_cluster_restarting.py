"""What a run whose replicas are all lost can start again from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import settings

from revdist.cluster.fleet import Fleet
from revdist.cluster.restarting import Restarter
from revdist.config import RunConfig
from revdist.errors import NoFreeDevice, Preempted
from revdist.training import checkpoint
from revdist.training.checkpoint_files import Progress


def restarter(folder: Path, stop_reason: str | None = None) -> Restarter:
    config = RunConfig.from_mapping(settings(workers={"min": 2}))
    return Restarter(
        config,
        assign=lambda resume: pytest.fail("no replica"),
        checkpoint_folder=str(folder),
        stop_reason=lambda: stop_reason,
    )


def test_the_newest_checkpoint_is_the_source(tmp_path: Path) -> None:
    for step in (3, 7):
        progress = Progress(step=step, seed=0, global_batch=1, num_samples=1, generation=0, shares=(1,))
        checkpoint.save(tmp_path, {"model/x": torch.ones(2)}, progress)
    assert restarter(tmp_path).source(0) == restarter(tmp_path).source(3) == "step-000000007"


def test_without_one_only_a_run_that_began_from_nothing_does_so_again(tmp_path: Path) -> None:
    assert "from the beginning" in f"from {restarter(tmp_path).source(0)}"
    assert "from the beginning" in f"from {restarter(tmp_path).source(None)}"
    assert restarter(tmp_path).source(3) is None


def test_a_run_that_is_told_to_stop_waits_for_no_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fleet, "free_hosts", lambda self: [])
    with pytest.raises(Preempted, match="stopped by SIGTERM before all replicas had started again") as caught:
        restarter(tmp_path, "SIGTERM").restart(Fleet((), threads=1))
    assert caught.value.facts["signal"] == "SIGTERM"
    monkeypatch.setattr("revdist.cluster.restarting._PATIENCE_S", -1.0)
    with pytest.raises(NoFreeDevice):
        restarter(tmp_path).restart(Fleet((), threads=1))

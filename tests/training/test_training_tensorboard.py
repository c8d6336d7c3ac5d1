from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from revdist.training.tensorboard import TensorBoardLog


def record(step: int, loss: float | None) -> dict[str, object]:
    ranks = [{"rank": 1, "share": 24, "peak_bytes": 2**20, "strip": "SSI"}]
    return {"time": 1_700_000_000.0 + step, "step": step, "loss": loss, "samples_per_s": 640.0, "ranks": ranks}


def test_tensorboard_reads_what_a_run_wrote(tmp_path: Path) -> None:
    log = TensorBoardLog(tmp_path / "tensorboard")
    for step, loss in enumerate((2.5, None, 1.25), start=1):
        log.step(record(step, loss))
    log.close()
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(point.step, point.value) for point in read.Scalars("loss")] == [(1, 2.5), (3, 1.25)]
    assert [point.value for point in read.Scalars("rank_1/peak_bytes")] == [2**20] * 3
    assert read.Scalars("samples_per_s")[0].wall_time == pytest.approx(1_700_000_001.0)
    assert "rank_1/strip" not in read.Tags()["scalars"]


def test_nothing_is_written_before_the_first_step(tmp_path: Path) -> None:
    TensorBoardLog(tmp_path / "tensorboard").close()
    assert not list(tmp_path.iterdir())

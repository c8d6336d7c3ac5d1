"""A checkpoint that cannot be written or is damaged costs the steps since the one before, never the run's result."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from harm import SLOW, Harm, assert_nothing_was_lost, run, signals
from replicas import Outcome, assert_no_failure, run_config, run_replicas
from runs import Watcher, settings
from test_training_replicas import largest_difference, train_alone

import revdist
from revdist.errors import CheckpointError
from revdist.training.checkpoint_files import checkpoints, newest_whole
from revdist.training.reports import EventReport, FailureReport
from revdist.training.run_directory import RunReader

pytestmark = pytest.mark.usefixtures("devices_folder")

WIDE = {"factory": "small_models:classifier", "kwargs": {"wide": True}}
"""In fp64 with momentum: 4.2 MB of state."""


def events(outcome: Outcome, kind: str) -> list[EventReport]:
    return [event for event in outcome.of_kind(EventReport) if event.kind == kind]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system of a size, `6m`; called again, it gets another size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False

    def mount(size: str) -> Path:
        nonlocal mounted
        options = f"remount,size={size}" if mounted else f"size={size}"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"may not mount a file system here: {done.stderr.strip()}")
        mounted = True
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_stops_no_step_and_the_run_can_be_resumed(small_disk: Callable[[str], Path]) -> None:
    folder = small_disk("6m")  # one checkpoint and half another
    config = run_config(model=WIDE, steps=4, epochs=None, checkpoint={"every_steps": 2, "keep": 1})
    full = run_replicas([config], [(12,)], folder)
    assert [step.step for step in full.steps()] == [1, 2, 3, 4]
    assert [event.facts["saved_step"] for event in events(full, "checkpoint")] == [2]
    (failed,) = events(full, "checkpoint-failed")
    assert "No space left on device; free space there, or set checkpoint.location" in failed.detail
    (failure,) = full.of_kind(FailureReport)
    assert isinstance(failure.error, CheckpointError)
    assert "the run's last checkpoint failed, the newest there is: " in failure.error.message
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000000002"]
    small_disk("20m")
    resumed = run_replicas([config], [(12,)], folder, resume=True)
    assert_no_failure(resumed)
    assert [step.step for step in resumed.steps()] == [3, 4]
    assert largest_difference(resumed.state(), train_alone(config, dtype=torch.float64, wide=True)) < 1e-10


@pytest.mark.slow
@pytest.mark.usefixtures("running_ray")
def test_a_run_directory_on_a_full_disk_gets_every_line_once_there_is_room(small_disk: Callable[[str], Path]) -> None:
    folder = small_disk("1m")
    filler = folder / "filler"

    def fill_and_free(step: int) -> None:
        if step == 3:
            filler.write_bytes(b"")
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        if step == 8:
            filler.unlink()

    watcher = Watcher(fill_and_free)
    pace = SLOW | {"kwargs": {"seconds": 0.2}}  # ranks do not wait for the watcher
    trainer = revdist.Trainer(
        settings(data=pace, epochs=None, steps=12, checkpoint={"every_steps": 2}),
        observer=watcher,
        run_dir=folder / "run",
    )
    trainer.fit()
    reader = RunReader(folder / "run")
    assert [line["step"] for line in reader.metrics()] == list(range(1, 13))
    kinds = [event["kind"] for event in reader.events()]
    assert kinds == [event["kind"] for event in watcher.events]
    assert "checkpoint-failed" in kinds
    assert kinds[-2:] == ["checkpoint", "end"]
    assert newest_whole(folder / "run" / "checkpoints").checkpoint.step == 12


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("running_ray")
def test_the_next_rank_0_saves_on_and_newcomers_save_along(
    unharmed: Callable[[int], dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    steps = 300
    harm = Harm(20, signals("cpu-0"))
    result = run(tmp_path / "run", harm, epochs=None, steps=steps, data=SLOW, checkpoint={"every_steps": 1, "keep": 3})
    assert harm.groups == [["cpu-1", "cpu-2"], ["cpu-1", "cpu-2", "cpu-0"]]
    assert_nothing_was_lost(harm, result, unharmed(steps), steps=steps)
    untold = set(range(1, steps + 1)) - {event["saved_step"] for event in harm.kinds("checkpoint")}
    assert all(15 <= step <= 25 for step in untold)  # what the killed rank was writing or had not yet told
    found = checkpoints(tmp_path / "run" / "checkpoints")
    assert [one.step for one in found] == [298, 299, 300]
    assert all(one.verify() for one in found)


LIMITED = """
import resource, sys, torch
from pathlib import Path
import revdist
from revdist.errors import CheckpointError
from revdist.training import checkpoint
from revdist.training.checkpoint_files import Progress, newest_whole

def save(step, size):
    progress = Progress(step=step, seed=0, global_batch=1, num_samples=1, generation=0, shares=(1,))
    checkpoint.save(Path(sys.argv[1]), {"model/x": torch.ones(size)}, progress)

save(1, 10)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save(2, 1_000_000)
except CheckpointError as error:
    print(error)
assert newest_whole(Path(sys.argv[1])).checkpoint.step == 1
"""


def test_a_limit_on_files_leaves_nothing_half_written(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "step-000000002: File too large; free space there" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from revdist.training import checkpoint
from revdist.training.checkpoint_files import Progress

for step in (1, 2):
    if step == 2:
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    progress = Progress(step=step, seed=0, global_batch=1, num_samples=1, generation=0, shares=(1,))
    checkpoint.save(Path(sys.argv[1]), {"model/x": torch.ones(1000)}, progress)
"""


def test_a_writer_killed_before_the_last_rename_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert any(path.name.endswith(".part") for path in tmp_path.iterdir())
    assert newest_whole(tmp_path).checkpoint.step == 1


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_torn_checkpoint_is_left_out_and_said_so(tmp_path: Path) -> None:
    config = run_config(steps=5, epochs=None, checkpoint={"every_steps": 1, "keep": 3})
    stopped = run_replicas([config], [(12,)], tmp_path, stop_after=3)
    assert_no_failure(stopped)
    *_, third, fourth = (Path(str(found)) for found in checkpoints(tmp_path / "checkpoints"))
    flip(fourth / "__0_0.distcp")
    (third / "progress.json").write_text((third / "progress.json").read_text()[:50])
    resumed = run_replicas([config], [(12,)], tmp_path, resume=True)
    assert_no_failure(resumed)
    told = [event.detail for event in events(resumed, "checkpoint-failed")]
    assert told == [
        "torn and left out: step-000000004: __0_0.distcp does not have its checksum; going on from step-000000002",
        "torn and left out: step-000000003: progress.json is not what a checkpoint ends with; "
        "going on from step-000000002",
    ]
    assert [step.step for step in resumed.steps()] == [3, 4, 5]
    assert largest_difference(resumed.state(), train_alone(config, dtype=torch.float64)) < 1e-10
    assert all(found.verify() for found in checkpoints(tmp_path / "checkpoints"))


def test_a_resume_without_a_whole_checkpoint_names_every_fault(tmp_path: Path) -> None:
    config = run_config(steps=2, epochs=None, checkpoint={"every_steps": 1})
    assert_no_failure(run_replicas([config], [(12,)], tmp_path))
    for found in checkpoints(tmp_path / "checkpoints"):
        (Path(str(found)) / ".metadata").unlink()
    outcome = run_replicas([config], [(12,)], tmp_path, resume=True)
    (failure,) = outcome.of_kind(FailureReport)
    assert isinstance(failure.error, CheckpointError)
    assert "step-000000002: .metadata is missing; step-000000001: .metadata is missing" in failure.error.message

"""What a Trainer is made from, and that naming the public names starts nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from runs import settings

import revdist
from revdist.config import RunConfig
from revdist.errors import CheckpointError, ConfigError
from revdist.training.run_directory import RunWriter


def test_a_configuration_comes_as_an_object_a_mapping_or_keywords() -> None:
    config = RunConfig.from_mapping(settings())
    assert revdist.Trainer(config).config == config
    assert revdist.Trainer(settings()).config == config
    assert revdist.Trainer(**settings()).config == config
    assert revdist.Trainer(config, seed=3).config.seed == 3
    with pytest.raises(ConfigError, match="did you mean 'seed'"):
        revdist.Trainer(config, sead=3)


def test_resuming_needs_a_checkpoint_to_resume_from(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="resume needs run_dir"):
        revdist.Trainer(settings(), resume=True).fit()
    with pytest.raises(CheckpointError, match="start the run without --resume"):
        revdist.Trainer(settings(), resume=True, run_dir=tmp_path).fit()


def write_events(run_dir: Path, *kinds: str) -> None:
    """What a run leaves that was lost after these events."""
    RunWriter(run_dir).create(RunConfig.from_mapping(settings()), step=0)
    lines = [json.dumps({"time": 0.0, "step": 0, "kind": kind, "detail": ""}) + "\n" for kind in kinds]
    (run_dir / "events.jsonl").write_text("".join(lines))


def test_a_run_lost_before_its_first_checkpoint_may_begin_again(tmp_path: Path) -> None:
    write_events(tmp_path, "start", "checkpoint-failed", "lost")
    assert revdist.Trainer(settings(), resume=True, run_dir=tmp_path).choose_run_dir() == tmp_path
    with pytest.raises(ConfigError, match="go on with --resume"):
        revdist.Trainer(settings(), run_dir=tmp_path).choose_run_dir()


def test_a_dry_run_refuses_the_directory_that_the_run_would_and_leaves_it_alone(tmp_path: Path) -> None:
    write_events(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(ConfigError, match="already holds a run"):
        revdist.Trainer(settings(), run_dir=tmp_path).dry_run()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("kind", ["checkpoint", "resumed"])
def test_a_run_whose_checkpoints_are_gone_does_not_begin_from_nothing(kind: str, tmp_path: Path) -> None:
    write_events(tmp_path, "start", kind)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*set checkpoint.location to where it is"):
        revdist.Trainer(settings(), resume=True, run_dir=tmp_path).choose_run_dir()


def test_a_location_that_nothing_opens_is_refused_before_anything_starts(tmp_path: Path) -> None:
    for resume in (False, True):
        trainer = revdist.Trainer(settings(checkpoint={"location": "nosuch://x"}), run_dir=tmp_path, resume=resume)
        with pytest.raises(ConfigError, match="not a URL that fsspec opens"):
            trainer.fit()


def test_a_location_with_another_runs_checkpoints_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    (tmp_path / "step-000000007").mkdir()
    (tmp_path / "step-000000007" / "progress.json").write_text("{}")
    for location in (str(tmp_path), f"~/{tmp_path.name}", f"file://{tmp_path}", f"local://{tmp_path}"):
        trainer = revdist.Trainer(settings(checkpoint={"location": location}), run_dir=tmp_path / "run")
        with pytest.raises(ConfigError, match="already holds step-000000007 of another run"):
            trainer.fit()
    assert not (tmp_path / "run").exists()


def test_every_public_name_is_there() -> None:
    assert set(revdist.__all__) <= set(dir(revdist))
    for name in revdist.__all__:
        assert getattr(revdist, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = revdist.no_such_name  # type: ignore[attr-defined]


def test_importing_starts_nothing_and_loads_neither_torch_nor_ray() -> None:
    script = """
import sys, threading, revdist, revdist.cluster.trainer
assert not {"torch", "ray", "pynvml"} & set(sys.modules), sorted({"torch", "ray", "pynvml"} & set(sys.modules))
assert threading.active_count() == 1
"""
    subprocess.run([sys.executable, "-c", script], check=True)

"""Which directory a run may have, and where its checkpoints lie."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from revdist.cluster.claim import is_orphaned, refuse_living
from revdist.config import RunConfig
from revdist.errors import CheckpointError, ConfigError


def choose_run_dir(config: RunConfig, run_dir: str | Path | None, *, resume: bool) -> Path:
    """Absolute path of the run directory, which must hold a run to resume, or none, and none that is alive.

    run_dir: the one asked for; None: a new one below the current folder

    Raises ConfigError or CheckpointError. Nothing is made yet.
    """
    if run_dir is None:
        if resume:
            raise ConfigError("resume needs run_dir, the run directory to go on with")
        from revdist.training.run_directory import default_run_dir

        chosen = default_run_dir(config.name, datetime.now()).absolute()
        _refuse_anothers_checkpoints(config, chosen)
        return chosen
    chosen = Path(run_dir).absolute()
    refuse_living(chosen)
    if resume:
        if not is_orphaned(chosen):  # else replicas may be alive
            has_checkpoint(config, chosen)
    elif (chosen / "config.yaml").exists():
        raise ConfigError(f"{chosen} already holds a run: go on with --resume, or choose another --run-dir")
    else:
        _refuse_anothers_checkpoints(config, chosen)
    return chosen


def has_checkpoint(config: RunConfig, run_dir: Path) -> bool:
    """Whether a run has a checkpoint to go on from; one that was lost before its first begins again.

    Raises CheckpointError where there is no run, or its checkpoints are gone.
    """
    from revdist.training.checkpoint_files import checkpoints, newest
    from revdist.training.run_directory import RunReader

    folder = checkpoint_folder(config, run_dir)
    if checkpoints(folder):
        return True
    if not (run_dir / "config.yaml").exists():
        newest(folder)
    if RunReader(run_dir).was_saved():
        raise CheckpointError(
            f"no checkpoint in {folder}, where one was when the run was last written down in {run_dir}: "
            "put back a copy, set checkpoint.location to where it is, or start a new run in another --run-dir"
        )
    return False


def checkpoint_folder(config: RunConfig, run_dir: Path) -> str:
    """Where a run's checkpoints lie: the absolute path of a folder, or a URL."""
    return config.checkpoint.location or str(run_dir / "checkpoints")


def _refuse_anothers_checkpoints(config: RunConfig, run_dir: Path) -> None:
    """Raise ConfigError where another run's checkpoints lie, which would count among this one's."""
    if not config.checkpoint.location:
        return
    from revdist.training.checkpoint_files import checkpoints

    folder = checkpoint_folder(config, run_dir)
    found = checkpoints(folder)
    if found:
        raise ConfigError(
            f"checkpoint.location {folder} already holds {found[-1].name} of another run: "
            "go on with that one by --resume, or choose another location"
        )

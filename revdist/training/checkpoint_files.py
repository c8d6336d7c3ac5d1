"""Where checkpoints lie and how far each one is, without loading their tensors."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from revdist.errors import CheckpointError, InvalidCosts
from revdist.planning.costs import Profile

PROGRESS_FILE = "progress.json"
PROFILES_FILE = "profiles.json"
_NAME = re.compile(r"step-(\d{9})")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a run was when it was saved, and what its data order depends on."""

    step: int
    """Steps taken."""
    seed: int
    global_batch: int
    num_samples: int
    generation: int
    shares: tuple[int, ...]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises CheckpointError for anything that `to_json` did not write."""
        try:
            fields = json.loads(text)
            return cls(**{**fields, "shares": tuple(fields["shares"])})
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"not the progress of a run: {error}") from None


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:09d}"


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name) and (path / PROGRESS_FILE).is_file())


def newest(folder: Path) -> Path:
    """The newest whole checkpoint. Raises CheckpointError where there is none."""
    found = checkpoints(folder)
    if not found:
        raise CheckpointError(f"no checkpoint in {folder}: start the run without --resume")
    return found[-1]


def read_progress(path: Path) -> Progress:
    """Where the run was. Raises CheckpointError."""
    try:
        return Progress.from_json((path / PROGRESS_FILE).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error}") from error


def profiles_to_json(profiles: Sequence[Profile]) -> str:
    return json.dumps([json.loads(profile.to_json()) for profile in profiles])


def read_profiles(path: Path) -> tuple[Profile, ...]:
    """The profiles of the devices that trained; none where they cannot be read, since they can be measured again."""
    try:
        saved = json.loads((path / PROFILES_FILE).read_text(encoding="utf-8"))
        return tuple(Profile.from_json(json.dumps(profile)) for profile in saved)
    except (OSError, ValueError, TypeError, InvalidCosts):
        return ()


def check_same_run(progress: Progress, *, seed: int, global_batch: int, num_samples: int) -> None:
    """Raise CheckpointError unless the data order goes on where the checkpoint stopped."""
    for name, here in (("seed", seed), ("global_batch", global_batch), ("num_samples", num_samples)):
        there = getattr(progress, name)
        if there != here:
            raise CheckpointError(
                f"the checkpoint has {name} {there}, this run {here}: samples would be repeated or left out; "
                f"set {name} back or start a new run"
            )

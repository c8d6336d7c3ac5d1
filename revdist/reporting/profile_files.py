"""Profiles as files: what `revdist plan --export` writes and `--device-profile` reads.

A file holds one profile or a list of them, one per micro-batch size, so that a plan can be made for
a device that is not here, and without the model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from revdist.errors import ConfigError, InvalidCosts
from revdist.planning.costs import Profile
from revdist.planning.interpolation import ordered_profiles


def write_profiles(path: Path, profiles: Sequence[Profile]) -> None:
    """Write profiles as a JSON list. Raises ConfigError where the file cannot be written."""
    values = [json.loads(profile.to_json()) for profile in profiles]
    try:
        path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; choose another place with --export") from None


def read_profiles(path: Path) -> tuple[Profile, ...]:
    """Read what `write_profiles` wrote, or a single profile's JSON; sorted by micro-batch.

    Raises ConfigError for a file that cannot be read, InvalidCosts for one that holds no profiles.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}; `revdist plan CONFIG --export FILE` writes one") from None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidCosts(
            f"{path} is not JSON: {error}; `revdist plan CONFIG --export FILE` writes such files"
        ) from None
    values = values if isinstance(values, list) else [values]
    try:
        return tuple(ordered_profiles([Profile.from_json(json.dumps(value)) for value in values]))
    except InvalidCosts as error:
        raise InvalidCosts(f"{path}: {error}") from None

"""Which checkpoints there are, how far each one is, and whether it is whole; no tensor is loaded here.

The last file of a checkpoint, `progress.json`, holds the size and the checksum of every other file,
and a checksum of itself. A checkpoint is whole when all of them are right, so that one which a disk,
a copy or a crash has damaged is known before anything of it is used.
"""

from __future__ import annotations

import dataclasses
import json
import re
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Self

from revdist.errors import CheckpointError, InvalidCosts
from revdist.planning.costs import Profile
from revdist.training.checkpoint_folders import LAST_FILE, Folder, Place, open_folder

PROFILES_FILE = "profiles.json"
FORMAT = 1
"""Raised when a reader of the format before would misunderstand a checkpoint."""

_NAME = re.compile(r"step-(\d{9})")
_CHUNK_BYTES = 2**20


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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What the last file of a checkpoint says."""

    progress: Progress
    versions: Mapping[str, str]
    """Of what wrote the checkpoint, by package."""
    files: Mapping[str, tuple[int, int]]
    """Bytes and CRC-32 of every other file."""

    def to_json(self) -> str:
        fields = {
            "format": FORMAT,
            "progress": dataclasses.asdict(self.progress),
            "versions": dict(self.versions),
            "files": {name: list(record) for name, record in self.files.items()},
        }
        return json.dumps({**fields, "crc32": _checksum(fields)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises CheckpointError for anything that `to_json` did not write."""
        try:
            fields = json.loads(text)
            if fields["format"] != FORMAT:
                raise CheckpointError(f"its format is {fields['format']!r}, and this revdist reads {FORMAT}")
            if fields.pop("crc32") != _checksum(fields):
                raise CheckpointError(f"{LAST_FILE} does not have its checksum")
            progress = fields["progress"]
            return cls(
                progress=Progress(**{**progress, "shares": tuple(progress["shares"])}),
                versions=fields["versions"],
                files={name: (size, checksum) for name, (size, checksum) in fields["files"].items()},
            )
        except (ValueError, TypeError, KeyError, AttributeError):
            raise CheckpointError(f"{LAST_FILE} is not what a checkpoint ends with") from None


@dataclasses.dataclass(frozen=True, slots=True)
class Checkpoint:
    """One checkpoint of a folder, by its name."""

    folder: Folder
    name: str

    def __str__(self) -> str:
        return f"{self.folder}/{self.name}"

    @property
    def step(self) -> int:
        return int(self.name.removeprefix("step-"))

    def read(self, file: str) -> bytes:
        """One of its files. Raises CheckpointError."""
        try:
            with self.folder.reading(f"{self.name}/{file}") as stream:
                return stream.read()
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from None

    def contents(self) -> Contents:
        """What its last file says. Raises CheckpointError where that is torn."""
        try:
            return Contents.from_json(self.read(LAST_FILE).decode())
        except UnicodeDecodeError:
            raise CheckpointError(f"{LAST_FILE} is not what a checkpoint ends with") from None

    def verify(self) -> Contents:
        """Read every file and compare it with the last one's word. Raises CheckpointError naming the first fault."""
        contents = self.contents()
        for file, (num_bytes, checksum) in contents.files.items():
            found_bytes, found_checksum = self._measure(file)
            if found_bytes != num_bytes:
                raise CheckpointError(f"{file} has {found_bytes} bytes, not {num_bytes}")
            if found_checksum != checksum:
                raise CheckpointError(f"{file} does not have its checksum")
        return contents

    def _measure(self, file: str) -> tuple[int, int]:
        num_bytes, checksum = 0, 0
        try:
            with self.folder.reading(f"{self.name}/{file}") as stream:
                while chunk := stream.read(_CHUNK_BYTES):
                    num_bytes, checksum = num_bytes + len(chunk), zlib.crc32(chunk, checksum)
        except FileNotFoundError:
            raise CheckpointError(f"{file} is missing") from None
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from None
        return num_bytes, checksum


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """The newest checkpoint that is whole, and the newer ones that are not."""

    checkpoint: Checkpoint
    contents: Contents
    torn: Mapping[str, str]
    """Faults of the newer ones, by name."""


def checkpoint_name(step: int) -> str:
    """What the checkpoint of a step is called."""
    return f"step-{step:09d}"


def checkpoints(place: Place | Folder) -> list[Checkpoint]:
    """Checkpoints that were written to their end, oldest first. Raises CheckpointError for a place not to be read."""
    folder = place if isinstance(place, Folder) else open_folder(place)
    try:
        names = [name for name in folder.names() if _NAME.fullmatch(name) and folder.exists(f"{name}/{LAST_FILE}")]
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoints in {folder}: {error}") from error
    return [Checkpoint(folder, name) for name in sorted(names)]


def newest(place: Place | Folder) -> Checkpoint:
    """The newest checkpoint that was written to its end. Raises CheckpointError where there is none."""
    found = checkpoints(place)
    if not found:
        raise CheckpointError(f"no checkpoint in {place}: start the run without --resume")
    return found[-1]


def newest_whole(place: Place | Folder) -> Whole:
    """The newest checkpoint whose files are all as they were written, each one read for it.

    Raises CheckpointError naming every checkpoint's fault where none is.
    """
    newest(place)
    torn: dict[str, str] = {}
    for checkpoint in reversed(checkpoints(place)):
        try:
            return Whole(checkpoint=checkpoint, contents=checkpoint.verify(), torn=torn)
        except CheckpointError as error:
            torn[checkpoint.name] = error.message
    faults = "; ".join(f"{name}: {fault}" for name, fault in torn.items())
    raise CheckpointError(f"no checkpoint in {place} is whole ({faults}): put back a copy of one, or start a new run")


def prune(folder: Folder, *, step: int, keep: int, keep_every_steps: int | None, torn: Collection[str] = ()) -> None:
    """Remove what the policy does not keep.

    torn: names of checkpoints that are known not to be whole: they do not take the place of good ones, and stay

    Only checkpoints up to `step`, the one just written, count: a later one is torn, or this run would
    have gone on from there.
    """
    whole = [one for one in checkpoints(folder) if one.step <= step and one.name not in torn]
    for checkpoint in whole[:-keep]:
        if keep_every_steps is None or checkpoint.step % keep_every_steps:
            folder.remove(checkpoint.name)


def profiles_to_json(profiles: Sequence[Profile]) -> str:
    return json.dumps([json.loads(profile.to_json()) for profile in profiles])


def read_profiles(place: Place | Folder) -> tuple[Profile, ...]:
    """The profiles in the newest checkpoint that holds any in good order.

    None where there are none: they can be measured again.
    """
    for checkpoint in reversed(checkpoints(place)):
        try:
            content = checkpoint.read(PROFILES_FILE)
            if (len(content), zlib.crc32(content)) == checkpoint.contents().files.get(PROFILES_FILE):
                return tuple(Profile.from_json(json.dumps(profile)) for profile in json.loads(content))
        except (CheckpointError, InvalidCosts, ValueError, TypeError):
            continue
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


def _checksum(fields: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(fields, sort_keys=True).encode())

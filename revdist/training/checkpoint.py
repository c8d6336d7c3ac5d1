"""Saved training state: the tensors of torch.distributed.checkpoint and a few documents, whole or absent.

    .metadata, __0_0.distcp   tensors and their index: model/<name>, optimizer/<parameter>/<key>
    config.yaml               the resolved configuration
    plans.json                the plans that the ranks ran
    profiles.json             the profiles of the devices, by the keys of the profile cache
    generators.json           the state of random number generators
    progress.json             step, data order, shares, versions, and every other file's size and checksum

Replicas hold the same state, so one rank writes all of it, without a collective, while all train on.
"""

from __future__ import annotations

import importlib.metadata
import platform
import zlib
from collections.abc import Mapping

from torch import Tensor

from revdist.errors import CheckpointError
from revdist.training.checkpoint_files import Checkpoint, Contents, Progress, checkpoint_name
from revdist.training.checkpoint_folders import LAST_FILE, Folder, Place, open_folder
from revdist.training.checkpoint_tensors import RecordedFiles, read_tensors, write_tensors

_PACKAGES = ("revdist", "torch", "numpy")


def save(
    place: Place | Folder,
    state: Mapping[str, Tensor],
    progress: Progress,
    documents: Mapping[str, str] | None = None,
) -> Checkpoint:
    """Write a checkpoint, in place of what writers that died have left unfinished.

    state: tensors on the CPU, each with a storage of its own
    documents: further files, by name

    Raises CheckpointError where it cannot be written; earlier checkpoints are untouched then.
    """
    folder = place if isinstance(place, Folder) else open_folder(place)
    name = checkpoint_name(progress.step)
    part: str | None = None
    try:
        for leftover in folder.leftovers():
            folder.remove(leftover)
        part = folder.start(name)
        _write(folder, part, state, progress, documents or {})
        folder.publish(part, name)
    except Exception as error:
        if part is not None:
            _give_up(folder, part)
        if not isinstance(error, OSError):
            raise
        raise CheckpointError(
            f"cannot write the checkpoint {folder}/{name}: {error.strerror or error}; "
            "free space there, or set checkpoint.location"
        ) from error
    return Checkpoint(folder, name)


def read_state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors of a checkpoint, in host memory that no device counts. Raises CheckpointError."""
    return read_tensors(checkpoint.folder, checkpoint.name)


def _write(
    folder: Folder, part: str, state: Mapping[str, Tensor], progress: Progress, documents: Mapping[str, str]
) -> None:
    files = RecordedFiles(folder)
    write_tensors(files, part, state)
    records = {path.removeprefix(f"{part}/"): record for path, record in files.records.items()}
    for file, text in documents.items():
        records[file] = _write_text(folder, f"{part}/{file}", text)
    contents = Contents(progress=progress, versions=_versions(), files=records)
    _write_text(folder, f"{part}/{LAST_FILE}", contents.to_json())


def _write_text(folder: Folder, path: str, text: str) -> tuple[int, int]:
    content = text.encode()
    with folder.writing(path) as file:
        file.write(content)
    return len(content), zlib.crc32(content)


def _give_up(folder: Folder, part: str) -> None:
    """Remove what has been written; where even that fails, it still is no checkpoint."""
    try:
        folder.remove(part)
    except OSError:
        return


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in _PACKAGES}}

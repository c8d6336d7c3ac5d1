"""Saved training state on disk: torch.distributed.checkpoint files, whole or absent.

Replicas hold the same state, so one rank writes all of it, without a collective, while the others
train on. A checkpoint is written beside its place and renamed, so that one with its final name is
whole. Loading runs no code from the files: tensors are read with `weights_only`, the index with an
unpickler that knows its few classes alone, and the rest is JSON.
"""

from __future__ import annotations

import os
import pickle
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save as save_state

from revdist.errors import CheckpointError
from revdist.planning.costs import Profile
from revdist.training.checkpoint_files import (
    PROFILES_FILE,
    PROGRESS_FILE,
    Progress,
    checkpoint_path,
    checkpoints,
    profiles_to_json,
)

_INDEX = ".metadata"
_INDEX_CLASSES = {
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
}


def save(
    folder: Path, state: dict[str, Tensor], progress: Progress, *, keep: int, profiles: Sequence[Profile] = ()
) -> Path:
    """Write a checkpoint into `folder`, then remove all but the newest `keep`.

    Raises CheckpointError where it cannot be written; earlier checkpoints are untouched then.
    """
    whole = checkpoint_path(folder, progress.step)
    part = whole.with_suffix(".part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True, mode=0o750)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            save_state(state, checkpoint_id=part, no_dist=True)
        (part / PROFILES_FILE).write_text(profiles_to_json(profiles), encoding="utf-8")
        (part / PROGRESS_FILE).write_text(progress.to_json(), encoding="utf-8")
        shutil.rmtree(whole, ignore_errors=True)
        os.replace(part, whole)
    except (OSError, CheckpointException) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise CheckpointError(
            f"cannot write the checkpoint {whole}: {error}; free space, or set checkpoint.location"
        ) from error
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return whole


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, on the CPU. Raises CheckpointError."""
    reader = _SafeReader(path)
    try:
        index = reader.read_metadata()
        state = {name: _allocate(name, entry) for name, entry in index.state_dict_metadata.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(state, storage_reader=reader, no_dist=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, CheckpointException) as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error}") from error
    return state


def _allocate(name: str, entry: Any) -> Tensor:
    if not isinstance(entry, TensorStorageMetadata):
        raise CheckpointError(f"the checkpoint holds {name!r}, which is not a tensor")
    return torch.empty(entry.size, dtype=entry.properties.dtype)


class _SafeReader(FileSystemReader):
    """Reads the index without running what a pickle may ask for."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / _INDEX).open("rb") as file:
            index: Metadata = _IndexUnpickler(file).load()
        if index.storage_meta is not None:
            index.storage_meta.load_id = self.load_id
        return index


class _IndexUnpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _INDEX_CLASSES or (module == "torch" and _is_dtype(name)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the index names {module}.{name}, which no checkpoint needs")


def _is_dtype(name: str) -> bool:
    return isinstance(getattr(torch, name, None), torch.dtype)

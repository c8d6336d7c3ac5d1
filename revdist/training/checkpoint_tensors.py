"""Tensors in and out of a checkpoint, in the format of torch.distributed.checkpoint.

One process writes all of them, without a collective, into any folder that `checkpoint_folders` knows.
Loading runs no code from the files: tensors are read with `weights_only`, and the index, which is a
pickle, with an unpickler that knows its few classes alone.

Importing this module takes a second or two, most of it torch.distributed.checkpoint.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, BinaryIO, cast, final

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemBase, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from revdist.errors import CheckpointError
from revdist.training.checkpoint_folders import Folder
from revdist.training.host_tensors import host_tensor

_INDEX = ".metadata"
_INDEX_CLASSES = {
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


@final
class RecordedFiles(FileSystemBase):
    """A `Folder` as torch.distributed.checkpoint asks for files in it; what it writes is measured on the way."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self.records: dict[str, tuple[int, int]] = {}
        """By path: bytes and CRC-32."""
        self.error: OSError | None = None
        """What the storage refused first; torch reports a consequence of that in its place."""

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        path = os.fspath(path)
        if "w" not in mode:
            with self._folder.reading(path) as file:
                yield cast(io.IOBase, file)
            return
        try:
            with self._folder.writing(path) as file:
                stream = _Recorded(file, self._refused)
                yield stream
            self.records[path] = stream.record
        except OSError as error:
            self._refused(error)
            raise

    def _refused(self, error: OSError) -> None:
        self.error = self.error or error

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        if "/" in suffix:
            raise CheckpointError(f"the index names {suffix!r}, a file outside of its checkpoint")
        return f"{os.fspath(path)}/{suffix}"

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        self._folder.rename(os.fspath(path), os.fspath(new_path))
        self.records[os.fspath(new_path)] = self.records.pop(os.fspath(path))

    def init_path(self, path: str | os.PathLike[str]) -> str:
        return os.fspath(path)

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """`Folder.start` has made it."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def exists(self, path: str | os.PathLike[str]) -> bool:
        return self._folder.exists(os.fspath(path))

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        raise AssertionError("a checkpoint is written into an empty folder")


def write_tensors(files: RecordedFiles, place: str, state: Mapping[str, Tensor]) -> None:
    """Write tensors, on the CPU, into the empty folder `place`.

    Raises OSError where the storage fails, or the error of its own kind that it raises instead.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            save(dict(state), storage_writer=_Writer(files, place), no_dist=True)
    except (CheckpointException, RuntimeError) as error:
        if files.error is not None:  # torch wraps it, or complains that its file has not grown
            raise files.error from None
        if isinstance(error, CheckpointException):  # no Exception, which would end a thread without a word
            raise _cause(error) from None
        raise


def read_tensors(folder: Folder, place: str) -> dict[str, Tensor]:
    """All tensors of a checkpoint, in host memory that no device counts. Raises CheckpointError."""
    reader = _Reader(RecordedFiles(folder), place)
    try:
        index = reader.read_metadata()
        state = {name: _allocate(name, entry) for name, entry in index.state_dict_metadata.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(dict(state), storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        raise CheckpointError(f"cannot read the checkpoint {folder}/{place}: {_cause(error)}") from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"cannot read the checkpoint {folder}/{place}: {error}") from error
    return state


def _cause(error: CheckpointException) -> BaseException:
    cause, _ = next(iter(error.failures.values()))
    return cause


def _allocate(name: str, entry: Any) -> Tensor:
    if not isinstance(entry, TensorStorageMetadata):
        raise CheckpointError(f"the checkpoint holds {name!r}, which is not a tensor")
    return host_tensor(entry.size, entry.properties.dtype)


@final
class _Writer(FileSystemWriter):
    def __init__(self, files: RecordedFiles, place: str) -> None:
        super().__init__(place, sync_files=False)  # the folder syncs every file it has written
        self.fs = files  # type: ignore[assignment]
        self.path = place


@final
class _Reader(FileSystemReader):
    """Reads the index without running what a pickle may ask for."""

    def __init__(self, files: RecordedFiles, place: str) -> None:
        super().__init__(place)
        self.fs = files  # type: ignore[assignment]
        self.path = place

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with self.fs.create_stream(f"{self.path}/{_INDEX}", "rb") as file:
            index: Metadata = _IndexUnpickler(cast(BinaryIO, file)).load()
        if index.storage_meta is not None:
            index.storage_meta.load_id = self.load_id
        return index


@final
class _Recorded(io.RawIOBase):
    """Passes bytes on to a file, and counts and sums them up."""

    def __init__(self, file: IO[bytes], refused: Callable[[OSError], None]) -> None:
        """refused: told what the file refuses."""
        self._file = file
        self._refused = refused
        self._num_bytes = 0
        self._checksum = 0

    @property
    def record(self) -> tuple[int, int]:
        """Bytes and CRC-32 so far."""
        return self._num_bytes, self._checksum

    def write(self, data: Any) -> int:
        chunk = memoryview(data).cast("B")
        try:
            self._file.write(chunk)
        except OSError as error:
            self._refused(error)
            raise
        self._num_bytes += len(chunk)
        self._checksum = zlib.crc32(chunk, self._checksum)
        return len(chunk)

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._num_bytes

    def flush(self) -> None: ...

    def close(self) -> None:
        """The folder closes the file, once it is on the storage."""


@final
class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _INDEX_CLASSES or (module == "torch" and _is_dtype(name)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the index names {module}.{name}, which no checkpoint needs")


def _is_dtype(name: str) -> bool:
    return isinstance(getattr(torch, name, None), torch.dtype)

"""Places that hold checkpoints: a folder of this host's file system, or one behind an fsspec URL.

Both keep the same promise in the way that suits them: what has a checkpoint's name and its last
file, `progress.json`, was written to its end. A local folder gets there by renaming, a URL by writing
that file last, since object stores cannot rename.
"""

from __future__ import annotations

import abc
import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, final

from revdist.errors import ConfigError

LAST_FILE = "progress.json"
_PART = ".part"

Place = str | os.PathLike[str]
"""A local folder, or an fsspec URL such as `s3://bucket/run`."""


class Folder(abc.ABC):
    """A folder of checkpoints, which are folders of files; paths are `name/file`.

    Methods raise OSError where the storage fails.
    """

    @abc.abstractmethod
    def __str__(self) -> str: ...

    @abc.abstractmethod
    def names(self) -> list[str]:
        """What lies in the folder; nothing where there is none."""

    @abc.abstractmethod
    def exists(self, path: str) -> bool: ...

    @abc.abstractmethod
    def reading(self, path: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        """A file to read and seek in."""

    @abc.abstractmethod
    def writing(self, path: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        """A new file; it is on the storage when the context ends without an error."""

    @abc.abstractmethod
    def rename(self, path: str, new: str) -> None:
        """Rename a file."""

    @abc.abstractmethod
    def start(self, name: str) -> str:
        """An empty place for the files of a checkpoint to be called `name`."""

    @abc.abstractmethod
    def publish(self, place: str, name: str) -> None:
        """Give what lies at `place`, its last file written, its name; another of that name goes away."""

    @abc.abstractmethod
    def remove(self, name: str) -> None:
        """Remove a checkpoint or what there is of one; interrupted, it leaves nothing that looks whole."""

    def leftovers(self) -> list[str]:
        """Checkpoints that nobody will finish, since only one writer works at a time."""
        return [name for name in self.names() if name.endswith(_PART)]


@final
class LocalFolder(Folder):
    """A folder that this host's file system reaches, shared or its own."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def names(self) -> list[str]:
        return sorted(os.listdir(self._path)) if self._path.is_dir() else []

    def exists(self, path: str) -> bool:
        return (self._path / path).is_file()

    def reading(self, path: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        return (self._path / path).open("rb")

    @contextlib.contextmanager
    def writing(self, path: str) -> Iterator[IO[bytes]]:
        with (self._path / path).open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def rename(self, path: str, new: str) -> None:
        os.replace(self._path / path, self._path / new)

    def start(self, name: str) -> str:
        place = f"{name}.{secrets.token_hex(4)}{_PART}"
        (self._path / place).mkdir(parents=True, mode=0o750)
        return place

    def publish(self, place: str, name: str) -> None:
        _sync_folder(self._path / place)
        if os.path.lexists(self._path / name):
            self.remove(name)
        os.replace(self._path / place, self._path / name)
        _sync_folder(self._path)

    def remove(self, name: str) -> None:
        (self._path / name / LAST_FILE).unlink(missing_ok=True)
        shutil.rmtree(self._path / name, ignore_errors=True)


@final
class UrlFolder(Folder):
    """A folder behind an fsspec file system."""

    def __init__(self, url: str) -> None:
        """Raises ConfigError for a URL that nothing installed can open."""
        import fsspec

        self._url = url.rstrip("/")
        try:
            self._fs, root = fsspec.url_to_fs(self._url)
        except ImportError as error:
            raise ConfigError(f"checkpoint.location {url!r}: {error}") from None
        except ValueError as error:
            raise ConfigError(
                f"checkpoint.location {url!r} is not a URL that fsspec opens: {error}; give a folder, or one such as "
                "s3://bucket/run"
            ) from None
        self._root = str(root).rstrip("/")

    def __str__(self) -> str:
        return self._url

    def names(self) -> list[str]:
        self._fs.invalidate_cache()
        try:
            return sorted(path.rstrip("/").rpartition("/")[2] for path in self._fs.ls(self._root, detail=False))
        except FileNotFoundError:
            return []

    def exists(self, path: str) -> bool:
        return bool(self._fs.isfile(self._at(path)))

    def reading(self, path: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        opened: contextlib.AbstractContextManager[IO[bytes]] = self._fs.open(self._at(path), "rb")
        return opened

    def writing(self, path: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        opened: contextlib.AbstractContextManager[IO[bytes]] = self._fs.open(self._at(path), "wb")
        return opened

    def rename(self, path: str, new: str) -> None:
        self._fs.mv(self._at(path), self._at(new))

    def start(self, name: str) -> str:
        self.remove(name)
        self._fs.makedirs(self._at(name), exist_ok=True)
        return name

    def publish(self, place: str, name: str) -> None:
        assert place == name, "a URL's checkpoint is written where it stays"

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._at(f"{name}/{LAST_FILE}"))
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._at(name), recursive=True)

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}"


def open_folder(place: Place) -> Folder:
    """The folder at a place, which need not exist yet; `file://` is a local path.

    Raises ConfigError for a URL that nothing installed can open.
    """
    text = os.fspath(place)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    return UrlFolder(text) if "://" in text else LocalFolder(Path(text))


def _sync_folder(path: Path) -> None:
    """Have a folder's entries on the disk, where the file system offers that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

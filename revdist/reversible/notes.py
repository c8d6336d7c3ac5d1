"""What a forward notes for its own replay: choices and statistics that must not be computed again.

A replay sees inputs that differ from the forward's by rounding. What it computes from them differs
by rounding too, which is harmless, except for

- choices (the bucket a vector hashes to, the expert a token is sent to), which may flip;
- statistics that the inverse needs and the output no longer tells (a batch's mean);
- collectives (the statistics of SyncBatchNorm), which may not run a second time on one rank alone.

Such values go through `noted`: the forward computes and keeps them, its replays get the same
tensors back. They count as held in every mode, so note small things. Outside a chain `noted` just
computes.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from revdist.errors import ReplayDiverged

Value = TypeVar("Value")


class Notes:
    """The notes of one forward of one operator."""

    __slots__ = ("_read", "_values")

    def __init__(self) -> None:
        self._values: dict[int, list[Any]] = {}
        self._read: dict[int, int] | None = None

    def taking(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the forward runs: `noted` computes and keeps."""
        self._read = None
        return _Current(self)

    def reading(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the forward or the inverse runs again: `noted` gives back, for each owner from its first note on."""
        self._read = {}
        return _Current(self)

    def of(self, owner: nn.Module, compute: Callable[[], Value]) -> Value:
        """The value that `owner` notes next."""
        values = self._values.setdefault(id(owner), [])
        if self._read is None:
            value = compute()
            values.append(value)
            return value
        index = self._read.get(id(owner), 0)
        if index == len(values):
            raise ReplayDiverged(
                f"{type(owner).__name__} asks for note {index + 1} when run again, but its forward took {len(values)}: "
                "it must take the same notes each time"
            )
        self._read[id(owner)] = index + 1
        read: Value = values[index]
        return read


class _Present(threading.local):
    notes: Notes | None = None


_present = _Present()


def noted(owner: nn.Module, compute: Callable[[], Value]) -> Value:
    """`compute()` in a forward, its result of then in a replay of that forward.

    The result, a tensor, several or a plain value, has no graph. An owner that notes several must do
    so in the same order each time.
    """
    return compute() if _present.notes is None else _present.notes.of(owner, compute)


class _Current:
    """Inside, these are the notes of this thread. A class, since every operator of every forward enters it."""

    __slots__ = ("_before", "_notes")

    def __init__(self, notes: Notes) -> None:
        self._notes = notes

    def __enter__(self) -> None:
        self._before, _present.notes = _present.notes, self._notes

    def __exit__(self, *_: object) -> None:
        _present.notes = self._before

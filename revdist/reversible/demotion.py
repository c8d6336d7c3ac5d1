"""Releasing cached activations in the middle of a step, when memory turns out to be short.

Safe to call from inside a failing allocation: it allocates no tensor and touches no record whose
backward has begun.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable

from torch import Tensor

from revdist.reversible.record import DEMOTION, Record


class LiveRecords:
    """The records of a chain that some backward may still need."""

    def __init__(self) -> None:
        self._references: list[weakref.ref[Record]] = []
        self.demoted_bytes = 0
        """Bytes released so far."""

    def add(self, record: Record) -> None:
        self._references.append(weakref.ref(record))

    def prune(self) -> None:
        """Forget those that are gone."""
        self._references = [reference for reference in self._references if reference() is not None]

    def alive(self) -> list[Record]:
        """The records that are there, in the order of their forward."""
        return [record for record in (reference() for reference in self._references) if record is not None]

    def demote(self, num_bytes: int) -> int:
        """Release at least `num_bytes`, or all there is; returns the bytes released.

        Takes the operators that free most first, so that few have to be rebuilt, and among equals
        those that the backward needs last.
        """
        records = self.alive()
        holders: Counter[int] = Counter()
        for record in records:
            holders.update(_sizes(record.tensors()).keys())
            holders.update(_sizes(record.outside()).keys())
        records.sort(key=lambda record: -_alone(_sizes(record.tensors()), holders, 1))
        released = 0
        for record in records:
            if released >= num_bytes:
                break
            released += _demote(record, holders)
        self.demoted_bytes += released
        return released


def _demote(record: Record, holders: Counter[int]) -> int:
    """Demote one record if it can be; returns the bytes that nobody holds any more."""
    with DEMOTION:
        if not record.can_be_demoted():
            return 0
        dropped = _sizes(record.tensors())
        record.demote()
    for storage in _sizes(record.tensors()):
        del dropped[storage]
    holders.subtract(dropped.keys())
    return _alone(dropped, holders, 0)


def _sizes(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of each storage behind the tensors, by address."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def _alone(sizes: dict[int, int], holders: Counter[int], num_holders: int) -> int:
    """Bytes of those storages that have `num_holders` holders."""
    return sum(size for storage, size in sizes.items() if holders[storage] == num_holders)

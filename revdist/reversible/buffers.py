"""Which buffers an operator's forward writes to, and what they held before it.

A replay starts from the buffers that its forward started from and writes to clones only. Statistics
of normalisation layers do not influence their output while training, so clones of their present
values do; every other buffer that a forward writes to (a power iteration's vector, a running scale)
is cloned before it. Which those are is learnt from the first forward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

Slot = tuple[nn.Module, str]
"""Where a buffer lives: its module and its name there."""


@dataclasses.dataclass(slots=True)
class Snapshot:
    """One buffer before a forward."""

    slot: Slot
    buffer: Tensor
    version: int
    before: Tensor | None
    """Its value then; None where the forward is known not to write to it."""

    def changed(self, *, compare_values: bool) -> bool:
        """Whether the forward replaced the buffer or wrote to it."""
        module, name = self.slot
        if module._buffers.get(name) is not self.buffer or self.buffer._version != self.version:
            return True
        return compare_values and self.before is not None and not torch.equal(self.buffer, self.before)


class MutableBuffers:
    """The buffers that one operator's forward has been seen to write to."""

    def __init__(self) -> None:
        self._written: set[Slot] = set()
        self._seen: set[bool] = set()

    def snapshot(self, modules: Sequence[nn.Module]) -> list[Snapshot]:
        """Take what a replay will need of the buffers as they are before a forward."""
        first = modules[0].training not in self._seen
        snapshots = []
        for module in modules:
            if module._buffers and not isinstance(module, _NormBase):
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        before = buffer.clone() if first or (module, name) in self._written else None
                        snapshots.append(Snapshot((module, name), buffer, buffer._version, before))
        return snapshots

    def learn(self, snapshots: Sequence[Snapshot], *, training: bool) -> str:
        """Drop clones of what did not change; returns the name of a changed buffer without a clone, or ''."""
        first = training not in self._seen
        self._seen.add(training)
        lost = ""
        for snapshot in snapshots:
            if snapshot.changed(compare_values=first):
                self._written.add(snapshot.slot)
                lost = lost or ("" if snapshot.before is not None else snapshot.slot[1])
            else:
                snapshot.before = None
        return lost


def filled_slots(module: nn.Module) -> list[tuple[Slot, Tensor]]:
    """Where the module and those in it have buffers, and which."""
    slots = [((member, name), buffer) for member in module.modules() for name, buffer in member._buffers.items()]
    return [(slot, buffer) for slot, buffer in slots if buffer is not None]


def put_back(slots: Sequence[tuple[Slot, Tensor]]) -> None:
    """Put buffers back where others have taken their place.

    One of another shape stays: a table that has grown, whose module knows how far elsewhere.
    """
    for (module, name), buffer in slots:
        present = module._buffers.get(name)
        if present is None or present.shape == buffer.shape:
            module._buffers[name] = buffer


def substitutes(
    modules: Sequence[nn.Module], snapshots: Sequence[Snapshot], settled: Sequence[nn.Module]
) -> dict[Slot, Tensor | None]:
    """What stands in for every buffer that a replay would write to; `settled` norms are given their statistics.

    A buffer that the forward only read, and that has been replaced since, stands in for the present one.
    """
    found: dict[Slot, Tensor | None] = {}
    for snapshot in snapshots:
        if snapshot.before is not None:
            found[snapshot.slot] = snapshot.before.clone()
        elif snapshot.slot[0]._buffers.get(snapshot.slot[1]) is not snapshot.buffer:
            found[snapshot.slot] = snapshot.buffer
    for module in modules:
        if isinstance(module, _NormBase) and module.training:
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    found[module, name] = None if module in settled else buffer.clone()
    return found

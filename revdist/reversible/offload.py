"""What an operator with OFFLOAD keeps: its saved tensors and its input, in host memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from revdist.reversible.host_copy import HostCopy, arrived, place_of

_ALIGNMENT = 64
"""Bytes: copies start at multiples of it, so that what lies in them is aligned as before, whatever its type."""


class Layout(NamedTuple):
    """How a tensor lies in its storage."""

    storage: int
    """Number of the storage in its `Offload`."""
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


class Offload:
    """Parts of storages in host memory; tensors that share a storage share its copy."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._numbers: dict[int, int] = {}
        self._waiting: list[tuple[Tensor, range]] = []
        self._starts: list[int] = []
        self._copies: list[HostCopy] = []
        self._incoming: list[Tensor] | None = None

    def add(self, tensor: Tensor) -> Layout:
        """Have a tensor copied by `send`. It must be alive until then: storages are known by their address."""
        place = place_of(tensor)
        number = self._numbers.setdefault(tensor.untyped_storage().data_ptr(), len(self._waiting))
        if number == len(self._waiting):
            self._waiting.append((tensor, place))
        else:
            first, other = self._waiting[number]
            self._waiting[number] = first, range(min(place.start, other.start), max(place.stop, other.stop))
        return Layout(number, tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset())

    def send(self) -> None:
        """Copy to the host what has been added: of each storage the bytes from the first to the last in use."""
        for tensor, place in self._waiting:
            start = place.start - place.start % _ALIGNMENT
            self._starts.append(start)
            self._copies.append(HostCopy(tensor, range(start, place.stop)))
        self._waiting.clear()

    def prefetch(self) -> None:
        """Start to bring everything back, where that goes on beside the computation."""
        if self._device.type == "cuda" and self._incoming is None:
            self._incoming = [copy.start() for copy in self._copies]

    def fetch(self) -> Fetched:
        """Everything, back on the device."""
        incoming = self._incoming or [copy.start() for copy in self._copies]
        self._incoming = None
        arrived(self._device)
        return Fetched(incoming, self._starts)


class Fetched:
    """Parts of storages that are back on the device; `starts`: from which byte on each is there."""

    def __init__(self, storages: list[Tensor], starts: list[int]) -> None:
        self._storages = storages
        self._starts = starts

    def tensor(self, layout: Layout) -> Tensor:
        """The tensor that lay in its storage like this."""
        storage = self._storages[layout.storage]
        empty = torch.empty(0, dtype=layout.dtype, device=storage.device)
        offset = layout.offset - self._starts[layout.storage] // layout.dtype.itemsize
        return empty.set_(storage.untyped_storage(), offset, layout.size, layout.stride)

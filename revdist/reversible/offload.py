"""What an operator with OFFLOAD keeps: its saved tensors and its input, in host memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from revdist.reversible.host_copy import HostCopy, arrived


class Layout(NamedTuple):
    """How a tensor lies in its storage."""

    storage: int
    """Number of the storage in its `Offload`."""
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


class Offload:
    """Storages in host memory; tensors that share one share its copy."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._numbers: dict[int, int] = {}
        self._copies: list[HostCopy] = []
        self._incoming: list[Tensor] | None = None

    def add(self, tensor: Tensor) -> Layout:
        """Copy a tensor to the host, where its storage is not there yet.

        The tensors added must be alive until the last is added: storages are known by their address.
        """
        number = self._numbers.setdefault(tensor.untyped_storage().data_ptr(), len(self._copies))
        if number == len(self._copies):
            self._copies.append(HostCopy(tensor))
        return Layout(number, tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset())

    def prefetch(self) -> None:
        """Start to bring everything back, where that goes on beside the computation."""
        if self._device.type == "cuda" and self._incoming is None:
            self._incoming = [copy.start() for copy in self._copies]

    def fetch(self) -> Fetched:
        """Everything, back on the device."""
        incoming = self._incoming or [copy.start() for copy in self._copies]
        self._incoming = None
        arrived(self._device)
        return Fetched(incoming)


class Fetched:
    """Storages that are back on the device."""

    def __init__(self, storages: list[Tensor]) -> None:
        self._storages = storages

    def tensor(self, layout: Layout) -> Tensor:
        """The tensor that lay in its storage like this."""
        storage = self._storages[layout.storage]
        empty = torch.empty(0, dtype=layout.dtype, device=storage.device)
        return empty.set_(storage.untyped_storage(), layout.offset, layout.size, layout.stride)

"""Copies of tensors in host memory that no device's allocator counts.

From a GPU they go to pinned memory and back on a stream of their own, beside the computation. On a
CPU device they go to memory that is not torch's.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor


class HostCopy:
    """Bytes of one storage, in host memory."""

    __slots__ = ("_device", "_host", "_place")

    def __init__(self, tensor: Tensor, place: range | None = None) -> None:
        """place: which bytes of the tensor's storage; none: those between its first element and its last."""
        self._place = place if place is not None else place_of(tensor)
        source = _storage_bytes(tensor, self._place)
        self._device = tensor.device
        self._host = _host_buffer(source)
        if self._device.type == "cuda":
            stream = _copy_stream(self._device)
            stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(stream):
                self._host.copy_(source, non_blocking=True)
            source.record_stream(stream)
        else:
            self._host.copy_(source)

    def start(self) -> Tensor:
        """Bytes on the device that the copy is on its way to. `arrived` says when they may be read."""
        target = torch.empty_like(self._host, device=self._device)
        if self._device.type == "cuda":
            stream = _copy_stream(self._device)
            stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(stream):
                target.copy_(self._host, non_blocking=True)
            target.record_stream(stream)
        else:
            target.copy_(self._host)
        return target

    def write_to(self, tensor: Tensor) -> None:
        """Put the bytes back into the storage of the tensor they are from, without touching its version."""
        arrived(self._device)
        _storage_bytes(tensor, self._place).copy_(self._host)


def arrived(device: torch.device) -> None:
    """Let the computation wait for the copies that have been started."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(_copy_stream(device))


def place_of(tensor: Tensor) -> range:
    """The bytes of a tensor's storage from its first element to its last, those in between included."""
    first = tensor.storage_offset()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    end = first + 1 + sum((size - 1) * stride for size, stride in steps) if tensor.numel() else first
    return range(first * tensor.itemsize, end * tensor.itemsize)


def _storage_bytes(tensor: Tensor, place: range) -> Tensor:
    """A part of a tensor's storage as one row of bytes."""
    row = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return row.set_(tensor.untyped_storage(), place.start, (len(place),), (1,))


def _host_buffer(source: Tensor) -> Tensor:
    if source.device.type == "cuda":
        return torch.empty_like(source, device="cpu", pin_memory=True)
    return torch.from_numpy(np.empty(source.numel(), dtype=np.uint8))


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

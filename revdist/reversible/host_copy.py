"""Copies of tensors in host memory that no device's allocator counts."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class HostCopy:
    """The values of one tensor's storage, outside torch's memory."""

    __slots__ = ("_bytes",)

    def __init__(self, tensor: Tensor) -> None:
        storage = _as_bytes(tensor)
        self._bytes = np.empty(storage.numel(), dtype=np.uint8)
        torch.from_numpy(self._bytes).copy_(storage)

    @property
    def num_bytes(self) -> int:
        return self._bytes.nbytes

    def write_to(self, tensor: Tensor) -> None:
        """Put the values back into a tensor of the same storage size, without touching its version."""
        _as_bytes(tensor).copy_(torch.from_numpy(self._bytes))


def _as_bytes(tensor: Tensor) -> Tensor:
    """A tensor's whole storage as one row of bytes."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)

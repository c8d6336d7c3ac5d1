"""What autograd keeps in place of the tensors that a forward saves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from revdist.reversible.offload import Layout

if TYPE_CHECKING:
    from revdist.reversible.record import Record


class Handle:
    """Stands for one tensor that a forward saved."""

    __slots__ = ("__weakref__", "_shape_and_type", "layout", "record", "tensor", "version")

    def __init__(self, record: Record, tensor: Tensor, *, keep: bool) -> None:
        self.record = record
        self.version = tensor._version
        self.layout: Layout | None = None
        """Where the tensor is in host memory, if it is."""
        # Detached, for the tensor itself may own the node that owns this handle.
        self.tensor: Tensor | None = tensor.detach() if keep else None
        self._shape_and_type = None if keep else (tensor.shape, tensor.dtype)

    def drop(self) -> None:
        """Let the tensor go; it can be put back as `tensor`."""
        if self.tensor is not None:
            self._shape_and_type = self.shape_and_type
            self.tensor = None

    @property
    def shape_and_type(self) -> tuple[torch.Size, torch.dtype]:
        if self._shape_and_type is not None:
            return self._shape_and_type
        assert self.tensor is not None
        return self.tensor.shape, self.tensor.dtype

    @property
    def num_bytes(self) -> int:
        shape, dtype = self.shape_and_type
        return shape.numel() * dtype.itemsize


class Owned:
    """Stands for a parameter or buffer, which stays in any case."""

    __slots__ = ("record", "tensor", "version")

    def __init__(self, record: Record, tensor: Tensor) -> None:
        self.record = record
        self.tensor = tensor if tensor._base is None else tensor.detach()
        self.version = tensor._version

"""The Reformer's feed-forward, run over one piece of the sequence after the other.

    B batch   T positions   D width

Kitaev, Kaiser, Levskaya, "Reformer", ICLR 2020, section 3, 'chunking'. The hidden layer is several
times as wide as the stream, but positions do not mix in it, so it need never exist for all
positions at once. Plain autograd would still save every piece; here only the input is saved and
each piece runs again in the backward: one more run of the feed-forward in exchange for a peak that
shrinks by `num_chunks`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from revdist.errors import UsageError


class ChunkedFeedForward(nn.Module):
    """(B, T, D) -> (B, T, D): Linear, GELU, Linear on `num_chunks` pieces of the positions.

    num_chunks: 1 runs as plain autograd does; more trade one further run for memory
    dropout: on the output, outside the pieces, which must give the same when they run again

    Raises UsageError for a number of pieces below 1.
    """

    def __init__(self, width: int, hidden: int, *, num_chunks: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        if num_chunks < 1:
            raise UsageError(f"num_chunks must be at least 1, not {num_chunks}")
        self.num_chunks = num_chunks
        self.layers = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.num_chunks == 1:
            out_BTD = self.layers(x_BTD)
        else:
            parameters = self.layers.parameters()
            out_BTD = _Chunked.apply(self.layers, self.num_chunks, x_BTD, *parameters)  # type: ignore[no-untyped-call]
        dropped_BTD: Tensor = self.dropout(out_BTD)
        return dropped_BTD

    def extra_repr(self) -> str:
        return f"num_chunks={self.num_chunks}"


class _Chunked(torch.autograd.Function):
    """A module over the pieces of dimension 1. Parameters are arguments so that autograd sees them."""

    @staticmethod
    def forward(ctx: Any, module: nn.Module, num_chunks: int, x_BTD: Tensor, *parameters: Tensor) -> Tensor:
        device_type = x_BTD.device.type
        ctx.module, ctx.num_chunks, ctx.device_type = module, num_chunks, device_type
        ctx.autocast = (torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type))
        ctx.save_for_backward(x_BTD, *parameters)
        return torch.cat([module(piece) for piece in x_BTD.chunk(num_chunks, dim=1)], dim=1)

    @staticmethod
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor | None, ...]:
        x_BTD, *_ = ctx.saved_tensors  # the parameters too, so that autograd notices edits of them
        differentiable = torch.is_grad_enabled()  # a double backward needs the graph of this run
        needs_grad = ctx.needs_input_grad[2]
        parameters = [parameter for parameter in ctx.module.parameters() if parameter.requires_grad]
        totals: list[Tensor | None] = [None] * len(parameters)
        pieces: list[Tensor] = []
        enabled, dtype = ctx.autocast
        with torch.enable_grad(), torch.autocast(ctx.device_type, dtype, enabled):
            for piece, grad in zip(*(t.chunk(ctx.num_chunks, dim=1) for t in (x_BTD, grad_BTD)), strict=True):
                leaf = piece if differentiable else piece.detach().requires_grad_(needs_grad)
                sources = [leaf, *parameters] if needs_grad else parameters
                found = list(torch.autograd.grad(ctx.module(leaf), sources, grad, create_graph=differentiable))
                if needs_grad:
                    pieces.append(found.pop(0))
                totals = [new if old is None else old + new for old, new in zip(totals, found, strict=True)]
        in_order = iter(totals)
        grads = (next(in_order) if needed else None for needed in ctx.needs_input_grad[3:])
        return None, None, torch.cat(pieces, dim=1) if pieces else None, *grads

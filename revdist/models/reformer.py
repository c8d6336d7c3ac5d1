"""Reformer: a byte-level language model that is reversible and attends within hashed buckets.

    B batch   T positions   D width   V vocabulary

Kitaev, Kaiser, Levskaya, "Reformer: The Efficient Transformer", ICLR 2020. The embedding starts
both streams; a block is an additive coupling of attention and a chunked feed-forward, each
normalised first; the streams are joined and normalised before the vocabulary. As in the authors'
published models, attention is local and hashed in turn.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from revdist.errors import UsageError
from revdist.reversible.attention import LocalAttention, LSHAttention
from revdist.reversible.chain import ReversibleChain
from revdist.reversible.couplings import AdditiveCoupling
from revdist.reversible.feed_forward import ChunkedFeedForward


class Reformer(nn.Module):
    """Token ids (B, T), T up to `length`, to next-token logits (B, V, T), as cross_entropy takes them.

    num_chunks: pieces of the feed-forward, see `ChunkedFeedForward`

    Raises UsageError for a sequence longer than `length`.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        length: int,
        width: int,
        depth: int,
        num_heads: int,
        chunk_length: int = 64,
        num_rounds: int = 2,
        hidden_ratio: int = 4,
        num_chunks: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(num_classes, width)
        self.position_TD = nn.Parameter(torch.empty(length, width))
        for table in (self.embed.weight, self.position_TD):
            nn.init.normal_(table, std=0.02)

        def block(index: int) -> AdditiveCoupling:
            attention: nn.Module = LocalAttention(width, num_heads, chunk_length=chunk_length)
            if index % 2:
                attention = LSHAttention(width, num_heads, chunk_length=chunk_length, num_rounds=num_rounds)
            feed_forward = ChunkedFeedForward(width, hidden_ratio * width, num_chunks=num_chunks, dropout=dropout)
            f = nn.Sequential(nn.LayerNorm(width), attention, nn.Dropout(dropout))
            return AdditiveCoupling(f, nn.Sequential(nn.LayerNorm(width), feed_forward))

        self.chain = ReversibleChain([block(index) for index in range(depth)], split_dim=-1)
        self.norm = nn.LayerNorm(2 * width)
        self.head = nn.Linear(2 * width, num_classes)

    def forward(self, token_BT: Tensor) -> Tensor:
        length = token_BT.shape[1]
        if length > len(self.position_TD):
            raise UsageError(f"{length} positions exceed the model's length {len(self.position_TD)}: raise length")
        x_BTD = self.embed(token_BT) + self.position_TD[:length]
        both_BTD = torch.cat(self.chain((x_BTD, x_BTD)), dim=-1)
        logits_BTV: Tensor = self.head(self.norm(both_BTD))
        return logits_BTV.transpose(1, 2)


def reformer(
    num_classes: int = 256,
    *,
    length: int = 256,
    width: int = 128,
    depth: int = 6,
    num_heads: int = 4,
    chunk_length: int = 64,
    num_rounds: int = 2,
    num_chunks: int = 1,
    dropout: float = 0.0,
) -> Reformer:
    """A small byte-level Reformer: 256 bytes of context by default."""
    return Reformer(
        num_classes,
        length=length,
        width=width,
        depth=depth,
        num_heads=num_heads,
        chunk_length=chunk_length,
        num_rounds=num_rounds,
        num_chunks=num_chunks,
        dropout=dropout,
    )


def reformer_enwik8(num_classes: int = 256) -> Reformer:
    """A long-context model after the paper's enwik8 runs: 64k bytes, 12 layers of width 1024, 8 rounds."""
    return Reformer(
        num_classes, length=65536, width=1024, depth=12, num_heads=8, num_rounds=8, num_chunks=64, dropout=0.1
    )

"""Classes built as those of memcnn and transformers are, for the adapters to take over."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


class AdditiveCoupling(nn.Module):
    """Shaped as memcnn's: one tensor in, halved inside."""

    def __init__(self, Fm: nn.Module, Gm: nn.Module, split_dim: int = 1) -> None:
        super().__init__()
        self.Gm, self.Fm, self.split_dim = Gm, Fm, split_dim

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=self.split_dim)
        y1 = x1 + self.Fm(x2)
        return torch.cat([y1, x2 + self.Gm(y1)], dim=self.split_dim)

    def inverse(self, y: Tensor) -> Tensor:
        y1, y2 = y.chunk(2, dim=self.split_dim)
        x2 = y2 - self.Gm(y1)
        return torch.cat([y1 - self.Fm(x2), x2], dim=self.split_dim)


class AffineCoupling(AdditiveCoupling):
    """Shaped as memcnn's: branches return a scale and a shift."""

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=self.split_dim)
        scale, shift = self.Fm(x2)
        y1 = x1 * scale + shift
        scale, shift = self.Gm(y1)
        return torch.cat([y1, x2 * scale + shift], dim=self.split_dim)


class InvertibleModuleWrapper(nn.Module):
    """Shaped as memcnn's."""

    def __init__(self, fn: nn.Module, keep_input: bool = False) -> None:
        super().__init__()
        self._fn, self.keep_input = fn, keep_input

    def forward(self, x: Tensor) -> Tensor:
        return self._fn(x)

    def inverse(self, y: Tensor) -> Tensor:
        return self._fn.inverse(y)


class SelfAttention(nn.Module):
    """Shaped as transformers' LSHSelfAttention: hashes with fresh random rotations."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_key = nn.Linear(width, width, bias=False)
        self.hashes = 0

    def _hash_vectors(self, vectors: Tensor, num_hashes: int) -> Tensor:
        self.hashes += 1
        rotation = torch.randn(vectors.shape[-1], num_hashes, dtype=vectors.dtype)
        # Another hash every time, as rounding may give: a replay must not use its own.
        return (vectors @ rotation).argmax(-1) + self.hashes

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, num_hashes: int | None) -> Any:
        vectors = self.query_key(hidden_states)
        buckets = self._hash_vectors(vectors, num_hashes or 4)
        out = vectors * buckets.unsqueeze(-1)
        return SimpleNamespace(hidden_states=out if attention_mask is None else out * attention_mask.unsqueeze(-1))


class Attention(nn.Module):
    """Shaped as transformers' ReformerAttention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(width)
        self.self_attention = SelfAttention(width)
        self.dropout = nn.Dropout(0.25)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, num_hashes: int | None = None, **_: Any
    ) -> Any:
        inner = self.self_attention(self.layer_norm(hidden_states), attention_mask, num_hashes)
        return SimpleNamespace(hidden_states=self.dropout(inner.hidden_states), buckets=None)


class ReformerLayer(nn.Module):
    """Shaped as transformers'."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = Attention(width)
        self.feed_forward = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.Dropout(0.25))

    def forward(self, prev_attn_output: Tensor, hidden_states: Tensor, **arguments: Any) -> Any:
        attn_output = prev_attn_output + self.attention(hidden_states, **arguments).hidden_states
        return SimpleNamespace(attn_output=attn_output, hidden_states=hidden_states + self.feed_forward(attn_output))

    def backward_pass(self, *_: Any) -> None:
        raise AssertionError("the peer's backward is not used")


class ReformerEncoder(nn.Module):
    """Shaped as transformers'; runs by plain autograd, which is the reference."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.dropout = 0.1
        self.layers = nn.ModuleList([ReformerLayer(width) for _ in range(depth)])
        self.layer_norm = nn.LayerNorm(2 * width)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        num_hashes: int | None = None,
        past_buckets_states: Any = None,
        use_cache: bool = False,
        orig_sequence_length: int | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> Any:
        attn_output = hidden_states
        every = []
        for layer in self.layers:
            every.append(hidden_states)
            out = layer(attn_output, hidden_states, attention_mask=attention_mask, num_hashes=num_hashes)
            attn_output, hidden_states = out.attn_output, out.hidden_states
        both = self.layer_norm(torch.cat([attn_output, hidden_states], dim=-1))
        both = nn.functional.dropout(both, self.dropout, self.training)
        return SimpleNamespace(hidden_states=both, all_hidden_states=every if output_hidden_states else None)


class ReformerModel(nn.Module):
    """Something with an encoder in it."""

    def __init__(self, width: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(16, width)
        self.encoder = ReformerEncoder(width, depth)

    def forward(self, token: Tensor, **arguments: Any) -> Any:
        return self.encoder(self.embeddings(token), **arguments)

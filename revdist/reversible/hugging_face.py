"""Hugging Face's Reformer, taken over by what its classes have, without importing transformers.

A `ReformerLayer` has `attention` and `feed_forward`, an additive coupling on (attention stream,
hidden stream); a `ReformerEncoder` has `layers`, `layer_norm` and `dropout`. Taken over, the layers
become one chain under the same name, so `state_dict` keeps its keys. Random state is replayed by
the chain, so the seeds that transformers draws before every branch are not needed. Hashing is
replayed through notes: the buckets of the forward are the buckets of the backward.

What it does not do well: transformers keeps what generation needs (caches, attention
probabilities, hidden states of every layer) outside the streams. Where a call asks for any of that,
or runs without gradients, transformers' own forward runs.
"""

from __future__ import annotations

import types
from typing import Any, ClassVar, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revdist.reversible.chain import ReversibleChain
from revdist.reversible.couplings import Half
from revdist.reversible.notes import noted
from revdist.reversible.operator import Operator, ReversibleOperator


def is_layer(module: nn.Module) -> bool:
    """Whether the module is built like a ReformerLayer."""
    return all(hasattr(module, name) for name in ("attention", "feed_forward", "backward_pass"))


def is_encoder(module: nn.Module) -> bool:
    """Whether the module is built like a ReformerEncoder."""
    layers = getattr(module, "layers", None)
    return isinstance(layers, nn.ModuleList) and len(layers) > 0 and all(map(is_layer, layers))


def adapt_layer(layer: nn.Module) -> ReversibleOperator:
    """A ReformerLayer as a coupling of the pair (attention stream, hidden stream)."""
    return _Layer(layer)


def adapt_encoder(encoder: nn.Module) -> nn.Module:
    """A ReformerEncoder whose layers are a chain, called as before."""
    return _Encoder(encoder)


@final
class _Layer(ReversibleOperator):
    num_streams: ClassVar[int] = 2

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.attention = cast(nn.Module, layer.attention)
        self.feed_forward = cast(nn.Module, layer.feed_forward)
        self.training = layer.training
        self.arguments: dict[str, Any] = {}
        """What the attention of the present call is given besides its stream."""
        self.attention.register_forward_pre_hook(self._with_arguments, with_kwargs=True)
        attention: Any = self.attention.self_attention
        if hasattr(attention, "_hash_vectors"):
            attention._hash_vectors = _NotedHash(attention)

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        y1 = _add(x1, self.attention(x2))
        return y1, x2 + self.feed_forward(y1)

    def inverse(self, y1: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
        x2 = y2 - self.feed_forward(y1)
        return _subtract(y1, self.attention(x2)), x2

    def operators(self, name: str) -> tuple[Operator, ...]:
        return (
            Half(name, self, "attention", changed=0, combine=_add, uncombine=_subtract),
            Half(name, self, "feed_forward", changed=1, combine=torch.add, uncombine=torch.sub),
        )

    def _with_arguments(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """A replay gets the mask of its forward, not that of the latest call."""
        return args, kwargs | noted(module, lambda: dict(self.arguments))


def _add(stream: Tensor, output: Any) -> Tensor:
    return stream + cast(Tensor, output.hidden_states)


def _subtract(stream: Tensor, output: Any) -> Tensor:
    return stream - cast(Tensor, output.hidden_states)


class _NotedHash:
    """For an attention's `_hash_vectors`: replays, whose vectors differ by rounding, read the forward's result.

    A replay still calls the hash, so that what draws random numbers next draws those of the forward.
    """

    def __init__(self, attention: Any) -> None:
        self.attention = attention

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        buckets: Tensor = type(self.attention)._hash_vectors(self.attention, *args, **kwargs)
        return noted(self.attention, lambda: buckets)


@final
class _Encoder(nn.Module):
    layers: ReversibleChain

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        layers = cast(nn.ModuleList, encoder.layers)
        adapted = {layer: _Layer(layer) for layer in layers}  # one that comes twice stays one
        self.layers = ReversibleChain([adapted[layer] for layer in layers], split_dim=-1)
        self.layers.training = layers.training
        self.layer_norm = cast(nn.Module, encoder.layer_norm)
        self.dropout = cast(float, encoder.dropout)
        # Not registered: its layers own the same branches as the chain's.
        self.__dict__["_original"] = encoder
        self.training = encoder.training

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
        wants_more = output_hidden_states or output_attentions or past_buckets_states is not None
        if wants_more or not torch.is_grad_enabled():
            return self._with_present_flags()(
                hidden_states,
                attention_mask=attention_mask,
                num_hashes=num_hashes,
                past_buckets_states=past_buckets_states,
                use_cache=use_cache,
                orig_sequence_length=orig_sequence_length,
                output_hidden_states=output_hidden_states,
                output_attentions=output_attentions,
            )
        arguments = {"attention_mask": attention_mask, "num_hashes": num_hashes}
        for layer in self.layers.children():
            cast(_Layer, layer).arguments = arguments
        try:
            both = torch.cat(self.layers((hidden_states, hidden_states)), dim=-1)
        finally:
            for layer in self.layers.children():
                cast(_Layer, layer).arguments = {}
        out = F.dropout(self.layer_norm(both), p=self.dropout, training=self.training)
        return types.SimpleNamespace(
            hidden_states=out, all_hidden_states=None, all_attentions=None, past_buckets_states=None
        )

    def _with_present_flags(self) -> nn.Module:
        """The original, its own modules in training where those in their place are; the branches are the same ones."""
        original = cast(nn.Module, self.__dict__["_original"])
        layers = cast(nn.ModuleList, original.layers)
        original.training = layers.training = self.training
        for layer, adapted in zip(layers, self.layers._modules.values(), strict=True):
            assert adapted is not None
            layer.training = adapted.training
        return original

"""The Reformer's attention: over hashed buckets, or over neighbouring chunks.

    B batch   T positions   D width   H heads   E width of a head (D / H)   R hash rounds
    K buckets   N chunks   C positions in a chunk   S positions a chunk sees (2C)

Source: Kitaev, Kaiser, Levskaya, "Reformer: The Efficient Transformer", ICLR 2020. Queries and keys
are one projection (section 2, 'shared QK'); a vector's bucket is argmax([qR; -qR]) for a random
rotation R (section 2, 'locality sensitive hashing'); positions are sorted by bucket and attend to
their own chunk and the one before; rounds are combined by their log-sum-exp (appendix A). A block
of the Reformer is `AdditiveCoupling(LSHAttention(...), ChunkedFeedForward(...))` with a LayerNorm
before each.

Pitfalls
- A rebuilt input differs by rounding, and a vector between two buckets may then fall into the
  other one: another permutation, and a wrong gradient. So a replay does not hash: it reads the
  buckets of the forward, which are held in every mode: B H R T bytes up to 256 buckets.
- Training draws new rotations each forward, from torch's generator; evaluation uses the fixed
  `hash_seed`, so that it is deterministic.
- The chunk that a position falls into depends on how many later positions hash before it: the mask
  is causal in content, as in the paper, but not in the choice of what is near.
- Like the paper's code by default, a chunk attends across the bucket borders inside it.
"""

from __future__ import annotations

import math
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revdist.errors import UsageError
from revdist.reversible.notes import noted

_SELF_PENALTY = -1e5
"""Score of a position for itself: only where it sees nothing else (section 2, 'causal masking')."""


Penalties = tuple[tuple[Tensor, float], ...]
"""Where scores are replaced, and by what, in this order."""


@final
class LSHAttention(nn.Module):
    """Self-attention of (B, T, D) in O(T C) per round.

    width: D, a multiple of num_heads
    chunk_length: C; sequences up to C attend in full, longer ones must be a multiple of it
    num_rounds: R, independent hashes; more find more of the neighbours, at R times the cost
    causal: positions see those before them only
    hash_seed: of the rotations in evaluation

    Raises UsageError for sizes that do not divide.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        chunk_length: int = 64,
        num_rounds: int = 2,
        causal: bool = True,
        hash_seed: int = 0,
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise UsageError(f"width {width} is not a multiple of num_heads {num_heads}")
        self.num_heads, self.chunk_length, self.num_rounds = num_heads, chunk_length, num_rounds
        self.causal, self.hash_seed = causal, hash_seed
        self.query_key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        qk_BHTE, v_BHTE = (_heads(map_(x_BTD), self.num_heads) for map_ in (self.query_key, self.value))
        length = x_BTD.shape[1]
        if length <= self.chunk_length:
            position_T = torch.arange(length, device=x_BTD.device)
            k_BHTE = F.normalize(qk_BHTE, dim=-1)
            out_BHTE, _ = _attend(qk_BHTE, k_BHTE, v_BHTE, self._penalties(position_T, position_T))
        else:
            _check_length(length, self.chunk_length)
            out_BHTE = self._attend_in_buckets(qk_BHTE, v_BHTE, self.buckets(qk_BHTE))
        out_BTD: Tensor = self.output(out_BHTE.transpose(1, 2).flatten(2))
        return out_BTD

    def buckets(self, qk_BHTE: Tensor) -> Tensor:
        """The bucket of each vector in each round, (B, H, R, T): the forward's own in a replay."""
        num_halves = math.ceil(qk_BHTE.shape[2] / self.chunk_length / 2)
        generator = None if self.training else torch.Generator(qk_BHTE.device).manual_seed(self.hash_seed)
        size = (qk_BHTE.shape[1], self.num_rounds, qk_BHTE.shape[3], num_halves)
        # Drawn in a replay too, so that what draws next, a dropout, gets the numbers of the forward.
        rotation_HREK = torch.randn(size, device=qk_BHTE.device, dtype=qk_BHTE.dtype, generator=generator)
        bucket_BHRT: Tensor = noted(self, lambda: _hashed(qk_BHTE, rotation_HREK))
        return bucket_BHRT.long()

    def _attend_in_buckets(self, qk_BHTE: Tensor, v_BHTE: Tensor, bucket_BHRT: Tensor) -> Tensor:
        length = qk_BHTE.shape[2]
        position_T = torch.arange(length, device=qk_BHTE.device)
        order_BHRT = (bucket_BHRT * length + position_T).argsort(dim=-1)
        q_BHRNCE = self._chunks(qk_BHTE, order_BHRT)
        position_BHRNC = _split(order_BHRT, 3, length // self.chunk_length).int()
        out_BHRNCE, logsum_BHRNC = _attend(
            q_BHRNCE,
            _with_chunk_before(F.normalize(q_BHRNCE, dim=-1)),
            _with_chunk_before(self._chunks(v_BHTE, order_BHRT)),
            self._penalties(position_BHRNC, _with_chunk_before(position_BHRNC)),
        )
        back_BHRT = order_BHRT.argsort(dim=-1)
        out_BHRTE = _pick(out_BHRNCE.flatten(3, 4), back_BHRT)
        weight_BHRT = logsum_BHRNC.flatten(3).gather(3, back_BHRT).softmax(dim=2)
        return (out_BHRTE * weight_BHRT.unsqueeze(-1).to(out_BHRTE.dtype)).sum(dim=2)

    def _chunks(self, x_BHTE: Tensor, order_BHRT: Tensor) -> Tensor:
        rounds_BHRTE = x_BHTE.unsqueeze(2).expand(-1, -1, self.num_rounds, -1, -1)
        return _split(_pick(rounds_BHRTE, order_BHRT), 3, order_BHRT.shape[3] // self.chunk_length)

    def _penalties(self, position_C: Tensor, position_S: Tensor) -> Penalties:
        later_CS = position_C.unsqueeze(-1) < position_S.unsqueeze(-2)
        itself_CS = position_C.unsqueeze(-1) == position_S.unsqueeze(-2)
        return ((later_CS, -math.inf), (itself_CS, _SELF_PENALTY)) if self.causal else ((itself_CS, _SELF_PENALTY),)

    def extra_repr(self) -> str:
        hashing = f"chunk_length={self.chunk_length}, num_rounds={self.num_rounds}"
        return f"num_heads={self.num_heads}, {hashing}, causal={self.causal}"


@final
class LocalAttention(nn.Module):
    """Causal self-attention of (B, T, D) to one's own chunk and the one before, by position.

    The Reformer's published models alternate it with LSH attention. It has queries and keys apart,
    draws nothing and notes nothing.

    chunk_length: C; sequences up to C attend in full, longer ones must be a multiple of it

    Raises UsageError for sizes that do not divide.
    """

    def __init__(self, width: int, num_heads: int, *, chunk_length: int = 64) -> None:
        super().__init__()
        if width % num_heads:
            raise UsageError(f"width {width} is not a multiple of num_heads {num_heads}")
        self.num_heads, self.chunk_length = num_heads, chunk_length
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        length = x_BTD.shape[1]
        position_T = torch.arange(length, device=x_BTD.device, dtype=torch.int32)
        q_BHTE, k_BHTE, v_BHTE = (_heads(part, self.num_heads) for part in self.query_key_value(x_BTD).chunk(3, dim=2))
        if length <= self.chunk_length:
            later_TT = position_T.unsqueeze(1) < position_T
            out_BHTE, _ = _attend(q_BHTE, k_BHTE, v_BHTE, ((later_TT, -math.inf),))
        else:
            _check_length(length, self.chunk_length)
            num_chunks = length // self.chunk_length
            # The chunk dimension is number 3, as with rounds in front of it.
            q_NCE, k_NCE, v_NCE = (_split(x_BHTE.unsqueeze(2), 3, num_chunks) for x_BHTE in (q_BHTE, k_BHTE, v_BHTE))
            position_NC = _split(position_T.view(1, 1, 1, -1), 3, num_chunks)
            later_NCS = position_NC.unsqueeze(-1) < _with_chunk_before(position_NC).unsqueeze(-2)
            out_NCE, _ = _attend(q_NCE, _with_chunk_before(k_NCE), _with_chunk_before(v_NCE), ((later_NCS, -math.inf),))
            out_BHTE = out_NCE.flatten(2, 4)
        out_BTD: Tensor = self.output(out_BHTE.transpose(1, 2).flatten(2))
        return out_BTD

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, chunk_length={self.chunk_length}"


def _attend(q_CE: Tensor, k_SE: Tensor, v_SE: Tensor, penalties: Penalties) -> tuple[Tensor, Tensor]:
    """Attention of C queries to S keys, any leading dimensions: output (..., C, E), log-sum-exp (..., C)."""
    score_CS = (q_CE / math.sqrt(q_CE.shape[-1])) @ k_SE.transpose(-1, -2)
    score_CS = score_CS.to(torch.promote_types(score_CS.dtype, torch.float32))
    for where_CS, score in penalties:
        score_CS.masked_fill_(where_CS, score)
    weight_CS, logsum_C = _SoftmaxAndLogSum.apply(score_CS)  # type: ignore[no-untyped-call]
    return weight_CS.to(v_SE.dtype) @ v_SE, logsum_C


class _SoftmaxAndLogSum(torch.autograd.Function):
    """Softmax and log-sum-exp of the last dimension, saving the softmax alone."""

    @staticmethod
    def forward(ctx: Any, score_CS: Tensor) -> tuple[Tensor, Tensor]:
        weight_CS = score_CS.softmax(dim=-1)
        logsum_C = score_CS.amax(dim=-1) - weight_CS.amax(dim=-1).log()
        ctx.save_for_backward(weight_CS)
        return weight_CS, logsum_C

    @staticmethod
    def backward(ctx: Any, grad_CS: Tensor, grad_logsum_C: Tensor) -> Tensor:
        (weight_CS,) = ctx.saved_tensors
        mean_C = torch.linalg.vecdot(grad_CS, weight_CS) - grad_logsum_C
        grad_score_CS: Tensor = (grad_CS - mean_C.unsqueeze(-1)) * weight_CS
        return grad_score_CS


@torch.no_grad()
def _hashed(qk_BHTE: Tensor, rotation_HREK: Tensor) -> Tensor:
    """The nearest of the rotated axes and their opposites, in the smallest integer that holds it."""
    turned_BHRTK = qk_BHTE.unsqueeze(2) @ rotation_HREK
    bucket_BHRT = torch.cat([turned_BHRTK, -turned_BHRTK], dim=-1).argmax(dim=-1)
    return bucket_BHRT.to(torch.uint8 if 2 * rotation_HREK.shape[-1] <= 256 else torch.int32)


def _check_length(length: int, chunk_length: int) -> None:
    if length % chunk_length:
        raise UsageError(
            f"{length} positions are not a multiple of chunk_length {chunk_length}: "
            f"pad the sequence to {math.ceil(length / chunk_length) * chunk_length}"
        )


def _heads(x_BTD: Tensor, num_heads: int) -> Tensor:
    return _split(x_BTD, 2, num_heads).transpose(1, 2)


def _with_chunk_before(x_BHRNC: Tensor) -> Tensor:
    """Each chunk with the one before it, the first with the last: (B, H, R, N, 2C, ...)."""
    return torch.cat([x_BHRNC.roll(1, dims=3), x_BHRNC], dim=4)


def _split(x: Tensor, dim: int, num_parts: int) -> Tensor:
    """Dimension `dim` as two: parts, and what is in a part."""
    return x.reshape(*x.shape[:dim], num_parts, -1, *x.shape[dim + 1 :])


def _pick(x_BHRTE: Tensor, order_BHRT: Tensor) -> Tensor:
    return x_BHRTE.gather(3, order_BHRT.unsqueeze(-1).expand(*order_BHRT.shape, x_BHRTE.shape[-1]))

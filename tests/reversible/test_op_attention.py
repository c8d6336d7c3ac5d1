"""The Reformer's branches: hashed attention that replays its buckets, and a feed-forward in pieces."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from revdist.errors import UsageError
from revdist.planning.costs import Mode
from revdist.reversible import AdditiveCoupling, ReversibleChain
from revdist.reversible import attention as attention_module
from revdist.reversible.attention import LocalAttention, LSHAttention
from revdist.reversible.feed_forward import ChunkedFeedForward

torch.set_num_threads(1)


def full_attention(like: LSHAttention) -> LSHAttention:
    whole = LSHAttention(8, like.num_heads, chunk_length=10**6, causal=like.causal).double().eval()
    whole.load_state_dict(like.state_dict())
    return whole


@pytest.mark.parametrize("causal", [True, False])
def test_two_chunks_see_everything_so_it_is_full_attention(causal: bool) -> None:
    torch.manual_seed(0)
    hashed = LSHAttention(8, 2, chunk_length=8, num_rounds=3, causal=causal).double().eval()
    x_BTD = torch.randn(2, 16, 8, dtype=torch.float64)
    torch.testing.assert_close(hashed(x_BTD), full_attention(hashed)(x_BTD))


def test_more_rounds_come_nearer_to_full_attention() -> None:
    torch.manual_seed(0)
    x_BTD = torch.randn(4, 128, 8, dtype=torch.float64)
    errors = []
    for num_rounds in (1, 8):
        torch.manual_seed(1)
        hashed = LSHAttention(8, 2, chunk_length=8, num_rounds=num_rounds).double().eval()
        errors.append(float((hashed(x_BTD) - full_attention(hashed)(x_BTD)).detach().norm()))
    assert errors[1] < 0.8 * errors[0]


def test_full_attention_is_causal() -> None:
    torch.manual_seed(0)
    attention = LSHAttention(8, 2, chunk_length=16).double()
    x_BTD = torch.randn(1, 16, 8, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(attention(x_BTD)[0, 5].sum(), x_BTD)
    assert gradient[0, :6].abs().sum(-1).min() > 0
    assert gradient[0, 6:].abs().max() == 0


def test_hashed_attention_is_causal_in_content() -> None:
    torch.manual_seed(0)
    attention = LSHAttention(8, 2, chunk_length=4, num_rounds=2).double().eval()
    x_BTD = torch.randn(1, 32, 8, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(attention(x_BTD)[0, 9].sum(), x_BTD)
    assert gradient[0, 10:].abs().max() == 0


@pytest.mark.parametrize("length", [4, 8, 24])
def test_local_attention_is_masked_attention_of_two_chunks(length: int) -> None:
    torch.manual_seed(0)
    attention = LocalAttention(8, 2, chunk_length=8).double()
    x_BTD = torch.randn(2, length, 8, dtype=torch.float64)
    q, k, v = (part.unflatten(2, (2, -1)).transpose(1, 2) for part in attention.query_key_value(x_BTD).chunk(3, dim=2))
    position = torch.arange(length)
    distance = position.unsqueeze(1) // 8 - position // 8
    seen = (position.unsqueeze(1) >= position) & (distance <= 1)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    torch.testing.assert_close(attention(x_BTD), attention.output(expected.transpose(1, 2).flatten(2)))


def test_training_draws_new_buckets_and_evaluation_does_not() -> None:
    torch.manual_seed(0)
    attention = LSHAttention(8, 2, chunk_length=4)
    x_BTD = torch.randn(2, 32, 8)
    assert not torch.equal(attention(x_BTD), attention(x_BTD))
    attention.eval()
    torch.testing.assert_close(attention(x_BTD), attention(x_BTD), rtol=0, atol=0)


def test_a_replay_reads_the_buckets_and_does_not_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hashes = []
    true_hash = attention_module._hashed

    def counted(qk_BHTE: Tensor, rotation_HREK: Tensor) -> Tensor:
        bucket_BHRT = true_hash(qk_BHTE, rotation_HREK)
        # A second hash of nearly the same vectors comes out differently, as it may by rounding.
        hashes.append(bucket_BHRT)
        return bucket_BHRT if len(hashes) == 1 else bucket_BHRT.flip(-1)

    monkeypatch.setattr(attention_module, "_hashed", counted)
    chain = ReversibleChain([AdditiveCoupling(LSHAttention(8, 2, chunk_length=4), nn.Linear(8, 8))]).double()
    x = (torch.randn(2, 16, 8, dtype=torch.float64), torch.randn(2, 16, 8, dtype=torch.float64))
    gradients = []
    for mode in (Mode.SAVE, Mode.INVERT):
        hashes.clear()
        torch.manual_seed(1)
        chain.set_schedule((mode,) * chain.num_operators)
        loss = sum(out.square().sum() for out in chain(x))
        gradients.append(torch.autograd.grad(loss, list(chain.parameters())))
        assert len(hashes) == 1
    for saved, inverted in zip(*gradients, strict=True):
        torch.testing.assert_close(inverted, saved, rtol=1e-9, atol=1e-9)


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UsageError, match="pad the sequence to 24"):
        LSHAttention(8, 2, chunk_length=8)(torch.randn(1, 20, 8))
    with pytest.raises(UsageError, match="not a multiple of num_heads"):
        LSHAttention(9, 2)
    with pytest.raises(UsageError, match="pad the sequence to 24"):
        LocalAttention(8, 2, chunk_length=8)(torch.randn(1, 20, 8))
    with pytest.raises(UsageError, match="not a multiple of num_heads"):
        LocalAttention(9, 2)
    with pytest.raises(UsageError, match="num_chunks"):
        ChunkedFeedForward(8, 16, num_chunks=0)


@pytest.mark.parametrize("needs_grad", [True, False])
def test_pieces_give_the_gradients_of_the_whole(needs_grad: bool) -> None:
    torch.manual_seed(0)
    pieces, whole = ChunkedFeedForward(6, 24, num_chunks=3).double(), ChunkedFeedForward(6, 24).double()
    whole.load_state_dict(pieces.state_dict())
    pieces.layers[0].bias.requires_grad_(False)
    whole.layers[0].bias.requires_grad_(False)
    x_BTD = torch.randn(2, 8, 6, dtype=torch.float64, requires_grad=needs_grad)
    pairs = []
    for module in (pieces, whole):
        sources = [p for p in module.parameters() if p.requires_grad] + ([x_BTD] if needs_grad else [])
        pairs.append(torch.autograd.grad(module(x_BTD).pow(2).sum(), sources))
    for found, expected in zip(*pairs, strict=True):
        torch.testing.assert_close(found, expected)


def test_pieces_can_be_differentiated_twice() -> None:
    torch.manual_seed(0)
    module = ChunkedFeedForward(3, 6, num_chunks=2).double()
    x_BTD = torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(module, (x_BTD,))


def test_pieces_run_again_under_the_forwards_autocast() -> None:
    torch.manual_seed(0)
    pieces, whole = ChunkedFeedForward(8, 32, num_chunks=2), ChunkedFeedForward(8, 32)
    whole.load_state_dict(pieces.state_dict())
    x_BTD = torch.randn(2, 8, 8)
    pairs = []
    for module in (pieces, whole):
        with torch.autocast("cpu", torch.bfloat16):
            out = module(x_BTD)
        assert out.dtype == torch.bfloat16
        pairs.append(torch.autograd.grad(out.float().square().sum(), list(module.parameters())))
    for found, expected in zip(*pairs, strict=True):
        assert float((found - expected).norm() / expected.norm()) < 0.02


def test_pieces_save_their_input_only() -> None:
    saved: list[Tensor] = []
    x_BTD = torch.randn(1, 64, 8)
    parameters = 0
    for num_chunks in (1, 8):
        module = ChunkedFeedForward(8, 64, num_chunks=num_chunks)
        parameters = sum(p.numel() for p in module.parameters())
        saved.clear()
        with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
            module(x_BTD)
        total = sum({t.untyped_storage().data_ptr(): t.numel() for t in saved}.values())
        assert (total <= x_BTD.numel() + parameters) == (num_chunks == 8)

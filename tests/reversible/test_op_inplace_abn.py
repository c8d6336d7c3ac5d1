"""In-place ABN is BatchNorm and leaky ReLU, at half of what they save."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from revdist.planning.costs import Mode
from revdist.reversible import ReversibleChain
from revdist.reversible.inplace_abn import InPlaceABN

torch.set_num_threads(1)


def saved_bytes(run: object) -> int:
    """Bytes of the distinct storages that a forward saves."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        out = run()  # type: ignore[operator]
    del out
    return sum(storages.values())


def batch_norm(training: bool, shape: tuple[int, ...]) -> nn.Module:
    norm = nn.BatchNorm1d(shape[1]) if len(shape) < 4 else nn.BatchNorm2d(shape[1])
    nn.init.uniform_(norm.weight, -2, 2)
    nn.init.normal_(norm.bias)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm.double().train(training)


@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 5), (4, 3, 5, 6)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_it_computes_what_batch_norm_and_leaky_relu_do(training: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    norm = batch_norm(training, shape)
    inplace = InPlaceABN.from_batch_norm(norm)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape, dtype=torch.float64)
    out, reference = inplace(x), F.leaky_relu(norm(x), 0.01)
    torch.testing.assert_close(out, reference)
    found = torch.autograd.grad((out * weight).pow(2).sum(), [x, *inplace.parameters()], create_graph=True)
    expected = torch.autograd.grad((reference * weight).pow(2).sum(), [x, *norm.parameters()], create_graph=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    twice = torch.autograd.grad(sum(g.square().sum() for g in found), [x, *inplace.parameters()])
    reference_twice = torch.autograd.grad(sum(g.square().sum() for g in expected), [x, *norm.parameters()])
    for a, b in zip(twice, reference_twice, strict=True):
        torch.testing.assert_close(a, b)
    for name, buffer in norm.named_buffers():
        torch.testing.assert_close(dict(inplace.named_buffers())[name], buffer)


def test_state_dicts_are_interchangeable_with_batch_norm() -> None:
    assert InPlaceABN(3).state_dict().keys() == nn.BatchNorm2d(3).state_dict().keys()
    InPlaceABN(3).load_state_dict(nn.BatchNorm2d(3).state_dict())


def test_a_new_one_scales_by_one() -> None:
    x = torch.randn(64, 3)
    torch.testing.assert_close(InPlaceABN(3, negative_slope=1.0)(x), nn.BatchNorm1d(3)(x))


def test_it_saves_its_output_only_which_the_next_convolution_saves_too() -> None:
    x = torch.randn(4, 8, 16, 16, requires_grad=True)
    inplace, norm, conv = InPlaceABN(8), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
    activation_bytes = x.numel() * 4
    small_bytes = 4096
    assert saved_bytes(lambda: inplace(x)) < activation_bytes + small_bytes
    assert saved_bytes(lambda: conv(inplace(x))) < activation_bytes + conv.weight.numel() * 4 + small_bytes
    assert saved_bytes(lambda: conv(F.leaky_relu(norm(x), 0.01, inplace=True))) > 2 * activation_bytes


def test_inverting_between_convolutions_holds_nothing_of_its_own() -> None:
    torch.manual_seed(0)
    chain = ReversibleChain([nn.Conv2d(3, 8, 3), InPlaceABN(8), nn.Conv2d(8, 8, 3), InPlaceABN(8), nn.Conv2d(8, 4, 3)])
    x = torch.randn(2, 3, 12, 12)
    gradients = []
    for mode in (Mode.SAVE, Mode.INVERT):
        chain.set_schedule([mode if mode in modes else Mode.SAVE for modes in chain.options()])
        out = chain(x)
        gradients.append(torch.autograd.grad(out.square().sum(), list(chain.parameters())))
    for saved, inverted in zip(*gradients, strict=True):
        torch.testing.assert_close(inverted, saved, rtol=1e-4, atol=1e-4)


def test_its_backward_stays_finite_and_close_where_gamma_passes_zero() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 4, 6, 6)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        norm = InPlaceABN(4).to(dtype)
        norm.weight.data.copy_(torch.tensor([0.0, 1e-12, -1e-5, 1.0]))
        norm.bias.data.fill_(0.5)
        leaf = x.to(dtype).requires_grad_()
        loss = (norm(leaf) * torch.linspace(-1, 1, x.numel()).view_as(x)).sum()
        gradients.append([g.double() for g in torch.autograd.grad(loss, [leaf, *norm.parameters()])])
    for single, double in zip(*gradients, strict=True):
        assert float((single - double).norm() / double.norm()) < 1e-3


def test_two_forwards_before_two_backwards_use_their_own_statistics() -> None:
    torch.manual_seed(0)
    chain = ReversibleChain([nn.Conv2d(2, 4, 3), InPlaceABN(4), nn.Conv2d(4, 2, 3)])
    chain.set_schedule([Mode.SAVE, Mode.INVERT, Mode.SAVE])
    batches = [torch.randn(4, 2, 8, 8), 3 + 2 * torch.randn(4, 2, 8, 8)]
    apart = [torch.autograd.grad(chain(x).square().sum(), list(chain.parameters())) for x in batches]
    losses = [chain(x).square().sum() for x in batches]
    together = [torch.autograd.grad(loss, list(chain.parameters())) for loss in losses]
    for first, second in zip(apart, together, strict=True):
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

"""Every model contains one chain, and trains with plain autograd's gradients whatever the schedule."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Tensor, nn

from revdist.errors import UsageError
from revdist.models.glow import generative_loss, glow
from revdist.models.irevnet import irevnet
from revdist.models.ode_classifier import ode_classifier
from revdist.models.reformer import reformer
from revdist.models.resnext_inplace_abn import resnext50_inplace_abn, resnext101_inplace_abn, resnext_inplace_abn
from revdist.models.revvit import revvit, revvit_small
from revdist.planning.costs import Mode
from revdist.reversible import apply, find_chain
from revdist.reversible.replay import inside_operator

torch.set_num_threads(1)

MODELS = {
    "irevnet": lambda: irevnet(5, couplings=(1, 1, 1), width=4, in_channels=1),
    "revvit": lambda: revvit(5, width=16, depth=2, num_heads=2),
    "resnext_inplace_abn": lambda: resnext_inplace_abn(5, units=(1, 2), width=16),
    "ode_classifier": lambda: ode_classifier(5, channels=8, num_steps=3),
    "ode_classifier_mccallum_foster": lambda: ode_classifier(5, channels=8, num_steps=2, method="mccallum_foster"),
    "glow": lambda: glow(5, steps=2, hidden=8),
    "reformer": lambda: reformer(11, length=32, width=16, depth=2, num_heads=2, chunk_length=8, num_chunks=2),
}
names = pytest.mark.parametrize("name", MODELS)


def built(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype)
    for parameter in model.parameters():  # nothing may be zero, as Glow's last convolutions are at first
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    if name == "reformer":
        return model, torch.randint(11, (2, 32))
    return model, torch.randn(3, 1, 8, 8, dtype=dtype)


def gradients(model: nn.Module, x: Tensor, schedule: list[Mode] | None) -> dict[str, Tensor]:
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(1)
    if schedule is None:
        with inside_operator():
            out = model(x)
    else:
        apply(model, schedule)
        out = model(x)
    target = torch.arange(out[:, 0].numel()).view_as(out[:, 0]) % out.shape[1]
    nn.functional.cross_entropy(out, target).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.load_state_dict(before)
    return found


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    difference = sum(float((found[k] - expected[k]).double().square().sum()) for k in expected)
    return (difference / sum(float(value.double().square().sum()) for value in expected.values())) ** 0.5


@names
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=str)
def test_gradients_do_not_depend_on_the_schedule(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model, x = built(name, dtype)
    expected = gradients(model, x, None)
    options = find_chain(model).options()
    generator = random.Random(0)
    all_invert = [Mode.INVERT if Mode.INVERT in modes else Mode.RECOMPUTE for modes in options]
    for schedule in (all_invert, *([generator.choice(modes) for modes in options] for _ in range(2))):
        assert error(gradients(model, x, schedule), expected) < tolerance


@names
def test_a_model_computes_the_same_without_gradients_and_after_a_round_trip(name: str) -> None:
    model, x = built(name)
    model.eval()
    expected = model(x).detach()
    twin = MODELS[name]().double().eval()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(twin(x), expected)
        torch.testing.assert_close(copy.deepcopy(model)(x), expected)


@names
def test_no_parameter_is_counted_twice_in_the_state(name: str) -> None:
    model, _ = built(name)
    total = sum(value.numel() for key, value in model.state_dict().items() if key in dict(model.named_parameters()))
    assert total == sum(p.numel() for p in model.parameters())
    assert len(dict(model.named_parameters(remove_duplicate=False))) == len(dict(model.named_parameters()))


@pytest.mark.parametrize("name", ["irevnet", "glow", "revvit"])
def test_reversible_families_invert_everywhere(name: str) -> None:
    model, _ = built(name)
    assert all(Mode.INVERT in modes for modes in find_chain(model).options())


def test_irevnet_gives_the_image_back_from_its_features() -> None:
    model, x_BCHW = built("irevnet")
    model.eval()
    with torch.no_grad():
        streams = tuple(model.features(x_BCHW).chunk(2, dim=1))
        for operator in reversed(model.chain.operators):
            streams = operator.inverse(streams)
    torch.testing.assert_close(torch.cat(streams, dim=1), x_BCHW.repeat(1, 8, 1, 1))


def test_glow_decodes_what_it_encodes_and_counts_its_log_determinant() -> None:
    model, _ = built("glow")
    x_BCHW = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    latent_BD, log_determinant_B = model.encode(x_BCHW)
    torch.testing.assert_close(model.decode(latent_BD), x_BCHW)
    jacobian = torch.autograd.functional.jacobian(lambda x: model.encode(x)[0], x_BCHW).reshape(64, 64)
    torch.testing.assert_close(log_determinant_B[0], torch.linalg.slogdet(jacobian).logabsdet)
    assert model.sample(torch.tensor([0, 3])).shape == (2, 1, 8, 8)


def test_glow_is_a_density() -> None:
    model = glow(2, image_size=2, steps=1, levels=1, hidden=4, bin_width=0.0).double().eval()
    x_BCHW = torch.randn(5, 1, 2, 2, dtype=torch.float64)
    latent_BD, log_determinant_B = model.encode(x_BCHW)
    normal = torch.distributions.Normal(model.mean_ND[1], 1.0)
    torch.testing.assert_close(model(x_BCHW)[:, 1], normal.log_prob(latent_BD).sum(1) + log_determinant_B)


def test_generative_loss_reduces_as_torch_losses_do() -> None:
    output_BN, target_B = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    each = generative_loss(output_BN, target_B, "none")
    torch.testing.assert_close(generative_loss(output_BN, target_B), each.sum())
    torch.testing.assert_close(generative_loss(output_BN, target_B, "mean"), each.mean())


@pytest.mark.parametrize(
    ("make", "millions"),
    [(resnext50_inplace_abn, 25.03), (resnext101_inplace_abn, 44.18), (revvit_small, 22.4)],
)
def test_published_sizes(make: object, millions: float) -> None:
    with torch.device("meta"):
        model = make()  # type: ignore[operator]
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda: irevnet(width=1), "raise width to 2"),
        (lambda: revvit(image_size=9), "do not tile"),
        (lambda: revvit(width=10), "not a multiple of num_heads"),
        (lambda: glow(levels=4), "lower levels"),
        (lambda: resnext_inplace_abn(units=()), "at least one block"),
        (lambda: reformer(length=8)(torch.zeros(1, 16, dtype=torch.long)), "raise length"),
    ],
)
def test_sizes_that_cannot_be_say_what_to_change(make: object, remedy: str) -> None:
    with pytest.raises(UsageError, match=remedy):
        make()  # type: ignore[operator]

"""Measured reconstruction errors, and what a limit to them does to the gradients."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from revdist.planning.accuracy import bounded, largest_error, not_to_be_inverted
from revdist.planning.costs import Mode, Option, Profile
from revdist.reversible import AdditiveCoupling, ReversibleChain
from revdist.reversible.reconstruction import reconstructions

torch.set_num_threads(1)

WIDTH = 16


def deep_chain(dtype: torch.dtype, depth: int = 50) -> ReversibleChain:
    torch.manual_seed(0)
    return ReversibleChain(AdditiveCoupling(branch(), branch()) for _ in range(depth)).to(dtype)


def branch() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))


def profile_of(chain: ReversibleChain, x: Tensor) -> Profile:
    """With the accuracy measured and the costs made up."""
    found = reconstructions(chain, (x,))
    return Profile.from_options(
        [[Option(mode, 0, 0, 0.0) for mode in modes if mode is not Mode.OFFLOAD] for modes in chain.options()],
        reconstruction_error=tuple(one.error for one in found),
        error_growth=tuple(one.growth for one in found),
    )


def thriftiest(profile: Profile) -> tuple[Mode, ...]:
    """INVERT wherever it is offered."""
    held = not_to_be_inverted(profile)
    return tuple(Mode.SAVE if index in held else Mode.INVERT for index in range(profile.num_operators))


def gradient(chain: ReversibleChain, x: Tensor, modes: tuple[Mode, ...]) -> Tensor:
    chain.set_schedule(modes)
    chain.zero_grad()
    chain(x).square().mean().backward()
    return torch.cat([p.grad.double().flatten() for p in chain.parameters()])


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_a_limit_shortens_the_runs_of_a_deep_bf16_chain_and_its_gradients_are_nearer():
    chain = deep_chain(torch.bfloat16)
    x = torch.randn(32, 2 * WIDTH).bfloat16()
    measured = profile_of(chain, x)
    everything = thriftiest(measured)
    limit = largest_error(measured, everything) / 20
    accurate = thriftiest(bounded([measured], limit)[0])
    saved = gradient(chain, x, (Mode.SAVE,) * chain.num_operators)
    far = distance(gradient(chain, x, everything), saved)
    near = distance(gradient(chain, x, accurate), saved)
    assert everything == (Mode.INVERT,) * chain.num_operators
    assert 0 < accurate.count(Mode.SAVE) < chain.num_operators / 2
    assert largest_error(measured, accurate) <= limit
    assert 0 < near < far / 2


def test_the_bound_holds_for_the_error_that_occurs():
    for dtype in (torch.float32, torch.bfloat16):
        chain = deep_chain(dtype)
        x = torch.randn(32, 2 * WIDTH).to(dtype)
        with torch.no_grad():
            streams = x.chunk(2, dim=1)
            for module in chain.children():
                streams = module(*streams)
            for module in reversed(list(chain.children())):
                streams = module.inverse(*streams)
        occurred = distance(torch.cat(streams, dim=1).double(), x.double())
        measured = profile_of(chain, x)
        bound = largest_error(measured, thriftiest(measured))
        assert occurred <= bound <= 20 * occurred


def test_what_cannot_be_inverted_has_no_error_and_starts_afresh():
    torch.manual_seed(0)
    coupling = AdditiveCoupling(branch(), branch())
    chain = ReversibleChain([coupling, nn.Linear(2 * WIDTH, 2 * WIDTH), copy.deepcopy(coupling)])
    found = reconstructions(chain, (torch.randn(8, 2 * WIDTH),))
    assert (found[2].error, found[2].growth) == (0, 1)
    assert found[1].growth == 1  # its output is what the linear layer holds
    assert all(one.error < 1e-6 and 1 <= one.growth < math.inf for one in found)


def test_an_operator_that_is_never_to_be_inverted_is_run_again_when_memory_is_short():
    chain = deep_chain(torch.float32, depth=3)
    held = frozenset({1, 4})
    chain.never_inverted = held
    x = torch.randn(8, 2 * WIDTH)
    expected = gradient(chain, x, (Mode.SAVE,) * 6)
    chain.zero_grad()
    loss = chain(x).square().mean()
    assert chain.demote(10**9) > 0
    modes = [record.mode for record in chain.live_records()]
    assert {index for index, mode in enumerate(modes) if mode is not Mode.INVERT} == held
    loss.backward()
    found = torch.cat([p.grad.double().flatten() for p in chain.parameters()])
    torch.testing.assert_close(found, expected)

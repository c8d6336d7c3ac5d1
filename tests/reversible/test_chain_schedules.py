"""Schedules are data."""

from __future__ import annotations

import pytest
from reversible_models import (
    INVERT,
    conv_chain,
    linear_chain,
    uniform,
)
from torch import nn

from revdist.errors import UsageError
from revdist.planning.costs import Mode, Schedule
from revdist.reversible import AdditiveCoupling, ReversibleChain, apply, find_chain


def test_schedules_that_do_not_fit_are_refused():
    chain = conv_chain(1)
    with pytest.raises(UsageError, match="a schedule of 1 modes does not fit a chain of 9 operators"):
        chain.set_schedule([Mode.SAVE])
    with pytest.raises(UsageError, match="operator stem cannot take mode INVERT"):
        chain.set_schedule([Mode.INVERT] * chain.num_operators)
    with pytest.raises(UsageError, match="operator stem cannot take mode FASTER"):
        chain.set_schedule(["FASTER"] * chain.num_operators)
    with pytest.raises(UsageError, match="no ReversibleChain"):
        apply(nn.Linear(2, 2), [])
    with pytest.raises(UsageError, match="2 chains beside each other"):
        find_chain(nn.Sequential(linear_chain(), linear_chain()))
    with pytest.raises(UsageError, match="at least one operator"):
        ReversibleChain([])


def test_a_chain_with_two_names_is_one():
    chain = linear_chain()
    assert find_chain(nn.Sequential(nn.Sequential(chain), nn.Sequential(chain))) is chain


def test_apply_takes_schedules_from_the_planner_and_through_wrappers():
    chain = conv_chain(1)
    modes = uniform(chain, *INVERT)
    apply(nn.Sequential(chain), Schedule(modes=modes))
    assert chain.schedule == modes
    assert chain.operator_names[:4] == ("stem", "narrow0.f", "narrow0.g", "down")


def test_replaced_modules_keep_the_modes_that_they_offer():
    chain = ReversibleChain([AdditiveCoupling(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(4, 4)])
    chain.set_schedule([Mode.INVERT, Mode.INVERT, Mode.RECOMPUTE])
    setattr(chain, "1", nn.Tanh())
    assert chain.schedule == (Mode.INVERT, Mode.INVERT, Mode.RECOMPUTE)
    chain.add_module("2", nn.Linear(4, 4))
    assert chain.num_operators == 4
    assert chain.schedule == (Mode.SAVE,) * 4

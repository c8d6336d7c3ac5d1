"""Runs of INVERT that stay accurate, against every schedule tried."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from revdist.errors import AccuracyUnreachable
from revdist.planning.accuracy import bounded, largest_error, not_to_be_inverted
from revdist.planning.costs import Mode, Option, Profile
from revdist.planning.frontier import solve

SAVE = Option(Mode.SAVE, 100, 10, 0.0)
INVERT = Option(Mode.INVERT, 0, 20, 1.0)

OPTIONS = st.sampled_from([(SAVE,), (SAVE, INVERT), (INVERT,)])
ERRORS = st.floats(0, 1)
GROWTHS = st.floats(1, 4)
CHAINS = st.lists(st.tuples(OPTIONS, ERRORS, GROWTHS), min_size=1, max_size=8)


def profile_of(chain: list[tuple[tuple[Option, ...], float, float]], **fields: int) -> Profile:
    options, errors, growths = zip(*chain, strict=True)
    return Profile.from_options(options, reconstruction_error=errors, error_growth=growths, **fields)


def uniform_chain(length: int, error: float = 1.0, growth: float = 1.0, **fields: int) -> Profile:
    return profile_of([((SAVE, INVERT), error, growth)] * length, **fields)


def schedules(profile: Profile) -> list[tuple[Mode, ...]]:
    return list(itertools.product(*([option.mode for option in options] for options in profile.options)))


def strip(profile: Profile) -> str:
    """I where INVERT is offered."""
    return "".join("S" if index in not_to_be_inverted(profile) else "I" for index in range(profile.num_operators))


def error_of(profile: Profile, modes: tuple[Mode, ...]) -> float:
    """Straight from the definition: each operator's rounding, grown by all that is inverted after it."""
    worst = 0.0
    for first in range(len(modes)):
        total, grown = 0.0, 1.0
        for index in itertools.takewhile(lambda i: modes[i] is Mode.INVERT, range(first, len(modes))):
            total += grown * profile.reconstruction_error[index]
            grown *= profile.error_growth[index]
        worst = max(worst, total)
    return worst


@given(CHAINS, st.floats(0.01, 8))
def test_no_schedule_that_is_left_exceeds_the_limit(chain, limit):
    profile = profile_of(chain)
    try:
        (found,) = bounded([profile], limit)
    except AccuracyUnreachable:
        assert all(error_of(profile, modes) > limit for modes in schedules(profile))
        return
    for modes in schedules(found):
        assert error_of(found, modes) <= limit * (1 + 1e-9)
        assert largest_error(found, modes) == pytest.approx(error_of(found, modes))


@given(st.lists(st.tuples(ERRORS, GROWTHS), min_size=1, max_size=8), st.floats(0.01, 8))
def test_no_fewer_operators_can_be_given_up(chain, limit):
    profile = profile_of([((SAVE, INVERT), error, growth) for error, growth in chain])
    (found,) = bounded([profile], limit)
    given_up = len(not_to_be_inverted(found))
    for fewer in itertools.combinations(range(len(chain)), max(0, given_up - 1)):
        modes = tuple(Mode.SAVE if index in fewer else Mode.INVERT for index in range(len(chain)))
        assert given_up == 0 or error_of(profile, modes) > limit * (1 - 1e-9)


@given(CHAINS, st.floats(0.01, 8), st.floats(0.01, 8))
def test_bounding_twice_is_bounding_by_the_tighter(chain, one, other):
    profile = profile_of([((SAVE, INVERT) if INVERT in options else options, e, g) for options, e, g in chain])
    (found,) = bounded([profile], min(one, other))
    assert bounded([found], max(one, other)) == (found,)


def test_runs_are_ended_where_they_would_become_too_long_counted_from_their_end():
    assert strip(bounded([uniform_chain(8)], 3)[0]) == "SIIISIII"
    assert strip(bounded([uniform_chain(8)], 8)[0]) == "IIIIIIII"
    assert strip(bounded([uniform_chain(8)], 0.5)[0]) == "SSSSSSSS"


def test_an_error_that_grows_ends_runs_earlier():
    assert strip(bounded([uniform_chain(8, growth=2)], 3)[0]) == "IISIISII"


def test_what_holds_its_input_starts_afresh():
    chain = [((SAVE, INVERT), 1.0, 1.0)] * 3 + [((SAVE,), 0.0, 1.0)] + [((SAVE, INVERT), 1.0, 1.0)] * 3
    assert strip(bounded([profile_of(chain)], 3)[0]) == "IIISIII"


def test_where_an_operator_can_only_be_inverted_the_one_behind_it_gives_way():
    chain = [((INVERT,), 1.0, 1.0), ((INVERT,), 1.0, 1.0), *[((SAVE, INVERT), 1.0, 1.0)] * 3]
    (found,) = bounded([profile_of(chain)], 3)
    assert strip(found) == "IISII"


def test_no_way_out_names_the_operator_the_error_and_the_limit():
    profile = profile_of([((INVERT,), 0.25, 1.0)] * 3)
    with pytest.raises(AccuracyUnreachable, match=r"operator 0 .* 7.5e-01, over .* 5.0e-01.*planning.modes") as caught:
        bounded([profile], 0.5)
    assert (caught.value.operator, caught.value.error, caught.value.limit) == ("0", 0.75, 0.5)


def test_the_worst_of_all_micro_batches_counts_for_each():
    found = bounded([uniform_chain(4, error=1, micro_batch=1), uniform_chain(4, error=2, micro_batch=8)], 4)
    assert [strip(profile) for profile in found] == ["ISII"] * 2


@pytest.mark.parametrize("error", [math.nan, math.inf])
def test_an_error_that_is_not_a_number_is_too_large(error):
    assert strip(bounded([uniform_chain(3, error=error)], 1e6)[0]) == "SSS"


def test_what_was_not_measured_is_not_inverted():
    profile = Profile.from_options([(SAVE, INVERT)] * 3)
    assert strip(bounded([profile], 1.0)[0]) == "SSS"
    assert largest_error(profile, (Mode.SAVE,) * 3) == 0
    assert largest_error(profile, (Mode.INVERT,) * 3) == math.inf


def test_the_solver_plans_within_the_limit():
    profile = uniform_chain(8)
    frontier = solve(bounded([profile], 3)[0])
    smallest = frontier.best(frontier.minimum_bytes)
    assert Mode.INVERT in smallest.modes
    assert largest_error(profile, smallest.modes) <= 3

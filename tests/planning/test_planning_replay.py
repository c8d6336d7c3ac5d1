"""The simulator, on examples worked out by hand."""

from __future__ import annotations

import pytest

from revdist.errors import InvalidCosts
from revdist.planning.costs import Mode, Option, Profile
from revdist.planning.replay import replay, schedule_of, uniform

S, I, R = Mode.SAVE, Mode.INVERT, Mode.RECOMPUTE  # noqa: E741

THREE = Profile.from_options(
    [
        [Option(S, 100, 10, 0.0), Option(I, 0, 150, 1.0)],
        [Option(S, 50, 10, 0.0), Option(I, 0, 80, 0.5)],
        [Option(S, 20, 5, 0.0), Option(R, 8, 30, 0.25)],
    ],
    outside_bytes=7,
)


def test_everything_saved_peaks_at_the_last_operator() -> None:
    assert replay(THREE, [S, S, S]).need_bytes == 7 + 100 + 50 + 20 + 5
    assert replay(THREE, [S, S, S]).extra_s == 0.0


def test_a_large_inverse_early_does_not_meet_what_later_operators_held() -> None:
    judged = replay(THREE, [I, S, S])
    assert judged.need_bytes == 7 + 150  # one sum with the largest transient would say 7 + 70 + 150
    assert judged.extra_s == 1.0


def test_the_timeline_goes_forward_then_back_and_gives_everything_back() -> None:
    timeline = replay(THREE, [S, I, R]).timeline
    assert [(moment.phase, moment.operator) for moment in timeline] == [
        ("forward", 0),
        ("forward", 1),
        ("forward", 2),
        ("backward", 2),
        ("backward", 1),
        ("backward", 0),
    ]
    assert [moment.held_bytes for moment in timeline] == [107, 107, 115, 115, 107, 107]
    assert [moment.peak_bytes for moment in timeline] == [117, 187, 145, 145, 187, 117]


def test_an_input_that_the_operator_before_holds_is_not_held_twice() -> None:
    chain = Profile.from_options(
        [
            [Option(S, 40, 0, 0.0, holds_output=True), Option(I, 0, 0, 1.0)],
            [Option(S, 30, 0, 0.0, shared_bytes=10)],
        ]
    )
    assert replay(chain, [S, S]).need_bytes == 40 + 30 - 10
    assert replay(chain, [I, S]).need_bytes == 30


def test_what_is_needed_on_top_depends_on_what_the_operator_before_does_with_its_output() -> None:
    second = [Option(I, 0, 90, 0.0, handed_bytes=10, spared_bytes=25)]
    chain = Profile.from_options(
        [[Option(S, 40, 0, 0.0, holds_output=True), Option(I, 0, 0, 1.0), Option(R, 0, 0, 1.0)], second]
    )
    assert replay(chain, [I, I]).need_bytes == 90
    assert replay(chain, [R, I]).need_bytes == 90 - 10
    assert replay(chain, [S, I]).need_bytes == 40 + 90 - 10 - 25
    assert replay(Profile.from_options([second]), [I]).need_bytes == 90 - 10


def test_uniform_takes_the_fastest_option_where_the_mode_is_not_offered() -> None:
    assert uniform(THREE, I).modes == (I, I, S)
    assert uniform(THREE, R).modes == (S, S, R)
    assert uniform(THREE, S) == schedule_of(THREE, (S, S, S))


def test_wrong_modes_are_refused() -> None:
    with pytest.raises(InvalidCosts, match="2 modes for 3 operators"):
        replay(THREE, [S, S])
    with pytest.raises(InvalidCosts, match="operator 2 does not offer INVERT: it offers SAVE, RECOMPUTE"):
        replay(THREE, [S, S, I])

"""What a cost is, and what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planning_cases import ANY_SECONDS, profiles

from revdist.errors import InvalidCosts
from revdist.planning.costs import MAX_BYTES, Mode, Option, Plan, Profile, Schedule

SAVE = Option(Mode.SAVE, 10, 5, 0.0, 4, True, 2, 1)
PROFILE = Profile.from_options([[SAVE, Option(Mode.INVERT, 0, 9, 0.5)], [SAVE]], base_s=1.0, outside_bytes=3)
SCHEDULE = Schedule(modes=(Mode.SAVE, Mode.INVERT), extra_s=0.5, need_bytes=20)
PLAN = Plan(
    generation=1,
    rank=0,
    device="cpu-0",
    share=8,
    micro_batch=4,
    accumulation_steps=2,
    schedule=SCHEDULE,
    budget_bytes=30,
    predicted_step_s=1.5,
    predicted_peak_bytes=40,
)


@given(profiles(seconds=ANY_SECONDS, base_s=ANY_SECONDS))
def test_profiles_round_trip_through_json(profile: Profile) -> None:
    assert Profile.from_json(profile.to_json()) == profile


def test_a_profile_from_lists_is_the_one_that_json_gives_back() -> None:
    profile = Profile.from_options([[SAVE]], operator_names=["a"], reconstruction_error=[0.0], error_growth=[1.0])
    read = Profile.from_json(profile.to_json())
    assert read == profile
    assert hash(read) == hash(profile)


@pytest.mark.parametrize("value", [PROFILE, SCHEDULE, PLAN], ids=lambda value: type(value).__name__)
def test_values_round_trip_through_json(value: Any) -> None:
    assert type(value).from_json(value.to_json()) == value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "the chain is empty"),
        ([[SAVE], []], "operator 1 has no options"),
        ([[SAVE, SAVE]], "operator 0 lists a mode twice: SAVE, SAVE"),
        ([[Option(Mode.INVERT, 0, 0, 0.0), SAVE]], "operator 0 lists its modes as INVERT, SAVE: sort them as SAVE"),
        ([[Option(Mode.SAVE, MAX_BYTES, MAX_BYTES, 0.0)]], "over the limit of"),
        ([[Option(Mode.SAVE, 1, 0, 1e308)], [Option(Mode.SAVE, 1, 0, 1e308)]], "the sum of base_s and every extra_s"),
    ],
)
def test_profiles_that_cannot_be_are_refused(options: list[list[Option]], message: str) -> None:
    with pytest.raises(InvalidCosts, match=message):
        Profile.from_options(options)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("SAVED", 0, 0, 0.0), "mode 'SAVED' is not one of SAVE, INVERT, RECOMPUTE, OFFLOAD"),
        (("SAVE", -1, 0, 0.0), "held_bytes is -1"),
        (("SAVE", 0, 2**63, 0.0), "working_bytes is 9223372036854775808"),
        (("SAVE", 1.5, 0, 0.0), "held_bytes must be an integer, not 1.5"),
        (("SAVE", True, 0, 0.0), "held_bytes must be an integer, not True"),
        (("SAVE", 0, 0, -1.0), "extra_s is -1.0"),
        (("SAVE", 0, 0, float("nan")), "extra_s is nan: it must be finite"),
        (("SAVE", 0, 0, float("inf")), "extra_s is inf: it must be finite"),
        (("SAVE", 0, 0, 10**400), "it must be finite"),
        (("SAVE", 0, 0, "1"), "extra_s must be a number of seconds"),
        (("SAVE", 3, 0, 0.0, 4), "shared_bytes 4 exceeds held_bytes 3"),
        (("SAVE", 3, 0, 0.0, 0, "yes"), "holds_output must be true or false"),
        (("SAVE", 9, 3, 0.0, 0, True, 2, 2), "handed_bytes 2 and spared_bytes 2 exceed working_bytes 3"),
    ],
)
def test_options_that_are_not_costs_are_refused(fields: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InvalidCosts, match=message):
        Option(*fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"micro_batch": True}, "micro_batch must be a positive integer, not True"),
        ({"micro_batch": 0}, "micro_batch must be a positive integer, not 0"),
        ({"operator_names": ("first", 2)}, "must be text, not 2"),
        ({"device": None}, "must be text, not None"),
        ({"reconstruction_error": (0.0, "small")}, "must be numbers that are not negative, not 'small'"),
        ({"error_growth": (1.0, -1.0)}, "must be numbers that are not negative, not -1.0"),
        ({"error_growth": (1.0,)}, "error_growth has 1 entries for 2 operators"),
    ],
)
def test_facts_about_a_profile_that_are_none_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidCosts, match=message):
        dataclasses.replace(PROFILE, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"micro_batch": 1.5}, "micro_batch must be a positive integer, not 1.5"),
        ({"accumulation_steps": -1}, "accumulation_steps is -1"),
        ({"share": float("nan")}, "share must be an integer, not nan"),
        ({"device": 0}, "device must be text, not 0"),
    ],
)
def test_plans_that_cannot_be_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidCosts, match=message):
        dataclasses.replace(PLAN, **fields)


def _values() -> st.SearchStrategy[Any]:
    scalars = st.none() | st.booleans() | st.integers() | st.integers(2**62, 2**70) | st.floats() | st.text(max_size=3)
    return st.recursive(scalars, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner))


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in [(value, key), *_places(value[key])]]


@pytest.mark.parametrize("value", [PROFILE, SCHEDULE, PLAN], ids=lambda value: type(value).__name__)
@given(data=st.data())
def test_readers_refuse_damage_with_a_clear_error(value: Any, data: st.DataObject) -> None:
    fields = json.loads(value.to_json())
    container, key = data.draw(st.sampled_from(_places(fields)))
    container[key] = data.draw(_values())
    if data.draw(st.booleans()):
        fields[data.draw(st.text(max_size=3))] = 0
    with contextlib.suppress(InvalidCosts):
        type(value).from_json(json.dumps(fields))


@pytest.mark.parametrize("cls", [Profile, Schedule, Plan])
@given(
    text=st.text() | st.sampled_from(["[]", "null", "{}", "[" * 100_000, '{"modes": 3}', '{"options": [3]}', "1e999"])
)
def test_readers_refuse_any_other_text(cls: Any, text: str) -> None:
    with pytest.raises(InvalidCosts):
        cls.from_json(text)

"""Several measurements of one kind of device make one profile."""

from __future__ import annotations

from revdist.planning.batch import step_time_curve
from revdist.planning.costs import Mode, Option, Profile
from revdist.training.pooling import aligned, pooled


def profile(seconds: float, *, held: int = 10, key: str = "cpu", size: int = 1, modes: str = "SI") -> Profile:
    options = {
        "S": Option(Mode.SAVE, held, 2, 0.0, 4, True),
        "I": Option(Mode.INVERT, 0, 3, seconds / 2),
    }
    chosen = [options[letter] for letter in modes]
    return Profile.from_options([chosen, chosen], micro_batch=size, base_s=seconds, key=key)


def test_noise_of_one_rank_is_not_taken_for_a_slower_device() -> None:
    ranks = [[profile(1.0)], [profile(9.0)], [profile(2.0)]]
    everyone = [measured for own in ranks for measured in own]
    results = {pooled(own, everyone) for own in ranks}
    assert len(results) == 1, "every rank has the same"
    ((result,),) = results
    assert result.base_s == 2.0
    assert result.options[0][1].extra_s == 1.0


def test_bytes_are_the_largest_so_that_a_plan_fits_everywhere() -> None:
    (result,) = pooled([profile(1.0, held=10)], [profile(1.0, held=10), profile(1.0, held=14)])
    assert result.options[0][0].held_bytes == 14
    assert result.options[0][0].shared_bytes == 4


def test_other_kinds_of_devices_are_left_alone() -> None:
    own = profile(1.0)
    assert pooled([own], [own, profile(5.0, key="another")]) == (own,)


def test_a_rank_without_room_for_a_mode_keeps_to_its_own_options() -> None:
    (result,) = pooled([profile(1.0, modes="I")], [profile(1.0, modes="I"), profile(3.0)])
    assert [option.mode for option in result.options[0]] == [Mode.INVERT]
    assert result.options[0][0].extra_s == 1.0


def test_sizes_that_lack_a_mode_can_still_be_planned_together() -> None:
    small, large = profile(1.0, size=1), profile(4.0, size=4, modes="I")
    both = aligned([small, large])
    assert [[option.mode for option in p.options[0]] for p in both] == [[Mode.INVERT], [Mode.INVERT]]
    assert step_time_curve(both, 100, max_share=8).choice(8).schedule.strip == "II"

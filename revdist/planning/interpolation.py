"""Profiles at micro-batch sizes that were not measured, by straight lines between those that were.

Activations grow with the micro-batch; parameters' gradients, masks and launch overheads do not, so
cost = constant + slope * micro_batch. Two measured sizes give both numbers. One size gives only a
proportion: then a larger micro-batch is never predicted too low, but a much smaller one can be.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from revdist.errors import InvalidCosts
from revdist.planning.costs import Before, Option, Profile


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """Where micro_batch lies among the sizes of two profiles: low + (high - low) * steps / span."""

    low_size: int
    """Micro-batch of the smaller profile; 0: the empty batch."""
    steps: int
    """From `low_size` to the size wanted."""
    span: int
    """From `low_size` to the size of the larger profile."""

    def count(self, low: int, high: int) -> int:
        """Bytes on the line, rounded up; a falling line (noise) is not followed beyond its ends."""
        if high < low and not 0 <= self.steps <= self.span:
            return max(low, high)
        return max(0, low - (low - high) * self.steps // self.span)

    def seconds(self, low: float, high: float) -> float:
        """Seconds on the line; below the smaller profile no less than in proportion to it, and beyond the larger
        one no less than it takes.

        Times that grow faster than the batch, for noise or for caches, would else make the smallest
        micro-batches cost nothing, and times that fall with it, for noise alone, the largest.
        """
        on_line = max(0.0, low + (high - low) * (self.steps / self.span))
        if self.steps > self.span:
            return max(on_line, high)
        if self.steps >= 0:
            return on_line
        return max(on_line, low * (self.low_size + self.steps) / self.low_size)


def interpolate(profiles: Sequence[Profile], micro_batch: int) -> Profile:
    """The profile at `micro_batch`, from profiles of the same chain at other sizes; bytes round up.

    Between measured sizes it lies on the line through the two around it, beyond them on the line
    through the nearest two. A single profile is scaled in proportion.

    Raises InvalidCosts where the profiles are not of one chain or a size occurs twice.
    """
    ordered = ordered_profiles(profiles)
    if micro_batch < 1:
        raise InvalidCosts(f"micro_batch must be a positive integer, not {micro_batch}")
    for profile in ordered:
        if profile.micro_batch == micro_batch:
            return profile
    if len(ordered) == 1:
        only = ordered[0]
        return _on_line(_empty_batch(only), only, Line(0, micro_batch, only.micro_batch), micro_batch)
    low, high = neighbours(ordered, micro_batch)
    size = low.micro_batch
    return _on_line(low, high, Line(size, micro_batch - size, high.micro_batch - size), micro_batch)


def ordered_profiles(profiles: Sequence[Profile]) -> list[Profile]:
    """Profiles by micro-batch size; raises InvalidCosts where they are not of one chain."""
    if not profiles:
        raise InvalidCosts("no profile: measure at least one micro-batch size")
    ordered = sorted(profiles, key=lambda profile: profile.micro_batch)
    sizes = [profile.micro_batch for profile in ordered]
    if len(set(sizes)) != len(sizes):
        raise InvalidCosts(f"two profiles have the same micro_batch: {sizes}")
    for profile in ordered[1:]:
        if _shape(profile) != _shape(ordered[0]):
            raise InvalidCosts(
                f"profiles at micro-batches {sizes[0]} and {profile.micro_batch} differ in operators or modes: "
                "profile one model"
            )
    return ordered


def neighbours(ordered: Sequence[Profile], micro_batch: int) -> tuple[Profile, Profile]:
    """The two profiles whose line passes `micro_batch`; two at least are needed."""
    upper = 1
    while upper < len(ordered) - 1 and ordered[upper].micro_batch < micro_batch:
        upper += 1
    return ordered[upper - 1], ordered[upper]


def _shape(profile: Profile) -> list[list[tuple[str, bool]]]:
    return [[(option.mode, option.holds_output) for option in options] for options in profile.options]


def _empty_batch(profile: Profile) -> Profile:
    """What proportion assumes of a micro-batch of no samples: it costs nothing."""
    return dataclasses.replace(
        profile,
        options=tuple(
            tuple(Option(o.mode, 0, 0, 0.0, 0, o.holds_output) for o in options) for options in profile.options
        ),
        base_s=0.0,
        outside_bytes=0,
    )


def _on_line(low: Profile, high: Profile, line: Line, micro_batch: int) -> Profile:
    return dataclasses.replace(
        high,
        options=tuple(
            tuple(_option(a, b, line) for a, b in zip(lows, highs, strict=True))
            for lows, highs in zip(low.options, high.options, strict=True)
        ),
        micro_batch=micro_batch,
        base_s=line.seconds(low.base_s, high.base_s),
        outside_bytes=line.count(low.outside_bytes, high.outside_bytes),
        fixed_bytes=max(low.fixed_bytes, high.fixed_bytes),
        step_peak_bytes=max(low.step_peak_bytes, high.step_peak_bytes),
        key="",
    )


def _option(low: Option, high: Option, line: Line) -> Option:
    held = line.count(low.held_bytes, high.held_bytes)
    own = line.count(low.held_bytes - low.shared_bytes, high.held_bytes - high.shared_bytes)
    working = {b: line.count(low.working_by_before[b], high.working_by_before[b]) for b in Before}
    return Option(
        high.mode,
        held,
        working_bytes=0,
        extra_s=line.seconds(low.extra_s, high.extra_s),
        shared_bytes=max(0, held - own),
        holds_output=high.holds_output,
    ).needing(working)

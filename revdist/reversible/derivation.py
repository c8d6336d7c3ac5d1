"""From what was observed to the planner's options: held, working and extra, for every mode of every operator."""

from __future__ import annotations

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

from revdist.planning.costs import Before, Mode, Option
from revdist.reversible.held import Held, Occupied
from revdist.reversible.observation import Observation

Offered = Sequence[tuple[Mode, ...]]
"""Per operator, the modes that were measured."""

Seen = dict[Before, dict[Mode | None, int]]
"""Most bytes that one option needed on top, by what the operator before did and the mode of the one behind."""


def derive_options(
    offered: Offered,
    held: Sequence[Held],
    observations: Sequence[Observation],
    occupied: Mapping[tuple[Mode, ...], Occupied],
    seconds: Mapping[tuple[int, Mode], float],
    outside_bytes: int,
) -> tuple[tuple[Option, ...], ...]:
    """The options of each operator.

    An operator's working bytes are what its turns peaked at over `outside_bytes` and what the operators
    up to it hold, the most of all observed schedules. `occupied` has what they hold, by schedule. Its extra
    seconds count from its fastest mode; `seconds` has the time of each operator under each mode.
    """
    storage = [_storage(index, modes, held) for index, modes in enumerate(offered)]
    seen = _seen(storage, observations, occupied, outside_bytes)
    return tuple(
        tuple(
            dataclasses.replace(
                option, extra_s=seconds[index, mode] - min(seconds[index, other] for other in options)
            ).needing(_working(seen[index, mode]))
            for mode, option in options.items()
        )
        for index, options in enumerate(storage)
    )


def _seen(
    storage: Sequence[Mapping[Mode, Option]],
    observations: Sequence[Observation],
    occupied: Mapping[tuple[Mode, ...], Occupied],
    outside_bytes: int,
) -> dict[tuple[int, Mode], Seen]:
    """Peaks count over what was really held: the planner may count storage twice, and then not everywhere alike."""
    seen: dict[tuple[int, Mode], Seen] = defaultdict(lambda: defaultdict(lambda: defaultdict(int)))
    for observation in observations:
        counted = 0
        before = Before.KEEPS
        for index, (mode, behind) in enumerate(zip(observation.modes, (*observation.modes[1:], None), strict=True)):
            option = storage[index][mode]
            counted += option.held_bytes - (option.shared_bytes if before is Before.HOLDS else 0)
            held = occupied[observation.modes]
            most = seen[index, mode][before]
            most[behind] = max(
                most[behind],
                observation.forward_peaks_bytes[index] - outside_bytes - min(counted, held.forward_bytes[index]),
                observation.backward_peaks_bytes[index] - outside_bytes - min(counted, held.backward_bytes[index]),
            )
            before = option.does
    return seen


def _working(seen: Seen) -> dict[Before, int]:
    """Most bytes needed on top, by what the operator before does.

    Not every run of modes behind the operator was seen with every one before it. What one before it changes is
    the same whatever comes behind: where more is known with another, that counts, changed by as much.
    """
    working = {before: max(most.values()) for before, most in seen.items()}
    if Before.KEEPS in working:
        for before in working.keys() - {Before.KEEPS}:
            common = seen[before].keys() & seen[Before.KEEPS].keys()
            changes = [seen[before][behind] - seen[Before.KEEPS][behind] for behind in common]
            if changes:
                working[before] = max(working[before], working[Before.KEEPS] + max(changes))
    return working


def median_seconds(observations: Sequence[Observation]) -> dict[tuple[int, Mode], float]:
    """Per operator and mode, the median time of its forward and backward."""
    times: dict[tuple[int, Mode], list[float]] = defaultdict(list)
    for observation in observations:
        for index, (mode, time_s) in enumerate(zip(observation.modes, observation.seconds, strict=True)):
            times[index, mode].append(time_s)
    return {key: statistics.median(values) for key, values in times.items()}


def _storage(index: int, modes: tuple[Mode, ...], held: Sequence[Held]) -> dict[Mode, Option]:
    """The options of one operator, with what they hold and nothing else yet.

    Those count as holding the output that share with the next operator all that SAVE does. Where a mode shares
    less, or operators further away do, the planner counts it twice, which is never low.
    """
    here = held[index]
    next_shared = held[index + 1].shared_bytes if index + 1 < len(held) else 0
    options = {
        Mode.SAVE: Option(
            Mode.SAVE,
            here.notes_bytes + here.input_bytes + here.internals_bytes,
            0,
            0.0,
            shared_bytes=here.shared_bytes,
            holds_output=next_shared > 0,
        ),
        Mode.INVERT: Option(Mode.INVERT, here.notes_bytes, 0, 0.0),
        Mode.RECOMPUTE: Option(
            Mode.RECOMPUTE,
            here.notes_bytes + here.input_bytes,
            0,
            0.0,
            shared_bytes=here.shared_bytes,
            holds_output=0 < next_shared <= here.passed_bytes,
        ),
        Mode.OFFLOAD: Option(Mode.OFFLOAD, 0, 0, 0.0),
    }
    return {mode: options[mode] for mode in modes}

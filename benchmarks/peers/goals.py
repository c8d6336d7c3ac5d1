"""What revdist sets out to reach, beside what was measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

from benchmarks.peers.cost import Cost
from benchmarks.peers.extras import Buckets, Demotion

DEPTH_OF_GOALS = 12
"""The depth at which a goal holds that names none."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """One goal: met where `measured` is on the right side of `limit`."""

    name: str
    limit: float
    measured: float
    at_least: bool = False
    """Whether more is better."""

    @property
    def met(self) -> bool:
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit


def cost_goals(costs: Sequence[Cost]) -> Iterator[Goal]:
    """Goals of time and memory, for every depth that was measured."""
    by_depth: dict[int, dict[str, Cost]] = {}
    for cost in costs:
        by_depth.setdefault(cost.depth, {})[cost.key] = cost
    for depth, rows in by_depth.items():
        yield from _goals_of_one_depth(depth, rows)
    invert = [rows["revdist-invert"] for _, rows in sorted(by_depth.items())]
    if len(invert) > 1:
        yield Goal(
            name=f"all-INVERT, activations at depth {invert[-1].depth} over those at depth {invert[0].depth}",
            limit=1.05,
            measured=invert[-1].activation_bytes / invert[0].activation_bytes,
        )


def _goals_of_one_depth(depth: int, rows: Mapping[str, Cost]) -> Iterator[Goal]:
    invert = rows["revdist-invert"]

    def goal(name: str, key: str, of: Callable[[Cost], float], *, over: str, limit: float) -> Iterator[Goal]:
        if over in rows:
            measured = of(rows[key]) / of(rows[over])
            yield Goal(name=f"{name} over {rows[over].label}, depth {depth}", limit=limit, measured=measured)

    def time(cost: Cost) -> float:
        return cost.step_s

    def peak(cost: Cost) -> float:
        return cost.peak_bytes

    yield from goal("all-INVERT, time", invert.key, time, over="plain", limit=1.38)
    yield from goal("all-INVERT, time", invert.key, time, over="memcnn", limit=0.80)
    ours = [key for key in rows if key.startswith("revdist")]
    slowest = max((rows[key] for key in ours), key=time)
    yield from goal("slowest schedule, time", slowest.key, time, over="checkpoint", limit=1.0)
    if "checkpoint" in rows:
        equal = min((rows[key] for key in ours if peak(rows[key]) <= peak(rows["checkpoint"])), key=time)
        yield from goal("fastest schedule in no more memory, time", equal.key, time, over="checkpoint", limit=1.0)
    yield from goal("all-SAVE, time", "revdist-save", time, over="plain", limit=1.03)
    if depth == DEPTH_OF_GOALS:
        yield from goal("all-INVERT, peak", invert.key, peak, over="plain", limit=0.16)
        yield from goal("all-INVERT, peak", invert.key, peak, over="revlib", limit=0.80)


def demotion_goal(demotions: Sequence[Demotion]) -> Goal:
    """The worst of several demotions."""
    worst = min(demotion.freed_bytes / demotion.said_bytes for demotion in demotions)
    return Goal(name="demotion, bytes freed over bytes it says", limit=0.95, measured=worst, at_least=True)


def bucket_goal(buckets: Mapping[str, Buckets]) -> Goal:
    """Buckets launched early enough under all-INVERT, over those of plain autograd."""
    early = buckets["revdist-invert"].num_early / buckets["plain"].num_early
    return Goal(
        name="DDP buckets launched before 80% of the backward, over plain", limit=0.90, measured=early, at_least=True
    )

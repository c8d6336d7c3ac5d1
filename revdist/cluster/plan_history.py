"""Which plans the members of a run adopted, as far as that can still be asked for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import final

from revdist.planning.costs import Plan
from revdist.training.reports import PlanReport


@final
class PlanHistory:
    """By member: the newest plan, and those before it that a step may still be reported under."""

    def __init__(self) -> None:
        self._reports: dict[int, list[PlanReport]] = defaultdict(list)

    def add(self, member: int, report: PlanReport) -> Plan | None:
        """A member has adopted a plan; returns the one before, None where it is its first."""
        before = self.newest(member)
        self._reports[member].append(report)
        return before

    def newest(self, member: int) -> Plan | None:
        """The plan that a member adopted last."""
        reports = self._reports.get(member)
        return reports[-1].plan if reports else None

    def at(self, step: int, seats: Sequence[int | None]) -> list[Plan | None]:
        """Per seat, the plan under which its member took the step that made it `step` steps; None: not known.

        No earlier step is asked for later: plans that only those were taken under are forgotten.
        """
        return [None if member is None else self._take_up_to(step, member) for member in seats]

    def clear(self) -> None:
        """Forget all members."""
        self._reports.clear()

    def _take_up_to(self, step: int, member: int) -> Plan | None:
        reports = self._reports[member]
        adopted = [number for number, report in enumerate(reports) if report.step < step]
        if not adopted:
            return None
        del reports[: adopted[-1]]
        return reports[0].plan

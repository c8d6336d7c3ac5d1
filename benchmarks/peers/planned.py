"""Schedules that revdist plans for budgets between its smallest plan and keeping everything."""

from __future__ import annotations

import time
from collections.abc import Callable

from benchmarks.peers.cost import Case, batch, loss_of
from benchmarks.peers.networks import Couplings, parameters
from revdist.devices import MemoryMeter
from revdist.planning.costs import Mode
from revdist.planning.frontier import solve
from revdist.reversible import ReversibleChain
from revdist.reversible.profiler import profile_chain

NUM_BUDGETS = 5

MODES = (Mode.SAVE, Mode.INVERT)
"""Not OFFLOAD: on a CPU it only moves bytes to where this benchmark does not count them."""


def planned_cases(
    chain: ReversibleChain, network: Couplings, meter: MemoryMeter, *, progress: Callable[[int, int], None]
) -> list[Case]:
    """Cases for budgets that divide the way from the smallest plan to the fastest one into equal parts."""
    images = batch().requires_grad_()
    profile = profile_chain(
        chain, images, loss_of, meter=meter, modes=MODES, progress=progress, host_clock=time.process_time
    )
    frontier = solve(profile)
    low, high = frontier.minimum_bytes, frontier.maximum_bytes
    # Profiles take gradients to be there already; a step here makes them, at most all of them before its peak.
    gradient_bytes = sum(parameter.numel() * parameter.element_size() for parameter in parameters(network))
    cases = []
    for number in range(1, NUM_BUDGETS + 1):
        budget_bytes = low + (high - low) * number // (NUM_BUDGETS + 1)
        schedule = frontier.best(budget_bytes)
        case = Case(
            key=f"revdist-budget-{number}",
            label=f"revdist, planned for {(budget_bytes + gradient_bytes) / 2**20:.0f} MiB",
            model=chain,
            network=network,
            schedule=schedule.modes,
            budget_bytes=budget_bytes + gradient_bytes,
            predicted_ratio=1.0 + schedule.extra_s / profile.base_s,
            predicted_peak_bytes=schedule.need_bytes + gradient_bytes,
        )
        cases.append(case)
    return cases

"""Predicted and measured side by side: bytes by the ledger, CPU time in rounds, profile and steps in turn.

The profile that plans is measured first. Others run at other times on this machine, so each round measures
a profile anew, for its times alone, and then runs every schedule once: what slows one slows the other.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

from benchmarks.memory.kernel import kernel_peak
from benchmarks.memory.networks import Made, Network
from benchmarks.memory.schedules import trials
from revdist.devices import MemoryMeter
from revdist.planning.costs import Profile
from revdist.planning.replay import replay
from revdist.reversible.chain import find_chain
from revdist.reversible.profiler import profile_chain

FIRST_REPEATS = 5


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One schedule of one network."""

    network: str
    kind: str
    strip: str
    budget_bytes: int | None
    predicted_bytes: int
    """Peak of a step over parameters and gradients."""
    ledger_bytes: int
    kernel_bytes: int | None
    """None: not measured, for the schedule offloads."""
    predicted_s: float
    measured_s: float

    @property
    def error(self) -> float:
        """Of the predicted peak, relative to the measured one."""
        return self.predicted_bytes / self.ledger_bytes - 1

    @property
    def kernel_error(self) -> float | None:
        return None if self.kernel_bytes is None else self.predicted_bytes / self.kernel_bytes - 1

    @property
    def time_error(self) -> float:
        return self.predicted_s / self.measured_s - 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is measured."""

    num_random: int
    num_planned: int
    """Of each kind, with every mode and again without OFFLOAD."""
    rounds: int


def examine(network: Network, meter: MemoryMeter, effort: Effort, say: Callable[[str], None]) -> list[Finding]:
    """Every schedule of a network, predicted and measured."""
    say(f"{network.label}: profile")
    made = network.make()
    made.lay_out_gradients()
    profile = _profile(made, meter, FIRST_REPEATS)
    chosen = trials(network.key, profile, num_random=effort.num_random, num_planned=effort.num_planned)
    predicted_s: list[list[float]] = [[] for _ in chosen]
    measured_s: list[list[float]] = [[] for _ in chosen]
    peaks = [0] * len(chosen)
    for number in range(effort.rounds):
        say(f"{network.label}: round {number + 1} of {effort.rounds}")
        fresh = _profile(made, meter, repeats=1)
        for index, trial in enumerate(chosen):
            predicted_s[index].append(fresh.base_s + replay(fresh, trial.modes).extra_s)
            seconds, peak = measured_step(made, meter, trial.modes)
            measured_s[index].append(seconds)
            peaks[index] = max(peaks[index], peak)
    kernel = []
    for number, trial in enumerate(chosen, start=1):
        say(f"{network.label}: the kernel's peak, {number} of {len(chosen)}")
        kernel.append(kernel_peak(trial) if trial.on_device else None)
    return [
        Finding(
            network=network.label,
            kind=trial.kind,
            strip="".join(mode.letter for mode in trial.modes),
            budget_bytes=trial.budget_bytes,
            predicted_bytes=replay(profile, trial.modes).need_bytes,
            ledger_bytes=peaks[index],
            kernel_bytes=kernel[index],
            predicted_s=statistics.median(predicted_s[index]),
            measured_s=statistics.median(measured_s[index]),
        )
        for index, trial in enumerate(chosen)
    ]


def measured_step(made: Made, meter: MemoryMeter, modes: Sequence[str]) -> tuple[float, int]:
    """CPU seconds of a step, and its peak bytes over what was there before, the batch included."""
    find_chain(made.model).set_schedule(modes)
    before = meter.allocated_bytes() - made.inputs.untyped_storage().nbytes()
    meter.reset_peak()
    started_s = time.process_time()
    made.step()
    return time.process_time() - started_s, meter.peak_bytes() - before


def _profile(made: Made, meter: MemoryMeter, repeats: int) -> Profile:
    return profile_chain(made.model, made.inputs, made.loss, meter=meter, repeats=repeats, host_clock=time.process_time)

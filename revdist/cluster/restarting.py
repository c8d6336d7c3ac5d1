"""Starting a run again where all of its replicas are lost and its supervisor is not: `--resume` without a hand.

Replicas keep the state of training for each other; where none is left, the newest whole checkpoint has it. New
replicas start on whatever devices of the run are free and answer. Hosts that are gone look free to Ray for a
minute, so those that do not answer are left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import final

from ray.exceptions import RayError

from revdist.cluster.crew import Assign, Crew
from revdist.cluster.failures import why
from revdist.cluster.fleet import Fleet
from revdist.cluster.placement import place
from revdist.config import RunConfig
from revdist.errors import NoFreeDevice, Preempted
from revdist.training.checkpoint_files import checkpoints

_PATIENCE_S = 60.0
"""Longest wait for a device on which the run can go on."""
_WHOLE_S = 5.0
"""Wait for all of its devices, before the run goes on with those that there are: Ray needs a moment to free them."""
_ANSWER_S = 30.0
"""Longest wait for the processes on the devices chosen."""
_PAUSE_S = 0.2


@final
class Restarter:
    """Starts the replicas of one run again."""

    def __init__(
        self,
        config: RunConfig,
        *,
        assign: Callable[[bool], Assign],
        checkpoint_folder: str,
        stop_reason: Callable[[], str | None],
    ) -> None:
        """assign: what each replica is to do, given whether it goes on from a checkpoint."""
        self._config = config
        self._assign = assign
        self._checkpoint_folder = checkpoint_folder
        self._stop_reason = stop_reason

    def source(self, origin: int | None) -> str | None:
        """What the run can start again from; None: there is nothing, and it must not.

        origin: the step at which it began; None: it has not. One that went on from a checkpoint does not begin from
        nothing.
        """
        found = checkpoints(self._checkpoint_folder)
        if found:
            return found[-1].name
        return "the beginning, since there is no checkpoint yet" if origin in (None, 0) else None

    def restart(self, fleet: Fleet) -> Crew:
        """End what is left of the fleet and fill it anew.

        Raises NoFreeDevice where too few devices are free, or answer, within a minute, and Preempted where the run
        is told to stop meanwhile.
        """
        fleet.kill()
        began_s = time.monotonic()
        silent: set[str] = set()
        while True:
            waited_s = time.monotonic() - began_s
            try:
                return self._try(fleet, silent, partly=waited_s > _WHOLE_S)
            except NoFreeDevice:
                if waited_s > _PATIENCE_S:
                    raise
            reason = self._stop_reason()
            if reason is not None:
                raise Preempted(
                    f"stopped by {reason} before all replicas had started again: go on with --resume", signal=reason
                )
            time.sleep(_PAUSE_S)

    def _try(self, fleet: Fleet, silent: set[str], *, partly: bool) -> Crew:
        """silent: nodes that did not answer; enlarged by those that do not now."""
        hosts = [host for host in fleet.free_hosts() if host.node_id not in silent]
        chosen = place(self._config, hosts, partly=partly)
        places = {fleet.add(one): one for one in chosen}
        located = fleet.locate_soon({member: one.address for member, one in places.items()}, timeout_s=_ANSWER_S)
        absent = places.keys() - located.keys()
        silent.update(places[member].node_id for member in absent)
        _forget(fleet, absent)
        if len(located) < self._config.workers.min:
            _forget(fleet, located)
            raise NoFreeDevice(f"{len(located)} of {len(places)} devices that look free answered; look at their hosts")
        resume = bool(checkpoints(self._checkpoint_folder))
        try:
            return Crew.at_work(fleet, {member: places[member] for member in located}, located, self._assign(resume))
        except RayError as error:
            _forget(fleet, located)
            raise NoFreeDevice(f"a replica that starts again died: {why(error)}") from error


def _forget(fleet: Fleet, members: Iterable[int]) -> None:
    for member in members:
        fleet.forget(member)

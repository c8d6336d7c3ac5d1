"""Who goes on with a run whose supervisor is lost with its host, or for good: an actor on another host.

A deputy has loaded what a supervisor needs and knows the replicas, so that it goes on as soon as it is sure. It never
does while the lock of the run directory is held: a supervisor that lives, cut off or not, holds it. With the lock free
it is sure after a heartbeat where nothing on the supervisor's host answers. Where the host is there, a watchman may
start the supervisor again, and the deputy waits a little longer for that.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

from revdist.cluster.actor import surround
from revdist.cluster.address import takes_connections
from revdist.cluster.claim import is_orphaned, is_superseded
from revdist.cluster.fleet import Known
from revdist.cluster.local import Addresses, addresses
from revdist.cluster.run_record import RUN_ID
from revdist.config import RunConfig

_TICK_S = 0.05
_PROBE_S = 0.3
"""Longest wait for the supervisor's host to take a connection."""
_COMES_BACK_S = 15.0
"""Time for a watchman to start a supervisor anew that was killed."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """What a supervisor tells its deputy, and tells anew where it changes."""

    known: Mapping[int, Known]
    """The replicas, by member number."""
    address: str
    """Of the supervisor's host."""
    port: int
    """Where Ray listens on that host."""


@final
class Vigil:
    """Waits until the supervisor of a run is lost."""

    def __init__(
        self, run_dir: Path, *, heartbeat_s: float, patience_s: float, comes_back_s: float = _COMES_BACK_S
    ) -> None:
        """heartbeat_s: seconds of silence before which no supervisor is lost. comes_back_s: those before which one
        whose host is there is not. patience_s: those after which nobody waits for it any more.
        """
        self._run_dir = run_dir
        self._heartbeat_s = heartbeat_s
        self._comes_back_s = max(comes_back_s, heartbeat_s)
        self._patience_s = patience_s
        self._heard_s = time.monotonic()
        self.charge: Charge | None = None

    def hear(self, charge: Charge | None = None) -> None:
        """The supervisor is there. charge: what it has to tell, where that has changed."""
        self._heard_s = time.monotonic()
        if charge is not None:
            self.charge = charge

    def wait(self) -> frozenset[int] | None:
        """Returns the members that are lost with the supervisor once it is lost, None where it is time to leave."""
        while self._silent_s <= self._patience_s:
            lost = self._lost()
            if lost is not None and is_orphaned(self._run_dir):
                return lost
            time.sleep(_TICK_S)
        return None

    def _lost(self) -> frozenset[int] | None:
        """Who is lost with a supervisor that has been silent for long enough: all on its host, unless that answers."""
        if self.charge is None or self._silent_s < self._heartbeat_s - _PROBE_S:
            return None
        if takes_connections(self.charge.address, self.charge.port, timeout_s=_PROBE_S):
            return frozenset() if self._silent_s >= self._comes_back_s else None
        on_it = (member for member, one in self.charge.known.items() if one.address == self.charge.address)
        return frozenset(on_it) if self._silent_s >= self._heartbeat_s else None

    @property
    def _silent_s(self) -> float:
        return time.monotonic() - self._heard_s


@final
class Deputy:
    """The Ray actor that stands by for one run."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        log_dir: Path,
        environment: Mapping[str, str],
        paths: Sequence[str],
        patience_s: float,
    ) -> None:
        """environment, paths: as of a replica's actor. patience_s: seconds of silence after which it leaves, as
        replicas do that nobody supervises.
        """
        surround(environment, paths)
        self._config = config
        self._run_dir = run_dir
        self._log_dir = log_dir
        self._vigil = Vigil(run_dir, heartbeat_s=config.faults.heartbeat_s, patience_s=patience_s)
        self._addresses: Addresses | None = None
        self._met: list[Any] = []

    def prepare(self) -> str | None:
        """Load what it takes to supervise; returns this host's name, None where it does not see the run directory."""
        import ray

        if not (self._run_dir / "config.yaml").exists() or is_superseded(self._run_dir, os.environ[RUN_ID]):
            return None
        _load()
        self._vigil.hear()
        if self._addresses is None:  # else another supervisor has come, and found it
            self._addresses = addresses()
            own = ray.get_runtime_context().current_actor
            threading.Thread(target=self._watch, args=(own,), name="revdist-deputy", daemon=True).start()
        return socket.gethostname()

    def hear(self, charge: Charge | None) -> None:
        """As `Vigil.hear`."""
        self._vigil.hear(charge)
        if charge is not None:  # an actor that was called once is found without the Ray head
            self._met = [one.actor.answer.remote() for one in charge.known.values()]

    def lead(self, lost: frozenset[int]) -> None:
        """Supervise the run to its end, and leave. In the main thread, so that signals do what they do to a driver.

        lost: members that are no more.
        """
        from revdist.cluster.takeover import Heritage
        from revdist.cluster.trainer import Trainer

        charge = self._vigil.charge
        assert charge is not None
        assert self._addresses is not None
        trainer = Trainer(self._config, run_dir=self._run_dir, resume=True, log_dir=self._log_dir)
        try:
            trainer.take_over(Heritage(known=charge.known, lost=lost, addresses=self._addresses))
        except BaseException:  # how it ended is in the run directory
            _log.exception("the run that was taken over did not come to its end")
        finally:
            os._exit(0)

    def _watch(self, own: Any) -> None:
        lost = self._vigil.wait()
        if lost is None:
            os._exit(0)
        own.lead.remote(lost)


def _load() -> None:
    """Have in memory what it takes to supervise, compiled code included: later, replicas wait for it."""
    import revdist.cluster.controller
    import revdist.cluster.logs
    import revdist.cluster.metrics
    import revdist.cluster.restarting
    import revdist.cluster.succession
    import revdist.cluster.trainer  # noqa: F401
    from revdist.planning.batch import Cut, StepTimeCurve
    from revdist.planning.costs import Mode, Schedule
    from revdist.planning.split import split

    cut = Cut(micro_batch=1, micro_batch_s=0.0, sample_s=1.0, schedule=Schedule(modes=(Mode.SAVE,)))
    split([StepTimeCurve(max_share=1, cuts=(cut,))], 1)

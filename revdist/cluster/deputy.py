"""Who goes on with a run whose supervisor's host is lost: an actor on another host, which waits for just that.

A deputy has loaded what a supervisor needs and knows the replicas, so that it goes on as soon as it is sure. It is sure
where the supervisor is silent, nothing on its host answers, and the lock of the run directory is free: a supervisor
that lives, cut off or not, holds that lock. One that was merely killed is started again by its watchman.
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
from revdist.cluster.run_record import RUN_ID
from revdist.config import RunConfig

_TICK_S = 0.05
_PROBE_S = 0.3
"""Longest wait for the supervisor's host to take a connection."""

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
    """Waits until the supervisor of a run is lost with its host."""

    def __init__(self, run_dir: Path, *, heartbeat_s: float, patience_s: float) -> None:
        """heartbeat_s: seconds of silence before which no supervisor is lost. patience_s: those after which it does not
        come back, and nobody waits for it any more.
        """
        self._run_dir = run_dir
        self._heartbeat_s = heartbeat_s
        self._patience_s = patience_s
        self._heard_s = time.monotonic()
        self.charge: Charge | None = None

    def hear(self, charge: Charge | None = None) -> None:
        """The supervisor is there. charge: what it has to tell, where that has changed."""
        self._heard_s = time.monotonic()
        if charge is not None:
            self.charge = charge

    def wait(self) -> bool:
        """Returns True once the run is without a supervisor, False where it is time to leave."""
        while not self._is_alone or not is_orphaned(self._run_dir):
            if self._silent_s > self._patience_s:
                return False
            time.sleep(_TICK_S)
        return True

    @property
    def _is_alone(self) -> bool:
        """Whether the supervisor has been silent for long enough and its host does not answer either."""
        if self.charge is None or self._silent_s < self._heartbeat_s - _PROBE_S:
            return False
        answers = takes_connections(self.charge.address, self.charge.port, timeout_s=_PROBE_S)
        return not answers and self._silent_s >= self._heartbeat_s

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
        self._addresses: dict[str, str] = {}
        self._met: list[Any] = []

    def prepare(self) -> str | None:
        """Load what it takes to supervise; returns this host's name, None where it does not see the run directory."""
        import ray

        from revdist.cluster.local import addresses

        if not (self._run_dir / "config.yaml").exists() or is_superseded(self._run_dir, os.environ[RUN_ID]):
            return None
        _load()
        self._vigil.hear()
        if not self._addresses:  # else another supervisor has come, and found it
            self._addresses = addresses()
            own = ray.get_runtime_context().current_actor
            threading.Thread(target=self._watch, args=(own,), name="revdist-deputy", daemon=True).start()
        return socket.gethostname()

    def hear(self, charge: Charge | None) -> None:
        """As `Vigil.hear`."""
        self._vigil.hear(charge)
        if charge is not None:  # an actor that was called once is found without the Ray head
            self._met = [one.actor.answer.remote() for one in charge.known.values()]

    def lead(self) -> None:
        """Supervise the run to its end, and leave. In the main thread, so that signals do what they do to a driver."""
        from revdist.cluster.takeover import Heritage
        from revdist.cluster.trainer import Trainer

        charge = self._vigil.charge
        assert charge is not None
        lost = frozenset(member for member, one in charge.known.items() if one.address == charge.address)
        trainer = Trainer(self._config, run_dir=self._run_dir, resume=True, log_dir=self._log_dir)
        try:
            trainer.take_over(Heritage(known=charge.known, lost=lost, addresses=self._addresses))
        except BaseException:  # how it ended is in the run directory
            _log.exception("the run that was taken over did not come to its end")
        finally:
            os._exit(0)

    def _watch(self, own: Any) -> None:
        if self._vigil.wait():
            own.lead.remote()
        else:
            os._exit(0)


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

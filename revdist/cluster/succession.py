"""The supervisor's side of a deputy: one on another host that sees the run directory, told what it has to know."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from revdist.cluster.claim import RunClaim
from revdist.cluster.companion import Companion
from revdist.cluster.deputy import Charge, Deputy
from revdist.cluster.fleet import NAMESPACE, Known, module_paths, orphan_s, settings
from revdist.cluster.takeover import deputy_name
from revdist.config import RunConfig
from revdist.errors import RunFailed

_CALLS = 4
"""Of the supervisor to its deputy in the time of a heartbeat."""
_LOOK_S = 10.0
"""Pause between looks for a host where none has been found, or where the deputy was lost."""
_PREPARE_S = 60.0
"""Longest wait for a deputy to load."""
_TICK_S = 0.5
_END_S = 5.0
"""Longest wait for a deputy to be ended: the Ray head may be away."""

_log = logging.getLogger(__name__)


@final
class Succession(Companion):
    """Keeps a deputy for one run, while it is entered, from a thread of its own: Ray's head may keep it waiting."""

    def __init__(
        self, config: RunConfig, claim: RunClaim, log_dir: Path, known: Callable[[], Mapping[int, Known]]
    ) -> None:
        """known: the run's replicas as they are now."""
        self._config = config
        self._claim = claim
        self._log_dir = log_dir
        self._known = known
        self._deputy: Any = None
        self._charge: Charge | None = None
        """What the deputy has been told."""
        self._own: dict[str, Any] = {}
        self._unfit: set[str] = set()
        """Nodes that do not see the run directory."""
        self._next_look_s = 0.0
        super().__init__("revdist-succession", end_s=_END_S)

    def _run(self) -> None:
        while not self._ended.wait(self._config.faults.heartbeat_s / _CALLS):
            self._leave_to_successor()
            if self._claim.record.state == "starting":  # it would load beside the replicas
                continue
            try:
                if self._deputy is None:
                    self._look()
                else:
                    self._tell()
            except RayError as error:
                _log.warning("no deputy for now: %s", error)
                self._lose()
        if self._deputy is not None:
            with contextlib.suppress(RayError):
                ray.kill(self._deputy)

    def _leave_to_successor(self) -> None:
        """End this process at once, without another word to the directory, where the run has been taken over."""
        successor = self._claim.successor
        if successor is not None:
            who = f"process {successor.process.pid} on {successor.host}"
            sys.stderr.write(f"this host seemed lost, and {who} has taken the run over: it is left to that one\n")
            os._exit(RunFailed.exit_code)

    def _tell(self) -> None:
        charge = Charge(
            known=self._known(), address=self._own["NodeManagerAddress"], port=int(self._own["NodeManagerPort"])
        )
        news = None if charge == self._charge else charge
        ray.get(self._deputy.hear.remote(news), timeout=self._config.faults.heartbeat_s)
        self._charge = charge

    def _lose(self) -> None:
        """The deputy is lost: another one is needed."""
        deputy, self._deputy, self._charge = self._deputy, None, None
        self._next_look_s = time.monotonic() + _LOOK_S
        self._claim.update(deputy="")
        if deputy is not None:
            ray.kill(deputy)

    def _look(self) -> None:
        """Appoint a deputy on another host, the Ray head's before others: without it, Ray ends soon anyway."""
        if time.monotonic() < self._next_look_s:
            return
        self._next_look_s = time.monotonic() + _LOOK_S
        own = ray.get_runtime_context().get_node_id()
        head = self._claim.record.ray_address.rpartition(":")[0]
        nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        self._own = next(node for node in nodes if node["NodeID"] == own)
        others = [
            node for node in nodes if node["Alive"] and node["NodeManagerAddress"] != self._own["NodeManagerAddress"]
        ]
        others.sort(key=lambda node: node["NodeManagerAddress"] != head)
        for node in others:
            if node["NodeID"] not in self._unfit and self._appoint(node["NodeID"]):
                self._tell()
                return

    def _appoint(self, node_id: str) -> bool:
        """Whether a host can stand by."""
        options: dict[str, Any] = {
            "num_cpus": 0,
            "name": deputy_name(self._claim.record.run_id, node_id),
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "get_if_exists": True,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False),
        }
        deputy: Any = (
            ray.remote(Deputy)
            .options(**options)
            .remote(self._config, self._claim.run_dir, self._log_dir, settings(), module_paths(), orphan_s())
        )
        loaded = deputy.prepare.remote()
        until_s = time.monotonic() + _PREPARE_S
        while not self._ended.is_set() and time.monotonic() < until_s and not ray.wait([loaded], timeout=_TICK_S)[0]:
            continue
        try:
            host = ray.get(loaded, timeout=0)
            if host is None:
                self._unfit.add(node_id)
        except (RayActorError, GetTimeoutError):
            host = None
        if host is None:
            ray.kill(deputy)
            return False
        self._deputy = deputy
        self._claim.update(deputy=host)
        return True

"""The front door: a configuration in, a trained run out."""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from revdist.cluster.claim import RunClaim
from revdist.cluster.lifelines import Lifelines
from revdist.cluster.local import addresses, ray_cluster, session_folder
from revdist.cluster.observer import Observer, Observers
from revdist.cluster.run_dirs import checkpoint_folder, choose_run_dir, has_checkpoint
from revdist.cluster.run_record import RAY_SESSION
from revdist.cluster.signals import StopRequest, stop_on_signals, stopped_at_start
from revdist.config import RunConfig
from revdist.devices.reading import Reading
from revdist.errors import NoFreeDevice, Preempted

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

    from revdist.cluster.controller import Controller
    from revdist.cluster.crew import Crew
    from revdist.cluster.fleet import Fleet
    from revdist.cluster.placement import Place
    from revdist.cluster.restarting import Restarter
    from revdist.cluster.takeover import Heritage
    from revdist.planning.costs import Plan
    from revdist.training.orders import Assignment, Rendezvous

_GIVEN_DATA = "revdist.training.data:given_to_trainer"
"""What a configuration names where the data did not come from a factory."""
_RESOURCES_S = 2.0
"""Ray needs a moment to count as free what a run before this one has left."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a finished run leaves."""

    run_dir: Path
    metrics: Mapping[str, Any]
    """What summary.json holds: test_accuracy, test_loss, steps, samples, wall_s, samples_per_s, gains, ..."""
    plans: tuple[Plan, ...]
    """Per rank: the plan it ended with."""


@final
class Trainer:
    """Trains one run, on its own local Ray cluster, a given one, or the one this process is connected to.

    Takes a `RunConfig` or a nested mapping, and the same keys as keyword arguments, which win.
    `address`: `auto` or `HOST:PORT` of a running Ray cluster; None: the Ray this process already uses,
    else a local cluster of its own, which is shut down at the end.
    `run_dir`: where the run is written; None: `runs/<name>-<time>` under the current folder.
    `resume`: continue from the newest whole checkpoint in `run_dir`; a run that has none yet begins again.
    `log_dir`: where what each rank prints is written; None: `logs` in the run directory.
    `placement_group`: of Ray, in whose bundles alone the replicas go; None: the one this code runs in, if it does.
    `datasets`: `(train, test)` in place of what `data.factory` would give, two map-style datasets that Ray can
    send to the replicas, such as `revdist.cluster.ray_data.as_map_style` makes of a Ray Dataset; test may be None.
    """

    def __init__(
        self,
        config: RunConfig | Mapping[str, Any] | None = None,
        *,
        observer: Observer | None = None,
        address: str | None = None,
        run_dir: str | Path | None = None,
        resume: bool = False,
        log_dir: str | Path | None = None,
        datasets: tuple[Any, Any] | None = None,
        placement_group: PlacementGroup | None = None,
        **keys: Any,
    ) -> None:
        given = config.model_dump(exclude_unset=True) if isinstance(config, RunConfig) else dict(config or {})
        if datasets is not None:
            given.setdefault("data", {"factory": _GIVEN_DATA})
        self.config = RunConfig.from_mapping({**given, **keys})
        self.datasets = datasets
        self.observer = observer or Observer()
        self.address = address
        self.run_dir = run_dir
        self.resume = resume
        self.log_dir = log_dir
        self.placement_group = placement_group

    def fit(self) -> Result:
        """Train to the end.

        Raises UsageError (nothing written) for what cannot run, RunFailed naming the first failing
        rank, its host, the cause and the remedy, Preempted after saving on SIGTERM, and
        KeyboardInterrupt after saving on SIGINT.
        """
        run_dir = self.choose_run_dir()
        self.check()
        return self._run(run_dir)

    def take_over(self, heritage: Heritage) -> Result:
        """Go on with a run whose supervisor is lost, from another host. Raises as `fit`."""
        return self._run(self.choose_run_dir(), heritage)

    def _run(self, run_dir: Path, heritage: Heritage | None = None) -> Result:
        with (
            RunClaim(run_dir, name=self.config.name, log_dir=self.choose_log_dir(run_dir)) as claim,
            ray_cluster(self.address, num_workers=self.num_cores) as own_ray,
            stop_on_signals() as stop,
        ):
            found = addresses() if heritage is None else heritage.addresses
            session = session_folder() if own_ray else os.environ.get(RAY_SESSION, "")
            claim.update(
                own_ray=bool(session), ray_session=session, ray_address=found.head, metrics_url=found.metrics_url
            )
            try:
                # The replicas of a detached run in a given cluster outlive this host's part of Ray, on other hosts.
                raylet = None if claim.record.detached and not session else found.raylet
                head_s = self.config.faults.head_s
                with Lifelines(found.head, head_s=head_s, raylet=raylet) as lifelines:
                    return self._fit(claim, stop, lifelines, heritage)
            except Preempted as error:
                if error.facts.get("signal") == "SIGINT":
                    raise KeyboardInterrupt(error.message) from error
                raise

    def dry_run(self) -> tuple[Reading, ...]:
        """The devices the run would use, one per rank, as they are now. Writes nothing; raises as `fit`."""
        from revdist.training.factories import import_factory

        self.choose_run_dir()
        self.check()
        for path in self._factories:
            import_factory(path)
        with ray_cluster(self.address, num_workers=self.num_cores):
            places, fleet = self._place()
            try:
                return tuple(location.reading for location in fleet.locate(_addresses(places, fleet)))
            finally:
                fleet.kill()

    def _fit(self, claim: RunClaim, stop: StopRequest, lifelines: Lifelines, heritage: Heritage | None) -> Result:
        # Ray is connected by now, and its modules can be imported.
        from revdist.cluster.logs import LogFiles
        from revdist.cluster.metrics import RunMetrics
        from revdist.cluster.restarting import Restarter
        from revdist.training.run_directory import RunWriter

        run_dir = claim.run_dir
        writer = RunWriter(run_dir)
        logs = LogFiles(self.choose_log_dir(run_dir))
        observer = Observers(claim, logs, RunMetrics(self.config.name), self.observer)
        stop_reason = lifelines.or_cut(stop)
        restarter = Restarter(
            self.config,
            assign=lambda resume: functools.partial(self._assignment, run_dir, resume=resume),
            checkpoint_folder=checkpoint_folder(self.config, run_dir),
            stop_reason=stop_reason,
        )
        crew = self._find(claim, observer, heritage)
        resume = self.resume and (crew is not None or has_checkpoint(self.config, run_dir))
        assign = functools.partial(self._assignment, run_dir, resume=resume)
        if crew is None and claim.orphans is not None:
            crew = self._start_after_loss(claim, observer, restarter)

        def leave_if_asked() -> None:
            reason = stop_reason()
            if reason is not None:
                raise stopped_at_start(reason, resumable=resume)

        crew = crew or self._start(claim, observer, assign, leave_if_asked)
        from revdist.cluster.controller import Controller  # while replicas load

        controller: Controller | None = None
        try:
            with self._succession(claim, crew.fleet):
                controller = Controller(
                    self.config,
                    crew,
                    writer,
                    observer,
                    assign=functools.partial(assign, len(crew.places)),
                    restarter=restarter,
                    checkpoint_folder=checkpoint_folder(self.config, run_dir),
                    stop_reason=stop_reason,
                    restarts=claim.record.restarts,
                )
                summary = controller.run()
            return Result(run_dir=run_dir, metrics=summary, plans=controller.final_plans)
        finally:
            with ExitStack() as ending:  # last in, first out, and each whatever the others raise
                ending.callback(_end, crew.fleet, lifelines)
                ending.callback(writer.close)
                ending.callback(logs.close)
                if controller is not None:
                    ending.callback(controller.gather_logs)

    def _succession(self, claim: RunClaim, fleet: Fleet) -> AbstractContextManager[object]:
        """Keeps a deputy where replicas outlive their supervisor and may do so on other hosts."""
        if not claim.record.detached or claim.record.own_ray:
            return nullcontext()
        from revdist.cluster.succession import Succession

        return Succession(self.config, claim, Path(claim.record.log_dir), known=lambda: fleet.known)

    def _find(self, claim: RunClaim, observer: Observer, heritage: Heritage | None) -> Crew | None:
        """The replicas of this run that outlived their driver; None where there are none, or none is alive."""
        if claim.orphans is None:
            return None
        from revdist.cluster.placement import names_uuids
        from revdist.cluster.takeover import find

        threads, heartbeat_s = self.config.threads_per_worker, self.config.faults.heartbeat_s
        by_uuid = names_uuids(self.config)
        crew = find(claim.orphans, threads=threads, heartbeat_s=heartbeat_s, heritage=heritage, by_uuid=by_uuid)
        if crew is not None:
            observer.on_start(claim.run_dir, [crew.locations[member].reading for member in crew.groups.members])
        return crew

    def _start_after_loss(self, claim: RunClaim, observer: Observer, restarter: Restarter) -> Crew:
        """Replicas where those of a killed driver are gone too: perhaps with hosts, which Ray misses a minute later."""
        from revdist.cluster.takeover import next_member

        run_id = claim.record.run_id
        fleet = self._empty_fleet(run_id)
        fleet.take_over({}, next_member=next_member(run_id))
        try:
            crew = restarter.restart(fleet)
        except BaseException:
            fleet.kill()
            raise
        observer.on_start(claim.run_dir, [location.reading for location in crew.locations.values()])
        return crew

    def _start(
        self, claim: RunClaim, observer: Observer, assign: Callable[..., Assignment], look: Callable[[], None]
    ) -> Crew:
        """Replicas on the devices that are free, at work on their first group. look: called while that takes long."""
        from revdist.cluster.crew import Crew
        from revdist.cluster.rehearsal import check_devices

        places, fleet = self._place(claim.record.run_id if claim.record.detached else None, look=look)
        try:
            located = fleet.locate(_addresses(places, fleet), look=look)
            locations = dict(zip(fleet.members, located, strict=True))
            check_devices(self.config.co_tenants, locations)
            observer.on_start(claim.run_dir, [location.reading for location in locations.values()])
            return Crew.at_work(fleet, dict(zip(fleet.members, places, strict=True)), locations, assign)
        except BaseException:
            fleet.kill()
            raise

    def _place(
        self, run_id: str | None = None, *, look: Callable[[], None] = lambda: None
    ) -> tuple[Sequence[Place], Fleet]:
        """Where replicas go, and their actors. run_id: given, they outlive this process. look: called while waiting."""
        from revdist.cluster.placement import place

        fleet = self._empty_fleet(run_id)
        patient_until_s = time.monotonic() + _RESOURCES_S
        while True:
            try:
                places = place(self.config, fleet.free_hosts())
            except NoFreeDevice:
                if time.monotonic() > patient_until_s:
                    raise
            else:
                for one in places:
                    fleet.add(one)
                return places, fleet
            look()
            time.sleep(0.1)

    def _empty_fleet(self, run_id: str | None) -> Fleet:
        from revdist.cluster.fleet import Fleet
        from revdist.cluster.placement import names_uuids

        return Fleet(
            (),
            threads=self.config.threads_per_worker,
            run_id=run_id,
            placement_group=self._present_placement_group(),
            by_uuid=names_uuids(self.config),
        )

    def _present_placement_group(self) -> PlacementGroup | None:
        from ray.util import get_current_placement_group

        return self.placement_group or get_current_placement_group()

    def _assignment(
        self, run_dir: Path, world_size: int, rendezvous: Rendezvous | None = None, *, resume: bool
    ) -> Assignment:
        from revdist.training.orders import Assignment

        return Assignment(
            config=self.config,
            rendezvous=rendezvous,
            world_size=world_size,
            checkpoints=checkpoint_folder(self.config, run_dir),
            resume=resume,
            data=self.datasets,
        )

    def check(self) -> None:
        """Raise UsageError for what can be seen to be wrong before anything is started."""
        if self.config.devices != "auto":
            from revdist.planning.split import equal_split

            equal_split(self.config.global_batch, len(self.config.devices))
        if self.address is None:  # elsewhere, ranks may have modules that this process has not
            from revdist.training.factory_check import check_factory

            for path in self._factories:
                check_factory(path)

    @property
    def _factories(self) -> tuple[str, ...]:
        """What ranks will import."""
        config = self.config
        return (config.model.factory, config.data.factory, config.loss, config.optimizer.factory)

    def choose_run_dir(self) -> Path:
        """Absolute path of the run directory, which must hold a run to resume, or none, and none that is alive.

        Raises ConfigError or CheckpointError. Nothing is made yet.
        """
        return choose_run_dir(self.config, self.run_dir, resume=self.resume)

    def choose_log_dir(self, run_dir: Path) -> Path:
        """Absolute path of the folder for what ranks print."""
        return run_dir / "logs" if self.log_dir is None else Path(self.log_dir).absolute()

    @property
    def num_cores(self) -> int:
        """Cores that a cluster of our own must offer."""
        num_devices = 1 if self.config.devices == "auto" else len(self.config.devices)
        return num_devices * self.config.threads_per_worker


def _end(fleet: Fleet, lifelines: Lifelines) -> None:
    if not lifelines.head_is_gone:  # else Ray ends them, and cannot be asked to
        fleet.kill()


def _addresses(places: Sequence[Place], fleet: Fleet) -> dict[int, str]:
    """What each actor of a new fleet opens and listens on."""
    return {member: place.address for member, place in zip(fleet.members, places, strict=True)}

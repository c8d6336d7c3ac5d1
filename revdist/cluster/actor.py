"""The Ray actor of one device: hosts a replica, passes orders in and reports out while it trains.

Importing this module loads neither torch nor what a replica needs: an actor answers as soon as its
process is there, and loads the rest in the thread that trains.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, final

from revdist.cluster.placement import Place
from revdist.cluster.processes import Process, own_process
from revdist.cluster.run_record import RUN_DIR, RUN_ID
from revdist.config import CoTenantConfig
from revdist.devices import list_devices, open_device
from revdist.devices.cpu import DEFAULT_NAME, CpuDevice
from revdist.devices.device import Device
from revdist.devices.host import host_memory
from revdist.devices.reading import Reading
from revdist.errors import NoFreeDevice, UsageError
from revdist.training.network import listen

if TYPE_CHECKING:
    from revdist.training.orders import Assignment, Inbox, Regroup, Shares
    from revdist.training.reports import CurveReport, LogReport, Outbox, PlanReport, Report

NUM_THREADS = 6
"""Calls an actor answers at once; one of them waits for reports."""
_SAVE_S = 120.0
"""Longest time that an orphan takes to save before it leaves."""
_STUCK_S = 10.0
"""Least time for an orphan to reach a step boundary with the others, before it saves what it holds by itself."""
_LOOK_S = 2.0
"""Seconds between looks at who has the run directory."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """Where an actor runs, and on what."""

    host: str
    address: str
    pid: int
    store_port: int
    """Where the group's store would listen, were this rank to host it."""
    reading: Reading
    started: str = ""
    """When its process started, as `Process` tells it."""

    @property
    def process(self) -> Process:
        return Process(pid=self.pid, started=self.started)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What a replica's process tells a supervisor that takes over."""

    place: Place
    location: Location
    group: int
    """Number of the newest group that it knows of."""
    rank: int
    world_size: int
    """Its rank and the number of ranks there."""
    shares: Shares | None
    """The newest that it has been told; None: it has not joined yet."""
    curve: CurveReport | None
    plan: PlanReport | None


def surround(environment: Mapping[str, str], paths: Sequence[str]) -> None:
    """Give this process the driver's settings, and let it find modules where the driver does."""
    os.environ.update(environment)
    sys.path.extend(path for path in paths if path not in sys.path)


@final
class ReplicaActor:
    """One rank's process."""

    def __init__(
        self, place: Place, environment: Mapping[str, str], paths: Sequence[str], orphan_s: float | None
    ) -> None:
        """environment, paths: the driver's settings and where it finds modules; nothing happens here otherwise.

        orphan_s: seconds without a word from a supervisor after which this process leaves, and saves before that
        where it has begun to train; None: it ends with its driver anyway.
        """
        surround(environment, paths)
        self._place = place
        self._location: Location | None = None
        self._assignment: Assignment | None = None
        self._orphan_s = orphan_s
        self._heard_s = time.monotonic()
        self._device: Device | None = None
        self._listener: socket.socket | None = None
        self._inbox: Inbox | None = None
        self._outbox: Outbox | None = None
        self._co_tenants: dict[CoTenantConfig, subprocess.Popen[bytes]] = {}
        if orphan_s is not None:
            threading.Thread(target=self._leave_as_orphan, name="revdist-orphan", daemon=True).start()

    def locate(self, address: str) -> Location:
        """Open the device, without computing on it, and bind the store's socket on the host's address.

        Raises DeviceError or UsageError where the device cannot be opened.
        """
        self._heard_s = time.monotonic()
        self._device = self._open()
        self._listener = listen(address)
        self._location = Location(
            host=socket.gethostname(),
            address=address,
            pid=os.getpid(),
            store_port=self._listener.getsockname()[1],
            reading=self._device.read(),
            started=own_process().started,
        )
        return self._location

    def start(self, assignment: Assignment) -> None:
        """Let the replica live, in a thread of its own."""
        from revdist.cluster.logs import LogSender

        self._heard_s = time.monotonic()
        self._assignment = assignment
        if RUN_DIR in os.environ:
            threading.Thread(target=self._leave_to_another, name="revdist-claim", daemon=True).start()
        LogSender(self._channels()[1]).start()
        threading.Thread(
            target=self._live, args=(assignment, self._channels()), name="revdist-train", daemon=True
        ).start()

    def reports(self, after: int, timeout_s: float) -> tuple[int, list[Report]]:
        """Reports after number `after`, as `Outbox.read`."""
        self._heard_s = time.monotonic()
        return self._channels()[1].read(after, timeout_s=timeout_s)

    def standing(self) -> Standing | None:
        """Everything that a supervisor which takes over needs to know; None: this process has no device yet."""
        from revdist.training.reports import CurveReport, PlanReport

        self._heard_s = time.monotonic()
        inbox, outbox = self._channels()
        order = inbox.newest_order
        rendezvous = None if self._assignment is None else self._assignment.rendezvous
        rendezvous = rendezvous if order is None else order.rendezvous
        if self._location is None:
            return None
        return Standing(
            place=self._place,
            location=self._location,
            group=inbox.newest_group,
            rank=-1 if rendezvous is None else rendezvous.rank,
            world_size=0 if rendezvous is None else rendezvous.world_size,
            shares=inbox.newest_shares,
            curve=outbox.latest(CurveReport),
            plan=outbox.latest(PlanReport),
        )

    def rest_of_log(self, report: LogReport) -> LogReport:
        """What this process has printed since a report."""
        from revdist.cluster.logs import rest_of

        return rest_of(report)

    def adopt(self, shares: Shares) -> None:
        """Keep new shares until all ranks have them."""
        self._channels()[0].adopt(shares)

    def regroup(self, order: Regroup) -> None:
        """Form another group, at the next step boundary or at once, as the order says."""
        self._channels()[0].regroup(order)

    def answer(self) -> None:
        """Say that this process is alive."""
        self._heard_s = time.monotonic()

    def stop(self, reason: str) -> None:
        """Save and leave at the next step boundary."""
        self._channels()[0].stop(reason)

    def read(self) -> Reading:
        """The device's memory now."""
        assert self._device is not None
        return self._device.read()

    def start_co_tenant(self, co_tenant: CoTenantConfig) -> int:
        """Let another process take memory of a device of this host; returns its pid."""
        command = [sys.executable, "-m", "revdist.devices.co_tenant"]
        command += ["--device", co_tenant.device, "--take", str(co_tenant.take)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        self._co_tenants[co_tenant] = process
        return process.pid

    def end_co_tenant(self, co_tenant: CoTenantConfig) -> None:
        """Let it give the memory back: it ends when its input closes, as it does if this process dies."""
        process = self._co_tenants.pop(co_tenant, None)
        if process is not None and process.stdin is not None:
            process.stdin.close()
            process.wait(timeout=30)

    def _live(self, assignment: Assignment, channels: tuple[Inbox, Outbox]) -> None:
        from revdist.training.replica import Replica

        assert self._device is not None
        Replica(assignment, self._device, *channels, self._listener).run()

    def _leave_as_orphan(self) -> None:
        """Save and leave once no supervisor has been heard for too long."""
        assert self._orphan_s is not None
        while time.monotonic() - self._heard_s < self._orphan_s:
            time.sleep(self._orphan_s / 20)
        if self._assignment is None:
            os._exit(0)
        inbox, outbox = self._channels()
        inbox.stop(f"no supervisor for {self._orphan_s:.0f} s")
        if not outbox.wait_until_closed(max(_STUCK_S, self._orphan_s / 2)):
            inbox.abandon(self._may_write)  # a rank is lost as well, and nobody orders a group without it
            outbox.wait_until_closed(_SAVE_S)
        os._exit(0)

    def _leave_to_another(self) -> None:
        """End at once where another run has taken the directory: this one's driver is gone, and two must not write."""
        from revdist.cluster.claim import is_superseded

        run_dir, run_id = Path(os.environ[RUN_DIR]), os.environ[RUN_ID]
        while not is_superseded(run_dir, run_id):
            time.sleep(_LOOK_S)
        os._exit(0)

    def _may_write(self) -> AbstractContextManager[bool]:
        from revdist.cluster.claim import right_to_write

        return right_to_write(Path(os.environ[RUN_DIR]), os.environ[RUN_ID], patience_s=_SAVE_S / 4)

    def _channels(self) -> tuple[Inbox, Outbox]:
        if self._inbox is None or self._outbox is None:
            from revdist.training.orders import Inbox
            from revdist.training.reports import Outbox

            self._inbox, self._outbox = Inbox(), Outbox()
        return self._inbox, self._outbox

    def _open(self) -> Device:
        """The device; where any will do, one that no other replica computes on."""
        spec = self._place.spec
        name = "" if self._place.any_device else spec.name
        device = open_device(kind=spec.kind, name=name, uuid=self._uuid(), capacity_bytes=spec.capacity)
        if not isinstance(device, CpuDevice):
            return device
        number = 0
        while not device.reserve():
            if not self._place.any_device:
                return device
            number += 1
            # A host's memory is one: a further device of it counts on half of what is free now.
            known = any(one.name == f"cpu-{number}" for one in list_devices())
            device = CpuDevice.open(f"cpu-{number}", capacity_bytes=None if known else host_memory()[1] // 2)
        if spec.capacity is None and (self._place.any_device or device.name == DEFAULT_NAME):
            # It may be there from a run before, with less. Where another process uses it, it stays as it is.
            with suppress(UsageError):
                device.resize(host_memory()[1] // (2 if number else 1))
        return device

    def _uuid(self) -> str:
        """The device's UUID: the one configured, else that of the GPU that Ray reserved for this actor."""
        if self._place.spec.kind == "cpu" or self._place.spec.uuid:
            return self._place.spec.uuid
        import ray

        (assigned,) = ray.get_runtime_context().get_accelerator_ids()["GPU"]
        for reading in list_devices():
            if reading.kind == "cuda" and assigned in (str(reading.index), reading.uuid):
                return reading.uuid
        raise NoFreeDevice(f"Ray reserved GPU {assigned}, which the driver does not list: run `revdist devices` there")

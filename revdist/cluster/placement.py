"""Which devices a run trains on, and on which host each replica goes."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Sequence

from revdist.config import DeviceSpec, RunConfig
from revdist.errors import NoFreeDevice
from revdist.planning.split import equal_split


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A host of the cluster, with what Ray has free on it."""

    node_id: str
    address: str
    cpus: float
    gpus: float
    bundle: int = -1
    """Of a placement group, whose part of the host this is; -1: the host as a whole."""
    uuids: frozenset[str] | None = None
    """Of its devices; None: it was not asked, so any may be there."""

    def may_have(self, spec: DeviceSpec) -> bool:
        """Whether a device can be one of this host's."""
        return not spec.uuid or self.uuids is None or spec.uuid in self.uuids

    def without(self, place: Place, *, threads: int) -> Host:
        """The host with what is left once a replica is placed; itself where that is elsewhere."""
        if (place.node_id, place.bundle) != (self.node_id, self.bundle):
            return self
        return dataclasses.replace(self, cpus=self.cpus - threads, gpus=self.gpus - (place.spec.kind == "cuda"))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where one replica goes."""

    rank: int
    node_id: str
    address: str
    """Of the host, on the network that the cluster shares."""
    spec: DeviceSpec
    """With a name, where it is a CPU device."""
    bundle: int = -1
    """Of the run's placement group; -1: it has none."""
    any_device: bool = False
    """Another CPU device of the host will do, where another run computes on this one."""


def names_uuids(config: RunConfig) -> bool:
    """Whether devices are listed that only one host has."""
    return config.devices != "auto" and any(spec.uuid for spec in config.devices)


def place(config: RunConfig, hosts: Sequence[Host], *, partly: bool = False) -> tuple[Place, ...]:
    """One place per replica, replicas of a host next to each other.

    CPU devices are dealt out over the hosts in turn, GPUs go where Ray has them free, those with a UUID to its host.
    partly: as many of the devices listed as there are, and `workers.min` at least, will do.

    Raises NoFreeDevice where the cluster has too few, BatchTooSmall where a replica would have no sample.
    """
    homes = _Homes(hosts, threads=config.threads_per_worker)
    automatic = config.devices == "auto"
    specs = (homes.automatic() if config.devices == "auto" else list(config.devices))[: config.workers.max]
    specs.sort(key=lambda spec: not spec.uuid)  # first those that only one host has
    if partly:
        specs = _those_with_room(specs, _Homes(hosts, threads=config.threads_per_worker))
    if len(specs) < config.workers.min:
        raise NoFreeDevice(
            f"{len(specs)} devices are free and the run wants {config.workers.min}: lower workers.min, "
            "or list more devices (`revdist devices` shows what there is)"
        )
    equal_split(config.global_batch, len(specs))
    chosen = [(homes.take(spec), spec) for spec in specs]
    order = {host.node_id: number for number, host in enumerate(hosts)}
    chosen.sort(key=lambda pair: order[pair[0].node_id])
    return tuple(
        _on(host, spec, rank=rank, any_device=automatic and spec.kind == "cpu")
        for rank, (host, spec) in enumerate(_named(chosen))
    )


def place_another(
    config: RunConfig,
    hosts: Sequence[Host],
    taken: Sequence[Place],
    lost: Sequence[Place],
    *,
    rank: int,
    replace: bool = True,
) -> Place | None:
    """A place for one more replica of a run under way; None where there is none now.

    The device of a replica that was lost, where it has come back, on its own host or another that has room; with
    `devices: auto` also a device that the run had not before.
    replace: whether what was lost may be replaced; else the devices of lost replicas are left alone.
    """
    if replace:
        rooms = [(before, host) for before in lost for host in hosts if _fits(config, host, before.spec)]
        rooms.sort(key=lambda room: room[0].node_id != room[1].node_id)
        for before, host in rooms:
            if not _is_taken(host, before, taken):
                spec = _with_name(config, host, before.spec, (*taken, *lost))
                return _on(host, spec, rank=rank, any_device=before.any_device)
    if config.devices != "auto":
        return None
    for before in () if replace else lost:
        hosts = [host.without(before, threads=config.threads_per_worker) for host in hosts]
    used = {(place.node_id, place.bundle) for place in (*taken, *lost)}
    on_gpus = any(place.spec.kind == "cuda" for place in (*taken, *lost))
    spec = DeviceSpec(kind="cuda") if on_gpus else DeviceSpec(kind="cpu", name="cpu-0")
    for host in hosts:
        if (on_gpus or (host.node_id, host.bundle) not in used) and _fits(config, host, spec):
            return _on(host, spec, rank=rank, any_device=not on_gpus)
    return None


def missing(listed: Sequence[DeviceSpec], places: Sequence[Place]) -> list[DeviceSpec]:
    """Those of the devices listed that have no replica."""
    there = [place.spec for place in places]
    absent = []
    for spec in sorted(listed, key=lambda spec: not spec.name):  # those that any name will do for take what is left
        found = next((one for one in there if is_like(one, spec)), None)
        if found is None:
            absent.append(spec)
        else:
            there.remove(found)
    return absent


def is_like(placed: DeviceSpec, listed: DeviceSpec) -> bool:
    """Whether a replica's device is one that was listed, perhaps without a name."""
    return placed == (listed if listed.name else listed.model_copy(update={"name": placed.name}))


def _on(host: Host, spec: DeviceSpec, *, rank: int, any_device: bool) -> Place:
    return Place(
        rank=rank,
        node_id=host.node_id,
        address=host.address,
        spec=spec,
        bundle=host.bundle,
        any_device=any_device,
    )


def _fits(config: RunConfig, host: Host, spec: DeviceSpec) -> bool:
    has_room = host.cpus >= config.threads_per_worker and (spec.kind == "cpu" or host.gpus >= 1)
    return has_room and host.may_have(spec)


def _is_taken(host: Host, before: Place, taken: Sequence[Place]) -> bool:
    """Whether a CPU device like one from before has a replica on this host, or on this part of it."""
    if before.any_device:
        return any((place.node_id, place.bundle) == (host.node_id, host.bundle) for place in taken)
    on_host = [place.spec for place in taken if place.node_id == host.node_id]
    return before.spec.kind == "cpu" and any(spec.name == before.spec.name for spec in on_host)


class _Homes:
    """Hosts with what is left of them as replicas are placed."""

    def __init__(self, hosts: Sequence[Host], *, threads: int) -> None:
        self._hosts = hosts
        self._threads = threads
        self._cpus = {host: host.cpus for host in hosts}
        self._gpus = {host: host.gpus for host in hosts}
        self._placed = dict.fromkeys(hosts, 0)

    def automatic(self) -> list[DeviceSpec]:
        """Every free GPU, else one CPU device on each host that has a free core."""
        gpus = [DeviceSpec(kind="cuda") for host in self._hosts for _ in range(int(host.gpus))]
        return gpus or [DeviceSpec(kind="cpu") for host in self._hosts if host.cpus >= self._threads]

    def take(self, spec: DeviceSpec) -> Host:
        fitting = [host for host in self._hosts if self._has_room(host, spec)]
        if not fitting:
            raise NoFreeDevice(self._why_not(spec))
        # Python's sort is stable: among hosts with as few replicas, the first.
        host = min(fitting, key=lambda host: self._placed[host])
        self._cpus[host] -= self._threads
        self._gpus[host] -= spec.kind == "cuda"
        self._placed[host] += 1
        return host

    def _has_room(self, host: Host, spec: DeviceSpec) -> bool:
        has_room = self._cpus[host] >= self._threads and (spec.kind == "cpu" or self._gpus[host] >= 1)
        return has_room and host.may_have(spec)

    def _why_not(self, spec: DeviceSpec) -> str:
        if not any(host.may_have(spec) for host in self._hosts):
            return (
                f"no device {spec.uuid} on {len(self._hosts)} hosts that answer: `revdist devices --address HOST:PORT` "
                "lists those of a cluster"
            )
        if spec.uuid and spec.kind == "cuda":
            return f"the host of {spec.uuid} has no free GPU or core: free it (`revdist devices` shows who holds it)"
        if spec.kind == "cuda" and not any(self._gpus[host] >= 1 for host in self._hosts):
            total = int(sum(host.gpus for host in self._hosts))
            return (
                f"no free GPU: the run wants another one and Ray has {total} free on {len(self._hosts)} hosts; "
                "list CPU devices, or free a GPU (`revdist devices` shows who holds them)"
            )
        total = int(sum(host.cpus for host in self._hosts))
        return (
            f"no free core: each replica takes {self._threads} and Ray has {total} free on {len(self._hosts)} hosts; "
            "list fewer devices, or end other jobs of the cluster"
        )


def _those_with_room(specs: Sequence[DeviceSpec], homes: _Homes) -> list[DeviceSpec]:
    fitting = []
    for spec in specs:
        with contextlib.suppress(NoFreeDevice):
            homes.take(spec)
            fitting.append(spec)
    return fitting


def _with_name(config: RunConfig, host: Host, spec: DeviceSpec, others: Sequence[Place]) -> DeviceSpec:
    """A device, with a name that no other one on its host has, or will have once it is back."""
    if spec.kind == "cuda" or spec.name:
        return spec
    listed = () if config.devices == "auto" else config.devices
    known = {one.name for one in listed}
    known |= {place.spec.name for place in others if place.node_id in (host.node_id, "")}
    free = (f"cpu-{number}" for number in itertools.count())
    return spec.model_copy(update={"name": next(name for name in free if name not in known)})


def _named(chosen: Sequence[tuple[Host, DeviceSpec]]) -> list[tuple[Host, DeviceSpec]]:
    """Give every CPU device a name of its own on its host: those left out become cpu-0, cpu-1, ...

    Raises NoFreeDevice where a host has a name twice.
    """
    taken = {(host.node_id, spec.name) for host, spec in chosen if spec.name}
    used: set[tuple[str, str]] = set()
    named = []
    for host, spec in chosen:
        if spec.kind == "cpu":
            name = spec.name or next(
                name
                for number in range(len(chosen) + len(taken))
                if (host.node_id, name := f"cpu-{number}") not in taken
            )
            if (host.node_id, name) in used:
                raise NoFreeDevice(
                    f"two replicas would share the device {name} on {host.address}: give each its own name"
                )
            used.add((host.node_id, name))
            taken.add((host.node_id, name))
            spec = spec.model_copy(update={"name": name})
        named.append((host, spec))
    return named

"""Which Ray a run uses: the one this process is connected to, a given one, or a local one of its own."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import logging
import os
import secrets
import signal
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from revdist.cluster.address import check_reachable, parse_address, takes_connections
from revdist.cluster.admission import check_admission
from revdist.cluster.lean_ray import lean_head
from revdist.cluster.processes import writing_below
from revdist.cluster.session import is_own_session, new_session_root, remove_session
from revdist.cluster.way_out import expect_to_be_held_up
from revdist.errors import AddressUnreachable

_LOOK_S = 1.0
"""Longest wait for the head of a cluster to take a connection."""


@contextlib.contextmanager
def ray_cluster(address: str | None, *, num_workers: int) -> Iterator[bool]:
    """Connect to Ray for the time of a run, and undo exactly what was done.

    Yields whether the cluster is the run's own, on this machine alone.
    Raises AddressUnreachable, within seconds, where no Ray cluster listens at the address.
    """
    if _is_connected():
        yield False
        return
    environment = _own_cluster_environment() if address is None else {"RAY_USAGE_STATS_ENABLED": "0"}
    with _environment(environment), _ray_off_the_terminal():
        if address is None:
            _start(num_workers)
        else:
            _connect(address)
        try:
            yield address is None
        finally:
            session = session_folder() if address is None else ""
            _disconnect(session)
            remove_session(session)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Where the cluster that this process is connected to can be reached."""

    head: str
    """`HOST:PORT`."""
    raylet: str
    """`HOST:PORT` of this host's part of it."""
    metrics_url: str
    """Where Ray offers the metrics of this host to Prometheus; empty where it does not."""


def addresses() -> Addresses:
    """Of the connected cluster."""
    import ray

    context = ray.get_runtime_context()
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    own = next(node for node in nodes if node["NodeID"] == context.get_node_id())
    host, port = own["NodeManagerAddress"], own.get("MetricsExportPort")
    return Addresses(
        head=str(context.gcs_address),
        raylet=f"{host}:{own['NodeManagerPort']}",
        metrics_url=f"http://{host}:{port}/metrics" if port else "",
    )


def session_folder() -> str:
    """Folder in which the processes of the connected cluster have their logs and sockets on this host."""
    from ray._private import worker

    node: Any = worker._global_node
    return str(node.get_session_dir_path())


def _is_connected() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _own_cluster_environment() -> dict[str, str]:
    """Settings of a cluster that only this run talks to: on loopback, with a token that is nowhere on disk."""
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # Despite its name, this is what binds Ray to the loopback interface, on every system.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # Ray's workers give way to every other process by default; training is what the machine is for.
        "RAY_worker_niceness": "0",
    }


def _start(num_workers: int) -> None:
    import ray
    from ray._private import ray_constants

    ray_constants.ENABLE_RAY_CLUSTER = False  # read at import, which may have been before our setting
    with lean_head():
        ray.init(
            "local",  # else Ray joins whatever cluster runs on this machine
            _temp_dir=str(new_session_root()),
            # Replicas are placed on devices, not on cores: a small machine may hold more of them than it has.
            num_cpus=max(num_workers, os.cpu_count() or 1),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )


def _connect(address: str) -> None:
    if address != "auto":
        check_reachable(address)
        _stay_on_loopback_where_ray_does(address)
    import ray
    from ray._private.authentication import authentication_token_setup

    # `ray start` asks for a token where this machine has one; `ray.init` sends it to `auto` alone.
    authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    known = _known_address(address)
    if known is not None:
        check_admission(known)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise AddressUnreachable(
            f"no Ray cluster to connect to at {address}: start one with `ray start --head`, "
            "or leave --address out for a local cluster",
            address=address,
        ) from error


def _known_address(address: str) -> str | None:
    """`HOST:PORT` where Ray will connect to; None where it does not know any."""
    if address != "auto":
        return address
    from ray._private import services

    return services.canonicalize_bootstrap_address("auto")


def _stay_on_loopback_where_ray_does(address: str) -> None:
    """Ray takes a loopback address for the host's own, where a cluster that is on loopback alone does not listen."""
    from ray._private import ray_constants, services

    host, port = parse_address(address)
    own = services.resolve_ip_for_localhost(host)
    if own == host:
        return
    try:
        check_reachable(f"{own}:{port}")
    except AddressUnreachable:
        ray_constants.ENABLE_RAY_CLUSTER = False


def _disconnect(session: str) -> None:
    """Leave the cluster, and end it where it is the run's own. session: its folder then, else empty."""
    import ray

    if takes_connections(*parse_address(ray.get_runtime_context().gcs_address), timeout_s=_LOOK_S):
        ray.shutdown()
        return
    expect_to_be_held_up()
    atexit.unregister(ray.shutdown)
    if is_own_session(session):
        for process in writing_below(session):
            process.send(signal.SIGKILL)


@contextlib.contextmanager
def _ray_off_the_terminal() -> Iterator[None]:
    """Ray prints what happens to workers on the driver's terminal, across the live view, and has no switch for it."""
    from ray._private import worker

    before = worker.print_to_stdstream
    worker.print_to_stdstream = lambda *data, **options: None
    try:
        yield
    finally:
        worker.print_to_stdstream = before


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables for the processes that Ray starts, and put back what was there."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    _reread_environment()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _reread_environment()


def _reread_environment() -> None:
    """Ray reads its settings at import and keeps the first token it sees: let it look again."""
    if "ray" in sys.modules:
        from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()

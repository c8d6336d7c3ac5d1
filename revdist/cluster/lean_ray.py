"""Starting a Ray cluster of one's own without the processes that a run never uses, nor idle waits.

`ray.init` waits for a dashboard server, even one without a dashboard, before it starts the rest; it also
starts the autoscaler's monitor and a log monitor. On a cluster that lives for one run there is nothing to
scale, nobody to look, and replicas send what they print themselves. Each takes about a second of a core
just when replicas load, which counts on a small machine. Ray has switches for them, but not in `ray.init`.

It looks once a second whether its node has come up, and imports all that a dashboard needs to see that it
is installed, which revdist's own requirements say.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
from collections.abc import Callable, Iterator
from typing import Any

_WITHOUT: dict[str, Any] = {"no_monitor": True, "include_log_monitor": False}
"""Ray's parameters of a node."""
_LOOK_S = 0.05
"""Pause between looks for a node that comes up."""
_PATIENCE_S = 30.0
"""Time for it, after which Ray's own search says what is wrong."""


@contextlib.contextmanager
def lean_head() -> Iterator[None]:
    """Within, a cluster that `ray.init` starts has no dashboard server, no autoscaler and no log monitor.

    A Ray whose inner parts are named otherwise starts all of it, and waits, as it would without this.
    """
    from ray._private import parameter, services, utils

    with contextlib.ExitStack() as changes:
        if hasattr(services, "start_api_server"):
            changes.enter_context(_replaced(services, "start_api_server", _no_api_server))
        if _takes(parameter.RayParams, *_WITHOUT):
            lean = functools.partial(parameter.RayParams, **_WITHOUT)
            changes.enter_context(_replaced(parameter, "RayParams", lean))
        if hasattr(services, "get_node") and hasattr(services, "_get_gcs_client_options"):
            get_node = functools.partial(_get_node, services.get_node)
            changes.enter_context(_replaced(services, "get_node", get_node))
        if hasattr(utils, "get_dashboard_dependency_error"):
            changes.enter_context(_replaced(utils, "get_dashboard_dependency_error", lambda: None))
        yield


def _no_api_server(*_: Any, **__: Any) -> tuple[str, None]:
    """In place of the server: its address, which nothing asks for, and its process."""
    return "", None


def _get_node(get_node: Callable[[str, str], Any], gcs_address: str, node_id: str) -> Any:
    """What Ray's own search finds, asked once the node is there."""
    from ray._private import services, state

    nodes: Any = state.GlobalState()  # type: ignore[no-untyped-call]
    nodes._initialize_global_state(services._get_gcs_client_options(gcs_address))  # type: ignore[no-untyped-call]
    until_s = time.monotonic() + _PATIENCE_S
    while not any(node["NodeID"] == node_id for node in nodes.node_table()) and time.monotonic() < until_s:
        time.sleep(_LOOK_S)
    return get_node(gcs_address, node_id)


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _takes(kind: type, *names: str) -> bool:
    return all(name in inspect.signature(kind).parameters for name in names)

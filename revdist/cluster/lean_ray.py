"""Starting a Ray cluster of one's own without the processes that a run never uses.

`ray.init` waits for a dashboard server, even one without a dashboard, before it starts the rest; it also
starts the autoscaler's monitor and a log monitor. On a cluster that lives for one run there is nothing to
scale, nobody to look, and replicas send what they print themselves. Each takes about a second of a core
just when replicas load, which counts on a small machine. Ray has switches for them, but not in `ray.init`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

_WITHOUT: dict[str, Any] = {"no_monitor": True, "include_log_monitor": False}
"""Ray's parameters of a node."""


@contextlib.contextmanager
def lean_head() -> Iterator[None]:
    """Within, a cluster that `ray.init` starts has no dashboard server, no autoscaler and no log monitor.

    A Ray whose inner parts are named otherwise starts all of it, as it would without this.
    """
    from ray._private import parameter, services

    with contextlib.ExitStack() as changes:
        if hasattr(services, "start_api_server"):
            changes.enter_context(_replaced(services, "start_api_server", _no_api_server))
        if _takes(parameter.RayParams, *_WITHOUT):
            lean = functools.partial(parameter.RayParams, **_WITHOUT)
            changes.enter_context(_replaced(parameter, "RayParams", lean))
        yield


def _no_api_server(*_: Any, **__: Any) -> tuple[str, None]:
    """In place of the server: its address, which nothing asks for, and its process."""
    return "", None


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

"""Distributed training for reversible networks, with a plan of its own for every device.

The public names are imported on first use: `import revdist` alone starts nothing and loads
neither torch nor Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from revdist import devices
    from revdist.cluster.observer import Observer
    from revdist.cluster.trainer import Result, Trainer
    from revdist.config import RunConfig
    from revdist.planning.costs import Mode, Option, Plan, Profile, Schedule
    from revdist.planning.frontier import Frontier, solve
    from revdist.reversible import ReversibleChain, apply, check
    from revdist.training.standalone import profile

__version__ = "0.1.0"

_HOMES = {
    "Frontier": "revdist.planning.frontier:Frontier",
    "Mode": "revdist.planning.costs:Mode",
    "Observer": "revdist.cluster.observer:Observer",
    "Option": "revdist.planning.costs:Option",
    "Plan": "revdist.planning.costs:Plan",
    "Profile": "revdist.planning.costs:Profile",
    "Result": "revdist.cluster.trainer:Result",
    "ReversibleChain": "revdist.reversible:ReversibleChain",
    "RunConfig": "revdist.config:RunConfig",
    "Schedule": "revdist.planning.costs:Schedule",
    "Trainer": "revdist.cluster.trainer:Trainer",
    "apply": "revdist.reversible:apply",
    "check": "revdist.reversible:check",
    "devices": "revdist.devices",
    "profile": "revdist.training.standalone:profile",
    "solve": "revdist.planning.frontier:solve",
}

__all__ = [
    "Frontier",
    "Mode",
    "Observer",
    "Option",
    "Plan",
    "Profile",
    "Result",
    "ReversibleChain",
    "RunConfig",
    "Schedule",
    "Trainer",
    "apply",
    "check",
    "devices",
    "profile",
    "solve",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'revdist' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    value: Any = importlib.import_module(module)
    if attribute:
        value = getattr(value, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOMES))

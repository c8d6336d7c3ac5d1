"""Reversible execution: operators, the chain that runs them under a schedule, and the profiler."""

from revdist.reversible.chain import Event, ReversibleChain, apply, find_chain
from revdist.reversible.couplings import AdditiveCoupling, AffineCoupling, Coupling
from revdist.reversible.meter import MemoryMeter
from revdist.reversible.operator import ReversibleOperator
from revdist.reversible.profiler import profile_chain

__all__ = [
    "AdditiveCoupling",
    "AffineCoupling",
    "Coupling",
    "Event",
    "MemoryMeter",
    "ReversibleChain",
    "ReversibleOperator",
    "apply",
    "find_chain",
    "profile_chain",
]

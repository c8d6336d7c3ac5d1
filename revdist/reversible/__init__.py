"""Reversible execution: operators, the chain that runs them under a schedule, and the profiler."""

from revdist.reversible.adapters import adapt, take_over
from revdist.reversible.attention import LocalAttention, LSHAttention
from revdist.reversible.chain import Event, ReversibleChain, apply, find_chain
from revdist.reversible.check import Check, check
from revdist.reversible.couplings import AdditiveCoupling, AffineCoupling, Coupling
from revdist.reversible.feed_forward import ChunkedFeedForward
from revdist.reversible.inplace_abn import InPlaceABN
from revdist.reversible.invertible_conv import InvertibleConv1x1, InvertibleConv2d
from revdist.reversible.meter import MemoryMeter
from revdist.reversible.momentum import MomentumBlock
from revdist.reversible.notes import noted
from revdist.reversible.ode import ReversibleODE
from revdist.reversible.on_first import OnFirst
from revdist.reversible.operator import ReversibleOperator
from revdist.reversible.profiler import profile_chain
from revdist.reversible.squeeze import Squeeze, SqueezeHalves

__all__ = [
    "AdditiveCoupling",
    "AffineCoupling",
    "Check",
    "ChunkedFeedForward",
    "Coupling",
    "Event",
    "InPlaceABN",
    "InvertibleConv1x1",
    "InvertibleConv2d",
    "LSHAttention",
    "LocalAttention",
    "MemoryMeter",
    "MomentumBlock",
    "OnFirst",
    "ReversibleChain",
    "ReversibleODE",
    "ReversibleOperator",
    "Squeeze",
    "SqueezeHalves",
    "adapt",
    "apply",
    "check",
    "find_chain",
    "noted",
    "profile_chain",
    "take_over",
]

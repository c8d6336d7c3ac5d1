"""Ordinary differential equations dz/dt = f(t, z) by steps that run backward exactly.

    z state   v velocity (ALF)   y second state (McCallum-Foster)   h step size   eta damping

Sources
- "alf", the asynchronous leapfrog with its damping: Zhuang, Dvornek, Tatikonda, Duncan, "MALI: A
  Memory Efficient and Reverse Accurate Integrator for Neural ODEs", ICLR 2021. One evaluation of f
  a step, second order:

      z1 = z + h/2 v     v' = (1 - 2 eta) v + 2 eta f(t + h/2, z1)     z' = z1 + h/2 v'

- "mccallum_foster": McCallum, Foster, "Efficient, Accurate and Stable Gradients for Neural ODEs",
  2024. It makes a reversible method of the order of Psi out of any explicit step Psi:

      y' = lam y + (1 - lam) z + Psi(t, h, z)          z' = z - Psi(t + h, -h, y')

Unlike the adjoint method, which solves another equation backward and returns its approximate
gradient, the backward here passes through the very steps of the forward: gradients are those of
plain autograd, and memory does not grow with the number of steps. Each step is an operator of its
own (each half step, for McCallum-Foster), planned by itself; inverting one evaluates f as often as
running it forward.

Pitfalls
- The state is a pair: `start` makes one of z, and the first of the pair is the solution.
- Undamped ALF is stable for oscillations only (eigenvalues of h f' on the imaginary axis, up to
  2i): dissipative f drift apart from v. Damp it (eta < 1), or use McCallum-Foster.
- Inverting multiplies errors by 1 / |1 - 2 eta| or 1 / lam a step. eta near 1/2 keeps nothing of v.
- f must be a function of (t, z) alone: BatchNorm inside it sees other statistics at every step.
- Step size is fixed. An adaptive one would have to be noted.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn

from revdist.errors import UsageError
from revdist.planning.costs import Mode
from revdist.reversible.operator import Operator, ReversibleOperator, Streams
from revdist.reversible.replay import Replay

Increment = Callable[[nn.Module, float, float, Tensor], Tensor]
"""Psi(f, t, h, z): the change of z over a step h from t on, by an explicit method."""


def euler(f: nn.Module, t: float, h: float, z: Tensor) -> Tensor:
    """First order, one evaluation."""
    return f(t, z) * h  # type: ignore[no-any-return]


def midpoint(f: nn.Module, t: float, h: float, z: Tensor) -> Tensor:
    """Second order, two evaluations."""
    return f(t + h / 2, z + f(t, z) * (h / 2)) * h  # type: ignore[no-any-return]


def rk4(f: nn.Module, t: float, h: float, z: Tensor) -> Tensor:
    """Fourth order, four evaluations (Kutta 1901)."""
    k1 = f(t, z)
    k2 = f(t + h / 2, z + k1 * (h / 2))
    k3 = f(t + h / 2, z + k2 * (h / 2))
    k4 = f(t + h, z + k3 * h)
    return (k1 + 2 * k2 + 2 * k3 + k4) * (h / 6)  # type: ignore[no-any-return]


INCREMENTS: dict[str, Increment] = {"euler": euler, "midpoint": midpoint, "rk4": rk4}


@final
class ReversibleODE(ReversibleOperator):
    """The pair at `t1` from the pair at `t0`, in `num_steps` steps; each pair is two tensors of z's shape.

    f: called as f(t, z) with a float t, returns dz/dt
    damping: eta of ALF, in (0, 1] without 1/2; 1 is undamped
    mixing: lam of McCallum-Foster, in (0, 1]
    increment: Psi of McCallum-Foster, "euler", "midpoint" or "rk4"

    Raises UsageError for what cannot be.
    """

    num_streams: ClassVar[int] = 2

    def __init__(
        self,
        f: nn.Module,
        num_steps: int,
        *,
        t0: float = 0.0,
        t1: float = 1.0,
        method: Literal["alf", "mccallum_foster"] = "alf",
        damping: float = 1.0,
        mixing: float = 0.99,
        increment: Literal["euler", "midpoint", "rk4"] = "midpoint",
    ) -> None:
        super().__init__()
        if method not in ("alf", "mccallum_foster"):
            raise UsageError(f"method {method!r} is neither 'alf' nor 'mccallum_foster'")
        if num_steps < 1:
            raise UsageError(f"num_steps must be at least 1, not {num_steps}")
        if not 0 < damping <= 1 or damping == 0.5:
            raise UsageError(f"damping {damping} must lie in (0, 1] and not be 1/2, at which nothing of v is left")
        if not 0 < mixing <= 1:
            raise UsageError(f"mixing {mixing} must lie in (0, 1]")
        if increment not in INCREMENTS:
            raise UsageError(f"increment {increment!r} is none of {', '.join(INCREMENTS)}")
        self.f = f
        self.num_steps, self.t0, self.t1, self.method = num_steps, t0, t1, method
        self.damping, self.mixing, self.increment = damping, mixing, increment

    def start(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The pair at t0: z with its velocity for ALF, z twice for McCallum-Foster."""
        return (z, self.f(self.t0, z)) if self.method == "alf" else (z, z)

    def forward(self, *streams: Tensor) -> Streams:
        for operator in self.operators(""):
            streams = operator.forward(streams)
        return streams

    def inverse(self, *streams: Tensor) -> Streams:
        for operator in reversed(self.operators("")):
            streams = operator.inverse(streams)
        return streams

    def operators(self, name: str) -> tuple[Operator, ...]:
        h = (self.t1 - self.t0) / self.num_steps
        times = [self.t0 + index * h for index in range(self.num_steps)]
        names = [f"{name}.step{index}" for index in range(self.num_steps)]
        if self.method == "alf":
            return tuple(_Leapfrog(step, self, t, h) for step, t in zip(names, times, strict=True))
        halves = (
            (_Half(step + ".y", self, t, h), _Back(step + ".z", self, t + h, -h))
            for step, t in zip(names, times, strict=True)
        )
        return tuple(half for pair in halves for half in pair)

    def extra_repr(self) -> str:
        return f"num_steps={self.num_steps}, t0={self.t0:g}, t1={self.t1:g}, method={self.method!r}"


class _Part(Operator):
    """A part of a step: evaluates f once or more at one place and is linear in everything else."""

    def __init__(self, name: str, ode: ReversibleODE, t: float, h: float) -> None:
        super().__init__(name, num_streams=2, modes=(Mode.SAVE, Mode.INVERT, Mode.OFFLOAD))
        self._ode, self._t, self._h = ode, t, h

    @property
    def module(self) -> nn.Module:
        return self._ode.f

    @abc.abstractmethod
    def place(self, outputs: Streams) -> Tensor:
        """Where the forward evaluated f, from its outputs."""

    @abc.abstractmethod
    def evaluate(self, place: Tensor) -> Tensor:
        """f, or Psi, there."""

    @abc.abstractmethod
    def undo(self, outputs: Streams, place: Tensor, value: Tensor) -> Streams:
        """The inputs, from the outputs and what f was."""

    def inverse(self, outputs: Streams) -> Streams:
        place = self.place(outputs)
        return self.undo(outputs, place, self.evaluate(place))

    def rebuild(self, outputs: Streams, replay: Replay) -> Streams:
        with torch.no_grad():
            place = self.place(outputs)
        with replay.capturing():
            value = self.evaluate(self.leaf(place, replay))
        with torch.no_grad():
            return self.undo(outputs, place, value)

    @abc.abstractmethod
    def leaf(self, place: Tensor, replay: Replay) -> Tensor:
        """The place as the start of a graph, requiring grad where the forward's did."""


@final
class _Leapfrog(_Part):
    """One ALF step of (z, v)."""

    def forward(self, inputs: Streams) -> Streams:
        z, v = inputs
        middle = torch.add(z, v, alpha=self._h / 2)
        v = v * (1 - 2 * self._ode.damping) + self.evaluate(middle) * (2 * self._ode.damping)
        return torch.add(middle, v, alpha=self._h / 2), v

    def place(self, outputs: Streams) -> Tensor:
        z, v = outputs
        return torch.sub(z, v, alpha=self._h / 2)

    def evaluate(self, place: Tensor) -> Tensor:
        return self._ode.f(self._t + self._h / 2, place)  # type: ignore[no-any-return]

    def undo(self, outputs: Streams, place: Tensor, value: Tensor) -> Streams:
        v = (outputs[1] - value * (2 * self._ode.damping)) / (1 - 2 * self._ode.damping)
        return torch.sub(place, v, alpha=self._h / 2), v

    def leaf(self, place: Tensor, replay: Replay) -> Tensor:
        leaves = [replay.leaf(place, index) for index in (0, 1)]
        return leaves[0] if leaves[0].requires_grad else leaves[1]


class _Increment(_Part):
    """A half of a McCallum-Foster step: Psi of one of the pair changes the other."""

    kept: ClassVar[int]

    def place(self, outputs: Streams) -> Tensor:
        return outputs[self.kept]

    def evaluate(self, place: Tensor) -> Tensor:
        return INCREMENTS[self._ode.increment](self._ode.f, self._t, self._h, place)

    def leaf(self, place: Tensor, replay: Replay) -> Tensor:
        return replay.leaf(place, self.kept)


@final
class _Half(_Increment):
    """y' = lam y + (1 - lam) z + Psi(t, h, z)."""

    kept = 1

    def forward(self, inputs: Streams) -> Streams:
        y, z = inputs
        return torch.lerp(z, y, self._ode.mixing) + self.evaluate(z), z

    def undo(self, outputs: Streams, place: Tensor, value: Tensor) -> Streams:
        mixed = outputs[0] - value
        return torch.add(mixed, place, alpha=self._ode.mixing - 1) / self._ode.mixing, place


@final
class _Back(_Increment):
    """z' = z - Psi(t + h, -h, y')."""

    kept = 0

    def forward(self, inputs: Streams) -> Streams:
        y, z = inputs
        return y, z - self.evaluate(y)

    def undo(self, outputs: Streams, place: Tensor, value: Tensor) -> Streams:
        return place, outputs[1] + value

"""Does an operator truly invert? The checks to run on a class of one's own before training with it.

    report = revdist.check(MyOperator(), torch.randn(8, 16, 32, 32))
    print(report)

Each check stands for a way in which reversible code goes wrong without saying so: an inverse that
is not one, that holds in eval() only, that loses bits, edits its argument, or depends on chance
that no one can replay.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from revdist.errors import ReversibleError, UsageError
from revdist.planning.costs import Mode
from revdist.reversible.adapters import adapt
from revdist.reversible.buffers import filled_slots, put_back
from revdist.reversible.chain import ReversibleChain
from revdist.reversible.grid import exact_below, on_grid
from revdist.reversible.operator import ReversibleOperator, Streams
from revdist.reversible.replay import inside_operator

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Largest relative L2 error that counts as inverting, by the type of the sample."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What was found. `str()` says it in sentences."""

    name: str
    """Class of the operator."""
    problems: tuple[str, ...]
    """What is wrong, a sentence each; empty where the operator can be trained with."""
    deterministic: bool
    """Whether the forward gives the same bits again under the same random state."""
    reconstruction_error: float
    """Relative L2 distance of the rebuilt input; infinite where there is none."""
    gradient_error: float | None
    """Relative L2 distance between the gradients of INVERT and plain autograd; none where not compared."""

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        if self.ok:
            return (
                f"{self.name} inverts: its rebuilt input is off by {self.reconstruction_error:.1e}, "
                f"its gradients by {self.gradient_error or 0:.1e} (relative)"
            )
        return "\n".join([f"{self.name} cannot be trained reversibly as it is:", *(f"- {p}" for p in self.problems)])


def check(operator: nn.Module, sample: Tensor | tuple[Tensor, ...], *, tolerance: float | None = None) -> Check:
    """Try an operator on a sample, and leave both as they were.

    operator: a ReversibleOperator, or any module with `forward` and `inverse`
    sample: an input as it occurs in training, a tensor or a pair; a tensor for an operator of two
      halves is halved along dimension 1; for one with a grid it is rounded to the grid
    tolerance: largest relative error that counts as inverting; none: by the type of the sample

    What `forward` itself raises passes. Raises UsageError for a sample without floating-point values.
    """
    streams = (sample,) if isinstance(sample, Tensor) else tuple(sample)
    if not all(stream.is_floating_point() for stream in streams):
        raise UsageError("the sample must hold floating-point values: those are what an operator maps")
    name = type(operator).__name__
    if not callable(getattr(operator, "inverse", None)):
        problem = "it has no method `inverse`: give it one that returns the input of `forward` from its output"
        return Check(
            name=name, problems=(problem,), deterministic=True, reconstruction_error=math.inf, gradient_error=None
        )
    reversible = adapt(operator, num_streams=len(streams))
    if reversible.num_streams == 2 and len(streams) == 1:
        streams = tuple(streams[0].chunk(2, dim=1))
    if (grid := getattr(operator, "grid", None)) is not None:
        streams = tuple(on_grid(stream, grid) for stream in streams)
    if tolerance is None:
        tolerance = TOLERANCES.get(streams[0].dtype, 1e-4)
    examination = _Examination(reversible, streams, tolerance)
    examination.run()
    return Check(
        name=name,
        problems=tuple(examination.problems),
        deterministic=examination.deterministic,
        reconstruction_error=examination.reconstruction_error,
        gradient_error=examination.gradient_error,
    )


class _Examination:
    def __init__(self, operator: ReversibleOperator, inputs: Streams, tolerance: float) -> None:
        self.operator = operator
        self.inputs = tuple(stream.detach() for stream in inputs)
        self.tolerance = tolerance
        self.problems: list[str] = []
        self.deterministic = True
        self.reconstruction_error = math.inf
        self.gradient_error: float | None = None

    def run(self) -> None:
        with torch.no_grad(), _unchanged(self.operator):
            outputs = self._forward()
            rebuilt = self._inverse(outputs) if not self.problems else None
        if rebuilt is None:
            return
        self.reconstruction_error = _distance(rebuilt, self.inputs)
        if problem := self._beyond_the_grid(_streams(outputs)):
            self.problems.append(problem)
        elif self.reconstruction_error > self.tolerance or math.isnan(self.reconstruction_error):
            self.problems.append(self._why_wrong())
        if self.deterministic and not self.problems:
            self._compare_gradients()

    def _forward(self) -> Streams:
        given = tuple(stream.clone() for stream in self.inputs)
        torch.manual_seed(0)
        with _unchanged(self.operator):
            outputs = self.operator(*given)
        if any(not torch.equal(one, other) for one, other in zip(given, self.inputs, strict=True)):
            self.problems.append("forward edits its input in place: what came before loses its output; work on a copy")
        torch.manual_seed(0)
        again = self.operator(*(stream.clone() for stream in self.inputs))
        if self._fits("forward", outputs, self.operator.num_streams) and self._fits("forward", again, len(given)):
            outputs, again = _streams(outputs), _streams(again)
            self._look_at_outputs(outputs, again)
        return cast(Streams, again)

    def _look_at_outputs(self, outputs: Streams, again: Streams) -> None:
        if not all(torch.isfinite(out).all() for out in outputs):
            self.problems.append("forward gives infinite or undefined values for this sample")
        elif any(not torch.equal(one, other) for one, other in zip(outputs, again, strict=True)):
            self.deterministic = False
            self.problems.append(
                f"forward is not deterministic: run twice under the same random state, its outputs differ by "
                f"{_distance(again, outputs):.1e}; draw from torch's generators, and keep no state between calls"
            )
        for out, given in zip(outputs, self.inputs, strict=True):
            if torch.finfo(out.dtype).bits < torch.finfo(given.dtype).bits:
                self.problems.append(
                    f"forward turns {given.dtype} into {out.dtype}: bits that the output lacks cannot be rebuilt; "
                    f"return {given.dtype}"
                )

    def _inverse(self, outputs: Streams) -> Streams | None:
        given = tuple(out.clone() for out in outputs)
        torch.manual_seed(0)
        try:
            rebuilt = self.operator.inverse(*given)
        except Exception as error:  # whatever a user's code raises is what is wrong with it
            self.problems.append(f"inverse raised {type(error).__name__}: {error}")
            return None
        if any(not torch.equal(one, other) for one, other in zip(given, outputs, strict=True)):
            self.problems.append(
                "inverse edits its argument in place: the next operator still needs it; work on a copy"
            )
        if not self._fits("inverse", rebuilt, len(self.inputs)):
            return None
        for one, other in zip(_streams(rebuilt), self.inputs, strict=True):
            if one.shape != other.shape:
                self.problems.append(
                    f"inverse returns the shape {tuple(one.shape)} for an input of {tuple(other.shape)}"
                )
                return None
        return _streams(rebuilt)

    def _fits(self, method: str, value: Any, expected: int) -> bool:
        streams = _streams(value)
        if len(streams) == expected and all(isinstance(stream, Tensor) for stream in streams):
            return True
        wanted = "one tensor" if expected == 1 else f"{expected} tensors"
        self.problems.append(f"{method} returns {_described(value)}, not {wanted}: set num_streams to what it takes")
        return False

    def _beyond_the_grid(self, outputs: Streams) -> str:
        """Why an operator with a grid is not exact for this sample; empty where it is."""
        grid = getattr(self.operator, "grid", None)
        if grid is None or self.reconstruction_error == 0:
            return ""
        largest = max(float(stream.abs().max()) for stream in (*self.inputs, *outputs))
        limit = exact_below(grid, outputs[0].dtype)
        if largest < limit:
            return ""
        return (
            f"the sample leaves the range of its grid: values up to {largest:.3g}, exact below {limit:g} on multiples "
            f"of {grid:g}; its rebuilt input is off by {self.reconstruction_error:.1e}; use a coarser one, or normalise"
        )

    def _why_wrong(self) -> str:
        found = f"the rebuilt input is off by {self.reconstruction_error:.1e} (tolerance {self.tolerance:.0e})"
        if self.operator.training and self._error_elsewhere(training=False) <= self.tolerance:
            return (
                f"{found} in train(), but not in eval(): something on the way from input to output uses the batch's "
                "statistics or drops values; note the statistics (revdist.reversible.noted), or move it into a branch"
            )
        if self.inputs[0].dtype != torch.float64:
            in_double = self._error_elsewhere(double=True)
            if in_double < 1e-3 * self.reconstruction_error:
                factor = self.reconstruction_error / torch.finfo(self.inputs[0].dtype).eps
                return (
                    f"{found}, but by {in_double:.1e} in float64: the mathematics is right and rounding is magnified "
                    f"about {factor:.0e}-fold; bound its scales, or keep runs of INVERT short"
                )
        return f"{found}: inverse does not undo forward"

    def _error_elsewhere(self, *, training: bool | None = None, double: bool = False) -> float:
        """The reconstruction error in evaluation or in double precision; infinite where that cannot be tried."""
        try:
            twin = copy.deepcopy(self.operator)
            twin = twin.double() if double else twin
            inputs = tuple(stream.double() if double else stream.clone() for stream in self.inputs)
            if training is not None:
                twin.train(training)
            with torch.no_grad(), torch.random.fork_rng():
                torch.manual_seed(0)
                outputs = _streams(twin(*inputs))
                torch.manual_seed(0)
                error = _distance(_streams(twin.inverse(*outputs)), inputs)
        except Exception:
            return math.inf
        return error if math.isfinite(error) else math.inf

    def _compare_gradients(self) -> None:
        chain = ReversibleChain([self.operator])
        with _unchanged(self.operator):
            expected = self._gradients(chain, plain=True)
        modes = [Mode.INVERT if Mode.INVERT in options else Mode.SAVE for options in chain.options()]
        chain.set_schedule(modes)
        try:
            with _unchanged(self.operator):
                found = self._gradients(chain, plain=False)
        except ReversibleError as error:
            self.problems.append(f"its backward under INVERT fails: {error}")
            return
        self.gradient_error = _distance(found, expected)
        if not self.gradient_error <= 10 * self.tolerance:
            self.problems.append(
                f"its gradients under INVERT are off by {self.gradient_error:.1e}, though its input is rebuilt: "
                "something in forward changes much with little of its input (a choice, a norm of nearly nothing)"
            )

    def _gradients(self, chain: ReversibleChain, *, plain: bool) -> Streams:
        torch.manual_seed(0)
        leaves = tuple(stream.clone().requires_grad_() for stream in self.inputs)
        with inside_operator() if plain else contextlib.nullcontext():
            outputs = _streams(chain(leaves[0] if len(leaves) == 1 else (leaves[0], leaves[1])))
        sources = [*leaves, *(p for p in chain.parameters() if p.requires_grad)]
        cotangents = [torch.randn_like(out) for out in outputs]
        gradients = torch.autograd.grad(outputs, sources, cotangents, allow_unused=True, materialize_grads=True)
        return tuple(gradients)


@contextlib.contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Afterwards buffers and torch's random state are what they were before."""
    slots = filled_slots(module)
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    with torch.random.fork_rng(devices=_cuda_devices(module)):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            put_back(slots)


def _cuda_devices(module: nn.Module) -> list[int]:
    return sorted({p.device.index or 0 for p in module.parameters() if p.device.type == "cuda"})


def _streams(value: Any) -> Streams:
    return (value,) if isinstance(value, Tensor) or not isinstance(value, tuple | list) else tuple(value)


def _described(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"{len(value)} values"
    return "one tensor" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _distance(found: Streams, expected: Streams) -> float:
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, expected, strict=True))
    size = sum(float(b.double().square().sum()) for b in expected)
    return float(math.sqrt(difference / size)) if size else math.sqrt(difference)

"""The planners' schedules carried out: step time and peak of real networks at equal budgets, side by side.

One profile of the network is what every planner plans with. Plans of modes run on the chain; plans of
checkpoint planners run on torch.utils.checkpoint, nested where the plan is. All steps take turns.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
import tempfile
import time
import types
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.heap import keep_freed_memory
from benchmarks.planners.checkpointing import CheckpointPlanner, EverySquareRoot, Plan, Rotor
from benchmarks.planners.families import Chain
from benchmarks.planners.plan_runner import PlanRunner, save_all
from benchmarks.planners.solvers import (
    AllInvert,
    AllSave,
    PaperKnapsack,
    Planner,
    Revdist,
    TorchDynamic,
    TorchGreedy,
    TorchInteger,
)
from revdist.devices import MemoryMeter, open_device
from revdist.models.revnet import revnet38, revnet164
from revdist.planning.costs import Mode, Profile
from revdist.planning.frontier import solve
from revdist.reversible.chain import ReversibleChain, find_chain
from revdist.reversible.couplings import Coupling
from revdist.reversible.operator import ReversibleOperator
from revdist.reversible.profiler import profile_chain

NUM_BUDGETS = 5
REPEATS = 9
FORWARD_REPEATS = 5
CAPACITY_BYTES = 8 * 2**30
PIXELS, CLASSES = 32, 10
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "RevNet-38": (revnet38, 24),
    "RevNet-164": (revnet164, 12),
}
"""How each is built, and its batch. With fewer images the cost of Python for each operator outweighs its kernels."""
COMPILED = "torch.compile, activation_memory_budget"
COMPILED_SHARES = (1.0, 0.8, 0.6, 0.4, 0.2)
"""Its budgets are fractions, not bytes."""


PART_SHARE = 0.8
"""The fraction for branches and layers that are compiled one by one: what is cheap is computed anew within them."""
RECOMPILE_LIMIT = 64
"""Code that torch keeps for one function: every shape and type of branch, and every fraction, has its own."""


class RevdistOffload(Revdist):
    name = "revdist, with OFFLOAD"


class RevdistCompiled(Revdist):
    name = "revdist, parts compiled, channels last"


ON_DEVICE = (Mode.SAVE, Mode.INVERT, Mode.RECOMPUTE)
PLANNERS: tuple[tuple[type[Planner], tuple[Mode, ...]], ...] = (
    (Revdist, ON_DEVICE),
    (RevdistOffload, tuple(Mode)),
    (PaperKnapsack, ON_DEVICE),
    (TorchDynamic, ON_DEVICE),
    (TorchInteger, ON_DEVICE),
    (TorchGreedy, ON_DEVICE),
    (Rotor, ON_DEVICE),
    (EverySquareRoot, ON_DEVICE),
    (AllInvert, ON_DEVICE),
    (AllSave, ON_DEVICE),
)
"""Each with the modes that it is shown; knapsacks look at the first two of each operator."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """One planner's plan for one budget of one network, carried out."""

    network: str
    planner: str
    budget_bytes: int
    peak_bytes: int
    """Measured, over parameters and gradients; the batch included."""
    step_s: float
    """Median CPU seconds of a step."""
    ratio: float
    """To revdist's step at the same budget, median over rounds; 1 for revdist."""
    checkpoints: bool
    """Whether it runs on torch.utils.checkpoint."""

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.budget_bytes


@dataclasses.dataclass(slots=True)
class _Variant:
    """One way to run the network, whichever planners came upon it."""

    step: Callable[[], None]
    seconds: list[float] = dataclasses.field(default_factory=list)
    peak_bytes: int = 0


def execute(
    networks: Sequence[str], rounds: int, say: Callable[[str], None], *, compiled: bool = False
) -> list[Execution]:
    """Every planner's plans on networks. compiled: torch.compile's beside them, some 100 s each."""
    found: list[Execution] = []
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        device = open_device(name="executed", capacity_bytes=CAPACITY_BYTES, directory=folder)
        device.activate()
        for name in networks:
            found += _Subject(name, device.meter(), say).run(rounds, compiled=compiled)
        device.deactivate()
    return found


_Asked = tuple[type[Planner], int, Hashable]
"""A planner, a budget, and the key of the variant that carries its plan out."""


class _Subject:
    """One network with its profile."""

    def __init__(self, name: str, meter: MemoryMeter, say: Callable[[str], None], *, compiled: bool = False) -> None:
        """compiled: branches and layers, in the layout that torch.compile chooses for a whole network."""
        build, batch = NETWORKS[name]
        torch.manual_seed(0)
        self.name = name
        self.model = build()
        self.images = torch.randn(batch, 3, PIXELS, PIXELS)
        if compiled:
            self.images = self.images.to(memory_format=torch.channels_last)
            _compile_parts(self.model.to(memory_format=torch.channels_last))
        self.chain = find_chain(self.model)
        self.target = torch.arange(batch) % CLASSES
        self.meter = meter
        self.say = say
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        say(f"{name}: profile" + (" of compiled parts" if compiled else ""))
        self.profile = profile_chain(
            self.model, self.images, self._loss, meter=meter, repeats=REPEATS, host_clock=time.process_time
        )
        self.boundary_bytes, self.forward_s = _forward_costs(self.chain, self.images)
        self.variants: dict[Hashable, _Variant] = {}

    def run(self, rounds: int, *, compiled: bool) -> Iterator[Execution]:
        asked = list(self._ask(PLANNERS, self._budgets()))
        if compiled:
            with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
                asked += self._compile()
        draw = random.Random(0)
        for number in range(rounds + 1):
            self.say(f"{self.name}: round {number} of {rounds}")
            for variant in draw.sample(list(self.variants.values()), len(self.variants)):
                self._measure(variant, warm_up=number == 0)
        return self._executions(asked, compiled)

    def _budgets(self) -> list[int]:
        frontier = solve(_shown(self.profile, ON_DEVICE))
        low, high = frontier.minimum_bytes, frontier.maximum_bytes
        return [low + (high - low) * number // (NUM_BUDGETS + 1) for number in range(1, NUM_BUDGETS + 1)]

    def _compile(self) -> list[_Asked]:
        """What torch.compile does with the whole network; and revdist with branches that it compiled."""
        for share in COMPILED_SHARES:
            self.say(f"{self.name}: compile for {share}")
            self.variants[COMPILED, share] = _Variant(self._compiled(share))
        with torch._functorch.config.patch(activation_memory_budget=PART_SHARE):
            other = _Subject(self.name, self.meter, self.say, compiled=True)
        asked = list(other._ask(((RevdistCompiled, ON_DEVICE),), self._budgets()))
        self.variants |= {(RevdistCompiled.name, key): variant for key, variant in other.variants.items()}
        return [(kind, budget, (RevdistCompiled.name, key)) for kind, budget, key in asked]

    def _ask(
        self, planners: Sequence[tuple[type[Planner], tuple[Mode, ...]]], budgets: Sequence[int]
    ) -> Iterator[_Asked]:
        """Every planner for every budget: with the key of the variant that carries its plan out."""
        for kind, modes in planners:
            self.say(f"{self.name}: {kind.name}")
            profile = _shown(self.profile, modes)
            planner = kind(
                Chain(
                    family=self.name,
                    profile=profile,
                    boundary_bytes=self.boundary_bytes,
                    forward_s=self.forward_s,
                ),
                max(budgets),
            )
            for budget in budgets:
                plan = planner.solve(budget)
                if plan is not None:
                    yield kind, budget, self._variant(plan)

    def _variant(self, plan: object) -> Hashable:
        key: Hashable
        if isinstance(plan, Plan):
            key = plan
            self.variants.setdefault(key, _Variant(self._stepping(PlanRunner(self.chain, plan))))
        else:
            key = tuple(plan)  # type: ignore[arg-type]
            self.variants.setdefault(key, _Variant(self._scheduled(key)))
        return key

    def _scheduled(self, modes: tuple[Mode, ...]) -> Callable[[], None]:
        step = self._stepping(self.model)

        def scheduled() -> None:
            self.chain.set_schedule(modes)
            step()

        return scheduled

    def _compiled(self, share: float) -> Callable[[], None]:
        """A step compiled for a fraction, which torch looks at when it makes the code: no other may get that."""
        runner = PlanRunner(self.chain, save_all(0, self.chain.num_operators))
        step = self._stepping(torch.compile(_with_own_code(runner, f"share_{COMPILED_SHARES.index(share)}")))
        with torch._functorch.config.patch(activation_memory_budget=share):
            step()
        return step

    def _stepping(self, model: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        return lambda: self._loss(model(self.images)).backward()

    def _loss(self, output: Tensor) -> Tensor:
        return F.cross_entropy(output, self.target)

    def _measure(self, variant: _Variant, *, warm_up: bool) -> None:
        before = self.meter.allocated_bytes() - self.images.untyped_storage().nbytes()
        self.meter.reset_peak()
        started_s = time.process_time()
        variant.step()
        step_s = time.process_time() - started_s
        if not warm_up:
            variant.seconds.append(step_s)
            variant.peak_bytes = max(variant.peak_bytes, self.meter.peak_bytes() - before)

    def _executions(self, asked: Sequence[_Asked], compiled: bool) -> Iterator[Execution]:
        ours = {budget: self.variants[key] for kind, budget, key in asked if kind is Revdist}
        for kind, budget, key in asked:
            checkpoints = issubclass(kind, CheckpointPlanner)
            yield self._execution(kind.name, budget, self.variants[key], ours[budget], checkpoints=checkpoints)
        if compiled:  # every fraction beside every budget: it fits where its peak does
            for share in COMPILED_SHARES:
                for budget, own in ours.items():
                    name = f"{COMPILED} {share}"
                    yield self._execution(name, budget, self.variants[COMPILED, share], own, checkpoints=False)

    def _execution(
        self, planner: str, budget: int, variant: _Variant, own: _Variant, *, checkpoints: bool
    ) -> Execution:
        ratios = [one / other for one, other in zip(variant.seconds, own.seconds, strict=True)]
        return Execution(
            network=self.name,
            planner=planner,
            budget_bytes=budget,
            peak_bytes=variant.peak_bytes,
            step_s=statistics.median(variant.seconds),
            ratio=statistics.median(ratios),
            checkpoints=checkpoints,
        )


def _compile_parts(model: nn.Module) -> None:
    """Branches of couplings, and the layers between them, each by itself: the chain still plans them."""
    for module in list(model.modules()):
        if isinstance(module, Coupling):
            for name in module.branch_names:
                setattr(module, name, torch.compile(getattr(module, name)))
        elif isinstance(module, ReversibleChain):
            for name, child in list(module.named_children()):
                if not isinstance(child, ReversibleOperator):
                    setattr(module, name, torch.compile(child))


def _with_own_code(runner: PlanRunner, name: str) -> Callable[[Tensor], Tensor]:
    """The runner as a function whose compiled code nothing else is given."""

    def run(images: Tensor) -> Tensor:
        return runner(images)

    return types.FunctionType(run.__code__.replace(co_name=name), run.__globals__, name, None, run.__closure__)


def _shown(profile: Profile, modes: Sequence[Mode]) -> Profile:
    """The profile with these modes alone; SAVE stands first and the thriftiest that it has second."""
    options = tuple(tuple(option for option in choices if option.mode in modes) for choices in profile.options)
    return dataclasses.replace(profile, options=options)


def _forward_costs(chain: ReversibleChain, images: Tensor) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Per operator, bytes of its output and CPU seconds of its forward."""
    sizes: list[int] = []
    runs: list[list[float]] = []
    for _ in range(FORWARD_REPEATS):
        sizes, seconds = [], []
        streams: tuple[Tensor, ...] = (images,)
        for operator in chain.operators:
            streams = PlanRunner.entering(chain, operator, streams)
            started_s = time.process_time()
            streams = tuple(stream.detach() for stream in operator.forward(streams))
            seconds.append(time.process_time() - started_s)
            sizes.append(sum(stream.numel() * stream.element_size() for stream in streams))
        runs.append(seconds)
    return tuple(sizes), tuple(statistics.median(times) for times in zip(*runs, strict=True))

"""What each reversible operator costs kept and rebuilt, and an ODE beside the adjoint of torchdiffeq.

    .venv-bench/bin/python benchmarks/operators.py      (after `make bench` has made the environment)
    python benchmarks/operators.py                      without torchdiffeq, whose rows are left out

Every variant steps once in each round, in turn. Time is process CPU time, peak what the CPU
allocator handed out during a step above what it held before (parameters not included).
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.page import page
from benchmarks.provenance import RESULTS, provenance
from benchmarks.table import Table
from revdist import Mode
from revdist.devices import MemoryMeter, open_device
from revdist.models.ode_classifier import Field
from revdist.reversible import (
    AdditiveCoupling,
    AffineCoupling,
    ChunkedFeedForward,
    InPlaceABN,
    InvertibleConv1x1,
    InvertibleConv2d,
    LSHAttention,
    MomentumBlock,
    ReversibleChain,
    ReversibleODE,
)

CHANNELS, SIZE, BATCH = 32, 32, 8
"""Channels of a half, pixels of a side, images in a batch."""
WIDTH, LENGTH = 64, 512
"""Of sequences, four in a batch."""
ODE_STEPS = 8


@dataclasses.dataclass(slots=True)
class Variant:
    """One way to run something: a step returns its gradients."""

    label: str
    step: Callable[[], Sequence[Tensor]]
    times_s: list[float] = dataclasses.field(default_factory=list)
    peaks_bytes: list[int] = dataclasses.field(default_factory=list)
    gradients: Sequence[Tensor] = ()

    @property
    def time_s(self) -> float:
        return statistics.median(self.times_s)

    @property
    def peak_mib(self) -> float:
        return statistics.median(self.peaks_bytes) / 2**20


def measure(variants: Sequence[Variant], meter: MemoryMeter, rounds: int) -> None:
    """Run all variants in turn; the first round warms up and keeps the gradients."""
    for index in range(rounds + 1):
        for variant in variants:
            gc.collect()
            before = meter.allocated_bytes()
            meter.reset_peak()
            started_s = time.process_time()
            gradients = variant.step()
            if index:
                variant.times_s.append(time.process_time() - started_s)
                variant.peaks_bytes.append(meter.peak_bytes() - before)
            else:
                variant.gradients = gradients
            del gradients


def branch(channels: int, outputs: int | None = None) -> nn.Sequential:
    """BN-ReLU-Conv3x3 twice."""
    layers: list[nn.Module] = []
    for out in (channels, outputs or channels):
        layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, out, 3, padding=1)]
    return nn.Sequential(*layers)


def reformer(num_chunks: int) -> nn.Module:
    feed_forward = ChunkedFeedForward(WIDTH, 4 * WIDTH, num_chunks=num_chunks)
    attention = nn.Sequential(nn.LayerNorm(WIDTH), LSHAttention(WIDTH, 4))
    return AdditiveCoupling(attention, nn.Sequential(nn.LayerNorm(WIDTH), feed_forward))


def image() -> Tensor:
    return torch.randn(BATCH, 2 * CHANNELS, SIZE, SIZE)


def halves() -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, CHANNELS, SIZE, SIZE), torch.randn(BATCH, CHANNELS, SIZE, SIZE)


def sequences() -> tuple[Tensor, Tensor]:
    return torch.randn(4, LENGTH, WIDTH), torch.randn(4, LENGTH, WIDTH)


C = CHANNELS
OPERATORS: dict[str, tuple[Callable[[], list[nn.Module]], Callable[[], Any]]] = {
    "6 AdditiveCoupling": (lambda: [AdditiveCoupling(branch(C), branch(C)) for _ in range(6)], image),
    "6 AffineCoupling": (lambda: [AffineCoupling(branch(C, 2 * C), branch(C, 2 * C)) for _ in range(6)], image),
    "6 MomentumBlock": (lambda: [MomentumBlock(branch(C)) for _ in range(6)], halves),
    "6 MomentumBlock, exact": (lambda: [MomentumBlock(branch(C), grid=2**-12) for _ in range(6)], halves),
    "6 InvertibleConv1x1": (lambda: [InvertibleConv1x1(2 * C) for _ in range(6)], image),
    "4 InvertibleConv2d, circular": (lambda: [InvertibleConv2d(2 * C) for _ in range(4)], image),
    "4 InvertibleConv2d, masked": (lambda: [InvertibleConv2d(2 * C, padding="masked") for _ in range(4)], image),
    "4 Conv2d + InPlaceABN": (
        lambda: [m for _ in range(4) for m in (nn.Conv2d(2 * C, 2 * C, 3, padding=1), InPlaceABN(2 * C))],
        image,
    ),
    "ReversibleODE, ALF, 8 steps": (lambda: [ReversibleODE(Field(C), ODE_STEPS)], halves),
    "ReversibleODE, McCallum-Foster, 4 steps": (
        lambda: [ReversibleODE(Field(C), ODE_STEPS // 2, method="mccallum_foster")],
        halves,
    ),
    "3 Reformer blocks": (lambda: [reformer(1) for _ in range(3)], sequences),
    "3 Reformer blocks, 8 chunks": (lambda: [reformer(8) for _ in range(3)], sequences),
}


def chain_step(chain: ReversibleChain, inputs: Any, mode: Mode) -> Callable[[], Sequence[Tensor]]:
    """A forward and backward with `mode` wherever it is offered."""
    schedule = [mode if mode in modes else Mode.SAVE for modes in chain.options()]
    parameters = list(chain.parameters())

    def step() -> Sequence[Tensor]:
        torch.manual_seed(0)
        chain.set_schedule(schedule)
        outputs = chain(inputs)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        loss = sum(out.square().mean() for out in outputs)
        del outputs
        return torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)

    return step


def measure_operators(meter: MemoryMeter, rounds: int) -> Table:
    """SAVE against INVERT for each operator."""
    rows = []
    for label, (make, inputs) in OPERATORS.items():
        torch.manual_seed(0)
        chain, given = ReversibleChain(make(), split_dim=1 if inputs is image else -1), inputs()
        save, invert = (Variant(mode, chain_step(chain, given, mode)) for mode in (Mode.SAVE, Mode.INVERT))
        measure([save, invert], meter, rounds)
        rows.append(
            [
                label,
                f"{save.time_s * 1e3:.0f}",
                f"{invert.time_s / save.time_s:.2f}",
                f"{save.peak_mib:.1f}",
                f"{invert.peak_mib:.1f}",
                f"{relative_error(invert.gradients, save.gradients):.0e}",
            ]
        )
    columns = ["chain", "SAVE ms", "INVERT / SAVE", "SAVE peak MiB", "INVERT peak MiB", "gradient error"]
    return Table(title="Operators: kept and rebuilt", columns=columns, rows=rows)


def measure_odes(meter: MemoryMeter, rounds: int) -> Table:
    """One vector field, eight steps, by reversible steps and by torchdiffeq."""
    torch.manual_seed(0)
    field, z = Field(CHANNELS), halves()[0]
    variants = []
    for method, num_steps in (("alf", ODE_STEPS), ("mccallum_foster", ODE_STEPS)):
        ode = ReversibleODE(field, num_steps, method=method)
        chain = ReversibleChain([ode])
        for mode in (Mode.SAVE, Mode.INVERT):
            step = ode_step(field, lambda ode=ode, chain=chain: chain(ode.start(z))[0], chain, mode)
            variants.append(Variant(f"revdist {method}, {mode}", step))
    if importlib.util.find_spec("torchdiffeq"):
        import torchdiffeq

        times = torch.tensor([0.0, 1.0])
        settings = {"method": "midpoint", "options": {"step_size": 1 / ODE_STEPS}}
        for label, solve in (
            ("torchdiffeq odeint, midpoint", torchdiffeq.odeint),
            ("torchdiffeq odeint_adjoint, midpoint", torchdiffeq.odeint_adjoint),
        ):
            step = ode_step(field, lambda solve=solve: solve(_Timed(field), z, times, **settings)[1], None, Mode.SAVE)
            variants.append(Variant(label, step))
    measure(variants, meter, rounds)
    references = {variant.label.split(",")[0].replace("_adjoint", ""): variant.gradients for variant in variants[::2]}
    rows = [
        [
            variant.label,
            f"{variant.time_s * 1e3:.0f}",
            f"{variant.peak_mib:.1f}",
            f"{relative_error(variant.gradients, references[variant.label.split(',')[0].replace('_adjoint', '')]):.0e}",
        ]
        for variant in variants
    ]
    columns = ["eight steps", "ms", "peak MiB", "gradient error against plain autograd"]
    return Table(title="Neural ODE: reversible steps and the adjoint", columns=columns, rows=rows)


class _Timed(nn.Module):
    """torchdiffeq gives the time as a tensor; the field fills a channel with a number."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field = field

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        out: Tensor = self.field(t.item(), z)
        return out


def ode_step(
    field: nn.Module, solve: Callable[[], Tensor], chain: ReversibleChain | None, mode: Mode
) -> Callable[[], Sequence[Tensor]]:
    """A forward and backward of one solution."""
    parameters = list(field.parameters())

    def step() -> Sequence[Tensor]:
        if chain is not None:
            chain.set_schedule([mode] * chain.num_operators)
        return torch.autograd.grad(solve().square().mean(), parameters)

    return step


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Relative L2 distance over all gradients together."""
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, expected, strict=True))
    return (difference / sum(float(b.double().square().sum()) for b in expected)) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="steps of each variant")
    today = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
    out = RESULTS / f"operators-{today}.md"
    parser.add_argument("--out", type=Path, default=out, help="Markdown; JSON goes beside it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=None if sys.stdout.isatty() else 150)
    with tempfile.TemporaryDirectory() as folder:
        device = open_device(name="benchmark", capacity_bytes=8 * 2**30, directory=folder)
        device.activate()
        tables = [measure(device.meter(), options.rounds) for measure in (measure_operators, measure_odes)]
    for table in tables:
        console.print(table.for_terminal())
    peers = ["torchdiffeq"] if importlib.util.find_spec("torchdiffeq") else []
    about = provenance(["torch", *peers]) | {"command": "python benchmarks/operators.py", "rounds": options.rounds}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(page("Operators", about, tables), encoding="utf-8")
    rows = {table.title: [dict(zip(table.columns, row, strict=True)) for row in table.rows] for table in tables}
    options.out.with_suffix(".json").write_text(json.dumps(about | rows, indent=1), encoding="utf-8")
    console.print(f"written to {options.out}")


if __name__ == "__main__":
    main()

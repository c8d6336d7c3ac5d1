"""The comparison with other libraries: that it finds what is wrong, and survives how libraries die."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from torch import Tensor, nn

from benchmarks.peers.behaviour import Answer, Probe, Trial, Verdict
from benchmarks.peers.bodies import Plain, Subject
from benchmarks.peers.cost import Cost
from benchmarks.peers.goals import cost_goals
from benchmarks.peers.probes_gradients import PROBES as GRADIENT_PROBES
from benchmarks.peers.probes_state import PROBES as STATE_PROBES
from benchmarks.provenance import ROOT
from benchmarks.table import Table

torch.set_num_threads(1)


def probe(key: str) -> Probe:
    return next(probe for probe in (*GRADIENT_PROBES, *STATE_PROBES) if probe.key == key)


def verdict_of(key: str, build: type[nn.Module]) -> Verdict:
    """Of a runtime in this process: no test may fork once autograd has run."""
    return probe(key).run(Trial(Subject(key="broken", label="broken", distribution="torch", build=build)))


class Detached(Plain):
    """Trains nothing, as a runtime does that hides its parameters from autograd."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x).detach()


class Halved(Plain):
    """Returns a wrong gradient without a word."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return 0.5 * y + 0.5 * y.detach()


class Emptied(Plain):
    """Frees the storage of its input."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x.clone())
        x.untyped_storage().resize_(0)
        return y


class Twice(Plain):
    """Runs every branch a second time in training mode."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            super().forward(x)
        return super().forward(x)


@pytest.mark.parametrize(
    ("key", "build", "detail"),
    [
        ("relu-before", Detached, "24 of 24 gradients are missing"),
        ("relu-before", Halved, "off by 0.5"),
        ("batch-intact", Emptied, "0 bytes left"),
        ("pool-intact", Emptied, "0 bytes left"),
        ("batch-norm", Twice, "updated 2 times"),
    ],
)
def test_a_broken_runtime_is_a_silent_error(key, build, detail):
    verdict = verdict_of(key, build)
    assert verdict.answer is Answer.SILENT
    assert detail in verdict.detail


@pytest.mark.parametrize("key", ["frozen-stem", "dropout", "double-backward", "batch-intact", "batch-norm", "deepcopy"])
def test_plain_autograd_is_right(key):
    assert verdict_of(key, Plain) == Verdict(Answer.YES)


ISOLATED = """
import os, signal, sys, time
import torch
from benchmarks.peers.behaviour import Probe, Trial, Verdict, judge
from benchmarks.peers.bodies import PLAIN
from benchmarks.peers.isolation import call_isolated
{body}
"""


def run(body: str) -> str:
    """In a process of its own, since forking is only safe where autograd has not run."""
    done = subprocess.run(
        [sys.executable, "-c", ISOLATED.format(body=body)], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_crash_an_exception_and_a_hang_are_told_apart():
    out = run(
        "print(call_isolated(lambda: os.kill(os.getpid(), signal.SIGSEGV), timeout_s=20).trouble)\n"
        "print(call_isolated(lambda: 1 / 0, timeout_s=20).trouble)\n"
        "print(call_isolated(lambda: time.sleep(60), timeout_s=0.2).trouble)\n"
        "print(call_isolated(lambda: 3, timeout_s=20).value)\n"
    )
    assert out.splitlines() == [
        "the process died: Segmentation fault",
        "ZeroDivisionError: division by zero",
        "no end within 0 s",
        "3",
    ]


def test_what_a_call_started_ends_with_it(tmp_path):
    marker = tmp_path / "pid"
    out = run(
        "import subprocess\n"
        f"start = lambda: open({str(marker)!r}, 'w').write(str(subprocess.Popen(['sleep', '60']).pid))\n"
        "print(call_isolated(start, timeout_s=20).trouble or 'fine')\n"
    )
    assert out == "fine"
    deadline_s = time.monotonic() + 10
    while _is_alive(int(marker.read_text())):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_a_refusal_is_a_no():
    out = run(
        "def refuse(trial):\n"
        "    raise RuntimeError('not  this\\nway')\n"
        "print(judge(Probe('key', 'question', refuse), PLAIN, timeout_s=20))\n"
    )
    assert "Answer.NO" in out
    assert "RuntimeError: not this way" in out


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


def cost(key: str, *, depth: int = 12, step_s: float = 1.0, peak_bytes: int = 100, gradient_bytes: int = 0) -> Cost:
    return Cost(
        depth=depth,
        key=key,
        label=key,
        step_s=step_s,
        time_ratio=1.0,
        time_ratio_low=1.0,
        time_ratio_high=1.0,
        peak_bytes=peak_bytes,
        peak_ratio=1.0,
        gradient_bytes=gradient_bytes,
        gradient_error=0.0,
    )


def test_goals_compare_with_what_was_measured():
    costs = [
        cost("plain"),
        cost("checkpoint", step_s=1.3, peak_bytes=40),
        cost("memcnn", step_s=2.0),
        cost("revlib", peak_bytes=20),
        cost("revdist-invert", step_s=1.35, peak_bytes=15),
        cost("revdist-budget-1", step_s=1.2, peak_bytes=40),
        cost("revdist-save", step_s=1.02),
    ]
    met = {goal.name: goal.met for goal in cost_goals(costs)}
    assert met == {
        "all-INVERT, time over plain, depth 12": True,
        "all-INVERT, time over memcnn, depth 12": True,
        "slowest schedule, time over checkpoint, depth 12": False,
        "fastest schedule in no more memory, time over checkpoint, depth 12": True,
        "all-SAVE, time over plain, depth 12": True,
        "all-INVERT, peak over plain, depth 12": True,
        "all-INVERT, peak over revlib, depth 12": True,
    }


def test_memory_is_flat_in_depth_apart_from_gradients():
    shallow = [cost("revdist-invert", depth=4, peak_bytes=110, gradient_bytes=10), cost("revdist-save", depth=4)]
    deep = [cost("revdist-invert", depth=50, peak_bytes=250, gradient_bytes=140), cost("revdist-save", depth=50)]
    (goal,) = (goal for goal in cost_goals([*shallow, *deep]) if "activations" in goal.name)
    assert goal.measured == pytest.approx(1.1)
    assert not goal.met


def test_a_table_reads_the_same_in_markdown():
    table = Table(title="Costs", columns=["", "peak"], rows=[["a|b", "1"]])
    assert table.as_markdown() == "### Costs\n\n|  | peak |\n| :--- | ---: |\n| a\\|b | 1 |\n"


@pytest.mark.slow
def test_the_command_writes_its_results(tmp_path):
    command = [sys.executable, "benchmarks/reversible.py", "--parts", "cost", "--depths", "1", "--rounds", "1"]
    done = subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("reversible-*.json")
    result = json.loads(path.read_text())
    assert {"plain", "revdist-invert", "revdist-save"} <= {row["key"] for row in result["costs"]}
    assert result["about"]["versions"]["torch"]
    assert path.with_suffix(".png").stat().st_size > 1000
    assert "| plain autograd |" in path.with_suffix(".md").read_text()

"""Reports of replicas as the lines that a run directory holds and observers see."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from revdist.devices.reading import Reading
from revdist.errors import format_bytes
from revdist.planning.costs import Plan
from revdist.training.reports import EventReport, PlanReport, Score, StepReport
from revdist.training.row import Row


def step_record(report: StepReport, plans: Sequence[Plan | None]) -> dict[str, Any]:
    """A line of metrics.jsonl. plans: per rank, that under which it took the step; None: not known."""
    samples = sum(row.samples for row in report.rows)
    return {
        "time": report.time,
        "step": report.step,
        "epoch": report.epoch,
        "samples": report.samples,
        "loss": report.loss,
        "lr": report.lr,
        "step_s": report.step_s,
        "samples_per_s": samples / report.step_s,
        "pause_s": report.pause_s,
        "ranks": [_rank_record(rank, row, plans[rank]) for rank, row in enumerate(report.rows)],
    }


def event_record(report: EventReport) -> dict[str, Any]:
    """A line of events.jsonl."""
    return {
        "time": report.time,
        "step": report.step,
        "kind": report.kind,
        "rank": report.rank,
        "device": report.device,
        "detail": report.detail,
        **report.facts,
    }


def run_event(kind: str, step: int, detail: str, **facts: Any) -> dict[str, Any]:
    """An event of the run as a whole."""
    return {"time": time.time(), "step": step, "kind": kind, "detail": detail, **facts}


def start_record(
    step: int, num_steps: int, shares: Sequence[int], readings: Sequence[Reading], *, again: bool, undone: int
) -> dict[str, Any]:
    """The event of training that begins, or goes on after `step`.

    again: it begins once more, after a try that left no checkpoint. undone: earlier steps that are taken again.
    """
    detail = f"{len(shares)} replicas, {num_steps} steps, shares {' + '.join(str(share) for share in shares)}"
    if step:
        detail += f"; goes on after step {step}"
    elif again:
        detail += "; begins again, since there is no checkpoint yet"
    if undone:
        detail += f", {undone} steps that were not saved are taken again"
    return run_event("start", step, detail, num_steps=num_steps, devices=device_records(readings))


def device_records(readings: Sequence[Reading]) -> list[dict[str, Any]]:
    """What each rank runs on: plans and steps name devices by UUID alone."""
    return [
        {
            "rank": rank,
            "device": reading.uuid,
            "name": reading.name,
            "host": reading.host,
            "total_bytes": reading.total_bytes,
        }
        for rank, reading in enumerate(readings)
    ]


def replan_record(report: PlanReport, before: Plan) -> dict[str, Any]:
    """The event of a rank that adopted another plan."""
    plan = report.plan
    changes = [
        f"budget {format_bytes(before.budget_bytes)} to {format_bytes(plan.budget_bytes)}",
        f"share {before.share} to {plan.share}" if before.share != plan.share else "",
        f"{before.schedule.strip} to {plan.schedule.strip}" if before.schedule.modes != plan.schedule.modes else "",
    ]
    return {
        "time": report.time,
        "step": report.step,
        "kind": "replan",
        "rank": plan.rank,
        "device": plan.device,
        "generation": plan.generation,
        "detail": f"{plan.reason}: " + ", ".join(change for change in changes if change),
    }


def summary_record(
    *,
    last: Mapping[str, Any] | None,
    score: Score | None,
    plans: Sequence[Plan],
    wall_s: float,
    train_s: float,
    samples: int,
    gains: Mapping[str, Any],
    identical: bool,
) -> dict[str, Any]:
    """What summary.json holds. last: the last line of metrics.jsonl; samples, train_s: of this session.

    identical: whether all replicas ended with the same parameters, to the bit.
    """
    return {
        "test_accuracy": None if score is None else score.accuracy,
        "test_loss": None if score is None else score.loss,
        "steps": 0 if last is None else last["step"],
        "samples": 0 if last is None else last["samples"],
        "wall_s": wall_s,
        "samples_per_s": samples / train_s if train_s > 0 else 0.0,
        "final_plans": [
            {
                "rank": plan.rank,
                "device": plan.device,
                "share": plan.share,
                "micro_batch": plan.micro_batch,
                "budget_bytes": plan.budget_bytes,
                "strip": plan.schedule.strip,
                "generation": plan.generation,
            }
            for plan in plans
        ],
        "gains": dict(gains),
        "replicas_identical": identical,
    }


def _rank_record(rank: int, row: Row, plan: Plan | None) -> dict[str, Any]:
    return {
        "rank": rank,
        "device": "" if plan is None else plan.device,
        "share": row.share,
        "samples": row.samples,
        "micro_batch": row.micro_batch,
        "step_s": row.step_s,
        "compute_s": row.compute_s,
        "peak_bytes": row.peak_bytes,
        "predicted_peak_bytes": row.predicted_peak_bytes,
        "predicted_step_s": row.predicted_step_s,
        "budget_bytes": row.budget_bytes,
        "free_bytes": row.free_bytes,
        "generation": row.generation,
        "strip": "" if plan is None else plan.schedule.strip,
        "demoted_bytes": row.demoted_bytes,
    }

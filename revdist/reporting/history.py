"""A run directory read back: everything the figures and the report are made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from revdist.errors import UsageError
from revdist.training.run_directory import RunReader

Line = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunHistory:
    """What a run has written so far. A run that is still going on, or was cut off, has no summary."""

    run_dir: Path
    name: str
    config: str
    """config.yaml as it stands."""
    plans: tuple[Line, ...]
    metrics: tuple[Line, ...]
    events: tuple[Line, ...]
    summary: Line | None

    @property
    def start_s(self) -> float:
        """The wall-clock time that figures count from: the first thing the run wrote down."""
        times = [float(lines[0]["time"]) for lines in (self.plans, self.metrics, self.events) if lines]
        return min(times, default=0.0)

    @property
    def end_s(self) -> float:
        times = [float(lines[-1]["time"]) for lines in (self.plans, self.metrics, self.events) if lines]
        return max(times, default=0.0)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Every rank that ever had a plan or did a step."""
        found = {int(plan["rank"]) for plan in self.plans}
        for line in self.metrics:
            found.update(int(rank["rank"]) for rank in line.get("ranks", ()))
        return tuple(sorted(found))

    def device(self, rank: int) -> Line:
        """What a rank runs on, as the run wrote it down when it started; empty where it did not."""
        for event in self.events:
            for line in event.get("devices", ()):
                if line["rank"] == rank:
                    return dict(line)
        return {}

    def device_name(self, uuid: str) -> str:
        """The name of a device; its UUID where no name was written down."""
        names = {line["device"]: line["name"] for event in self.events for line in event.get("devices", ())}
        return str(names.get(uuid, uuid))

    def plans_of(self, rank: int) -> list[Line]:
        return [plan for plan in self.plans if plan["rank"] == rank]

    def steps_of(self, rank: int) -> list[tuple[Line, Line]]:
        """The steps a rank took part in: (the step's line, the rank's part of it)."""
        return [(line, part) for line in self.metrics for part in line.get("ranks", ()) if part["rank"] == rank]


def read_history(run_dir: Path) -> RunHistory:
    """Read a run directory, whole or as far as its run has come.

    Raises UsageError where `run_dir` is not one.
    """
    if not run_dir.is_dir():
        raise UsageError(f"no run directory {run_dir}; `revdist launch` says where it writes, runs/<name>-<time>")
    reader = RunReader(run_dir)
    config = (run_dir / "config.yaml").read_text(encoding="utf-8", errors="replace")
    return RunHistory(
        run_dir=run_dir,
        name=_name(config) or run_dir.resolve().name,
        config=config,
        plans=tuple(reader.plans()),
        metrics=tuple(reader.metrics()),
        events=tuple(reader.events()),
        summary=reader.summary(),
    )


def _name(config: str) -> str:
    """The name in a configuration, which may be that of another version; empty where none can be read."""
    try:
        values = yaml.safe_load(config)
    except (yaml.YAMLError, ValueError):
        return ""
    return str(values.get("name", "")) if isinstance(values, dict) else ""

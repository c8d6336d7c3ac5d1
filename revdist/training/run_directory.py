"""The run directory: what a run writes, and how it is read again.

    config.yaml     the resolved configuration
    plans.jsonl     every plan adopted: time, step, rank, device, generation, reason, share, micro_batch,
                    accumulation_steps, budget_bytes, free_bytes, predicted_step_s, predicted_peak_bytes,
                    strip, schedule {modes, extra_s, need_bytes}
    metrics.jsonl   every step: time, step, epoch, samples, loss, lr, step_s, samples_per_s, pause_s and
                    ranks [{rank, device, share, micro_batch, step_s, compute_s, peak_bytes,
                    predicted_peak_bytes, predicted_step_s, budget_bytes, free_bytes, generation, strip,
                    demoted_bytes}]
    events.jsonl    everything else: time, step, kind, rank, device, detail; kind is one of EVENT_KINDS
    summary.json    what the run came to
    run.json        who runs it, where, and how it ended (`revdist.cluster.run_record`); run.lock is held meanwhile
    logs/           rank-N.log: what the process of each rank prints; launcher.log: a detached run's driver
    tensorboard/    loss, speed and memory as TensorBoard event files
    checkpoints/    saved training state

A run writes through one `RunWriter`; a line is complete or absent, so files can be read while they grow,
and waits in memory while the disk is full, so that the run goes on. A host that loses power may leave damaged
lines all the same: readers skip them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, final

from revdist.config import RunConfig
from revdist.errors import ConfigError
from revdist.planning.costs import Plan, Schedule
from revdist.training.line_file import LineFile
from revdist.training.tensorboard import TensorBoardLog

EVENT_KINDS = (
    "start",
    "profile",
    "replan",
    "out-of-memory",
    "non-finite",
    "lost",
    "joined",
    "regroup",
    "restart",
    "supervisor",
    "checkpoint",
    "checkpoint-failed",
    "resumed",
    "co-tenant",
    "preempted",
    "failed",
    "end",
)

FIELDS: Mapping[str, tuple[str, ...]] = {
    "plans": ("time", "step", "free_bytes", *(field.name for field in dataclasses.fields(Plan))),
    "metrics": ("time", "step"),
    "events": ("time", "kind"),
}
"""By the stem of a file, what every line of it has."""

_BLOCK_BYTES = 64 * 2**10
"""Of a file that is read from its end, at a time."""


def default_run_dir(name: str, now: datetime, parent: Path | None = None) -> Path:
    """`runs/<name>-<time>` under the current folder, with a number where that exists already."""
    stem = (parent or Path("runs")) / f"{name}-{now:%Y%m%d-%H%M%S}"
    candidate, number = stem, 2
    while candidate.exists():
        candidate, number = stem.with_name(f"{stem.name}-{number}"), number + 1
    return candidate


@final
class RunWriter:
    """Writes a run directory. Nothing exists on disk before `create`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: dict[str, LineFile] = {}
        self._tensorboard: TensorBoardLog | None = None

    def create(self, config: RunConfig, *, step: int | None = None) -> int:
        """Make the directory, readable by its owner's group at most, and write the configuration.

        step: steps of the run that its state holds. Lines of later ones are removed, since these steps were
        lost and will be taken again; returns how many. None: the run is under way.

        Called again, it goes on with new files where those steps were removed.

        Raises ConfigError where it cannot be made or written.
        """
        self.close()
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o750)
            (self.path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
            undone = 0 if step is None else _remove_later(self.path / "metrics.jsonl", step)
            for name in ("plans", "metrics", "events"):
                self._files[name] = LineFile(self.path / f"{name}.jsonl")
            if config.tensorboard:
                self._tensorboard = TensorBoardLog(self.path / "tensorboard")
        except OSError as error:
            raise ConfigError(
                f"cannot write the run directory {self.path}: {error.strerror}; choose another with --run-dir"
            ) from error
        return undone

    def plan(self, plan: Plan, *, time: float, step: int, free_bytes: int) -> None:
        """Append a plan that a rank adopted at a step."""
        self._append("plans", plan_record(plan, time=time, step=step, free_bytes=free_bytes))

    def metrics(self, record: Mapping[str, Any]) -> None:
        """Append a step."""
        self._append("metrics", record)
        if self._tensorboard is not None:
            self._tensorboard.step(record)

    def event(self, record: Mapping[str, Any]) -> None:
        """Append an event."""
        assert record["kind"] in EVENT_KINDS, record["kind"]
        self._append("events", record)

    def summary(self, record: Mapping[str, Any]) -> None:
        """Write what the run came to, in one piece."""
        whole = self.path / "summary.json"
        part = whole.with_suffix(".part")
        part.write_text(json.dumps(_finite(record), indent=2) + "\n", encoding="utf-8")
        os.replace(part, whole)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        self._files[name].append(json.dumps(_finite(record)))


@dataclasses.dataclass(frozen=True, slots=True)
class RunReader:
    """Reads a run directory, finished or growing."""

    path: Path

    def __post_init__(self) -> None:
        if not (self.path / "config.yaml").is_file():
            raise ConfigError(f"{self.path} is not a run directory: it holds no config.yaml")

    def config(self) -> RunConfig:
        return RunConfig.from_yaml(self.path / "config.yaml")

    def plans(self) -> Iterator[dict[str, Any]]:
        return self._lines("plans")

    def metrics(self) -> Iterator[dict[str, Any]]:
        return self._lines("metrics")

    def last_step(self) -> dict[str, Any] | None:
        """The last line of metrics.jsonl, found without reading those before; None where there is none."""
        path = self.path / "metrics.jsonl"
        return _last_record(path) if path.exists() else None

    def events(self) -> Iterator[dict[str, Any]]:
        return self._lines("events")

    def was_saved(self) -> bool:
        """Whether there has been a checkpoint of the run."""
        return any(event["kind"] in ("checkpoint", "resumed") for event in self.events())

    def summary(self) -> dict[str, Any] | None:
        """What the run came to; None while it has not ended, or where that cannot be read."""
        path = self.path / "summary.json"
        return _mapping(path.read_bytes()) if path.exists() else None

    def _lines(self, name: str) -> Iterator[dict[str, Any]]:
        path = self.path / f"{name}.jsonl"
        if not path.exists():
            return
        with path.open("rb") as file:
            yield from records(file, name)


def records(lines: Iterable[bytes], name: str) -> Iterator[dict[str, Any]]:
    """What lines of `<name>.jsonl` hold, given with their ends. Half a line, and a damaged one, is left out."""
    for line in lines:
        found = _mapping(line) if line.endswith(b"\n") else None
        if found is not None and all(field in found for field in FIELDS[name]):
            yield found


def _mapping(text: bytes) -> dict[str, Any] | None:
    """The mapping that this is in JSON; None where it is none."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _last_record(path: Path) -> dict[str, Any] | None:
    """The last whole line of metrics.jsonl; None where there is none."""
    with path.open("rb") as file:
        return next(records((line for _, line in _from_the_end(file)), "metrics"), None)


def _remove_later(path: Path, step: int) -> int:
    """Cut the lines of steps after `step`, and damaged ones, off the end of a file; returns how many there were."""
    if not path.exists():
        return 0
    with path.open("rb+") as file:
        end, num_removed = file.seek(0, os.SEEK_END), 0
        for begin, line in _from_the_end(file):
            found = _mapping(line) if line.endswith(b"\n") else None
            if found is not None and found.get("step", math.inf) <= step:
                break
            end, num_removed = begin, num_removed + 1
        file.truncate(end)
    return num_removed


def _from_the_end(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The lines of a file and where each begins, the last one first, which may be half written."""
    start, rest = file.seek(0, os.SEEK_END), b""
    while start > 0:
        size = min(_BLOCK_BYTES, start)
        start -= size
        file.seek(start)
        first, *lines = (file.read(size) + rest).splitlines(keepends=True)
        begin = start + len(first) + sum(map(len, lines))
        for line in reversed(lines):
            begin -= len(line)
            yield begin, line
        rest = first  # it may have begun before
    if rest:
        yield 0, rest


def plan_record(plan: Plan, *, time: float, step: int, free_bytes: int) -> dict[str, Any]:
    """A plan as a line of plans.jsonl."""
    return {
        "time": time,
        "step": step,
        **dataclasses.asdict(plan),
        "free_bytes": free_bytes,
        "strip": plan.schedule.strip,
    }


def plan_of(record: Mapping[str, Any]) -> Plan:
    """The plan in a line of plans.jsonl."""
    fields = {field.name: record[field.name] for field in dataclasses.fields(Plan)}
    fields["schedule"] = Schedule.from_json(json.dumps(record["schedule"]))
    return Plan(**fields)


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: null stands for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value

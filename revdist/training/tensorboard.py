"""A run's scalars as TensorBoard event files, for those who watch runs there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, final

_FLUSH_S = 5
_OF_STEP = ("loss", "lr", "samples_per_s", "step_s")
_OF_RANK = ("share", "compute_s", "peak_bytes", "predicted_peak_bytes", "budget_bytes", "free_bytes")


@final
class TensorBoardLog:
    """Appends steps to an event file. Nothing is imported or written before the first one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def step(self, record: Mapping[str, Any]) -> None:
        """Append the scalars of a line of metrics.jsonl; what is missing or no number is left out."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        if self._writer is None:
            self._writer = EventFileWriter(str(self._folder), flush_secs=_FLUSH_S)
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(record)]
        self._writer.add_event(Event(wall_time=record["time"], step=record["step"], summary=Summary(value=values)))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """`loss`, `lr`, ... and, per rank, `rank_0/peak_bytes`, ..."""
    for key in _OF_STEP:
        if record.get(key) is not None:
            yield key, float(record[key])
    for part in record.get("ranks", ()):
        for key in _OF_RANK:
            if part.get(key) is not None:
                yield f"rank_{part['rank']}/{key}", float(part[key])

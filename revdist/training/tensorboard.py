"""A run's scalars as TensorBoard event files, for those who watch runs there."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, final

_log = logging.getLogger(__name__)

_FLUSH_S = 5
_OF_STEP = ("loss", "lr", "samples_per_s", "step_s")
_OF_RANK = ("share", "compute_s", "peak_bytes", "predicted_peak_bytes", "budget_bytes", "free_bytes")


@final
class TensorBoardLog:
    """Appends steps to an event file. Nothing is imported or written before the first one.

    Where the disk refuses the file it is given up: metrics.jsonl has the same numbers.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None
        self._refused = False

    def step(self, record: Mapping[str, Any]) -> None:
        """Append the scalars of a line of metrics.jsonl; what is missing or no number is left out."""
        if self._refused:
            return
        try:
            self._append(record)
        except OSError as error:
            self._refused = True
            _log.warning("no more TensorBoard events of this run: %s", error)

    def close(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()

    def _append(self, record: Mapping[str, Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        if self._writer is None:
            self._writer = EventFileWriter(str(self._folder), flush_secs=_FLUSH_S)
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(record)]
        self._writer.add_event(Event(wall_time=record["time"], step=record["step"], summary=Summary(value=values)))


def scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """`loss`, `lr`, ... and, per rank, `rank_0/peak_bytes`, ..."""
    for key in _OF_STEP:
        if record.get(key) is not None:
            yield key, float(record[key])
    for part in record.get("ranks", ()):
        for key in _OF_RANK:
            if part.get(key) is not None:
                yield f"rank_{part['rank']}/{key}", float(part[key])

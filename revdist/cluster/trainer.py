"""The front door: a configuration in, a trained run out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from revdist.cluster.observer import Observer
from revdist.config import RunConfig

if TYPE_CHECKING:
    from revdist.devices.reading import Reading
    from revdist.planning.costs import Plan


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a finished run leaves."""

    run_dir: Path
    metrics: Mapping[str, Any]
    """What summary.json holds: test_accuracy, test_loss, steps, samples, wall_s, samples_per_s, gains, ..."""
    plans: tuple[Plan, ...]
    """Per rank: the plan it ended with."""


@final
class Trainer:
    """Trains one run, on its own local Ray cluster, a given one, or the one this process is connected to.

    Takes a `RunConfig`, a nested mapping, or the same keys as keyword arguments.
    `address`: `auto` or `HOST:PORT` of a running Ray cluster; None: the Ray this process already uses,
    else a local cluster of its own, which is shut down at the end.
    `run_dir`: where the run is written; None: `runs/<name>-<time>` under the current folder.
    `resume`: continue from the newest whole checkpoint in `run_dir`.
    """

    def __init__(
        self,
        config: RunConfig | Mapping[str, Any] | None = None,
        *,
        observer: Observer | None = None,
        address: str | None = None,
        run_dir: str | Path | None = None,
        resume: bool = False,
        **keys: Any,
    ) -> None:
        self.config = config if isinstance(config, RunConfig) else RunConfig.from_mapping({**(config or {}), **keys})
        self.observer = observer or Observer()
        self.address = address
        self.run_dir = run_dir
        self.resume = resume

    def fit(self) -> Result:
        """Train to the end.

        Raises UsageError (nothing written) for what cannot run, RunFailed naming the first failing
        rank, its host, the cause and the remedy, Preempted after saving on SIGTERM, and
        KeyboardInterrupt after saving on SIGINT.
        """
        raise NotImplementedError

    def dry_run(self) -> tuple[Reading, ...]:
        """Check everything up to training and return the devices the run would use, one per rank.

        Imports every factory and builds the model and the data; writes nothing. Raises as `fit`.
        """
        raise NotImplementedError

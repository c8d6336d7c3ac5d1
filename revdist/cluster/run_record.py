"""run.json: who runs a run directory, where, and how it ended. All that `revdist status` and `stop` need.

Whether a run is alive is said by the lock of its directory, not by this file: a process that is killed
writes nothing, but the kernel lets go of its lock.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from revdist.cluster.processes import Process
from revdist.errors import UsageError

FILE = "run.json"
RUN_ID = "REVDIST_RUN_ID"
"""Variable that every process of a run is started with, so that all of them are found when it shall end."""

RUN_DIR = "REVDIST_RUN_DIR"
"""Variable: its run directory, for those of them that see it from their host."""

RAY_SESSION = "REVDIST_RAY_SESSION"
"""Variable: folder of the Ray cluster's session, where a watchman keeps the cluster for the driver it starts."""

State = Literal["starting", "running", "done", "failed", "stopped", "lost"]
"""lost: it was killed and could not say so. The others are written down."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One session of a run: from its start to its end, or to the moment at which it was killed."""

    name: str
    run_id: str
    host: str
    process: Process
    """The driver: the process in which `Trainer.fit` runs."""
    state: State
    began_s: float
    """Seconds since the epoch (Unix)."""
    log_dir: str
    detached: bool = False
    ray_address: str = ""
    own_ray: bool = False
    """Whether the Ray cluster is the run's own, and ends with it."""
    ray_session: str = ""
    """Folder of the cluster's logs and sockets, where it is the run's own."""
    metrics_url: str = ""
    """Where Ray on the driver's host offers the run's metrics to Prometheus."""
    deputy: str = ""
    """Host that goes on with the run where the driver's is lost; empty: there is none."""
    restarts: int = 0
    """Of those that `workers.max_restarts` allows, how many are used up."""
    ended_s: float | None = None
    exit_code: int | None = None
    error: tuple[str, ...] = ()
    """What `revdist launch` said at the end, where the run did not come to it."""

    @property
    def here(self) -> bool:
        """Whether the run's driver is a process of this host."""
        return self.host == socket.gethostname()

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        known = {field.name for field in dataclasses.fields(cls)}
        fields = {key: value for key, value in values.items() if key in known}
        fields |= {"process": Process(**values["process"]), "error": tuple(values.get("error", ()))}
        return cls(**fields)


def read_record(run_dir: Path) -> RunRecord | None:
    """The newest session of a run directory; None where there has been none yet.

    Raises UsageError where the file is there and is not a record.
    """
    path = run_dir / FILE
    try:
        return RunRecord.from_mapping(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; look as the user whose run it is") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UsageError(f"{path} is not the record of a run: remove it if nothing runs there") from None


def write_record(run_dir: Path, record: RunRecord) -> None:
    """Replace the record in one piece; its owner's group may read it, others may not."""
    whole = run_dir / FILE
    part = whole.with_suffix(".part")
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o640), "w", encoding="utf-8") as file:
        file.write(record.to_json())
    os.replace(part, whole)

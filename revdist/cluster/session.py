"""Where a Ray cluster of a run's own keeps its sockets and logs: a folder that nobody else can enter.

Ray lets everybody write into its folders, so that users can share a machine's /tmp/ray. Whoever can replace
its sockets can talk to its workers; a folder of one's own around them keeps others out.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from revdist.errors import UsageError

_PREFIX = "revdist-"


def new_session_root() -> Path:
    """An empty folder for the sessions of one cluster, below one that only this user can enter.

    Raises UsageError where somebody else has taken its name.
    """
    # Paths of sockets have 107 characters at most, which $TMPDIR may use up; Ray does not follow it either.
    parent = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / f"{_PREFIX}{os.getuid()}"  # noqa: S108
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if parent.is_symlink() or parent.stat().st_uid != os.getuid():
        raise UsageError(f"{parent} belongs to another user; set RAY_TMPDIR to a folder of yours with a short path")
    parent.chmod(0o700)
    return Path(tempfile.mkdtemp(dir=parent, prefix="ray-"))


def remove_session(session: str | Path) -> None:
    """Remove what a cluster of a run's own has left, given the folder of its session; others are left alone."""
    if is_own_session(session):
        shutil.rmtree(Path(session).parent, ignore_errors=True)


def is_own_session(session: str | Path) -> bool:
    """Whether a folder is the session of a cluster that revdist has started for this user, by its name."""
    root = Path(session).parent
    return root.name.startswith("ray-") and root.parent.name == f"{_PREFIX}{os.getuid()}" and ".." not in root.parts

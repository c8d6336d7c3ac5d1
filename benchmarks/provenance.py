"""Where and when a result was measured: what every file in benchmarks/results says about itself."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def provenance(distributions: Iterable[str]) -> dict[str, Any]:
    """Date, hardware, how many processes wanted it lately, versions of Python and the distributions, and the commit."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": {
            "cpu": _cpu_name(),
            "num_cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        },
        "load": round(os.getloadavg()[2], 1),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in sorted(set(distributions))},
        "system": f"{platform.system()} {platform.release()}",
        "commit": _commit(),
    }


def command_line(command: str, arguments: Sequence[str] | None) -> str:
    """The command with its arguments, but for the folder that it writes to.

    arguments: as given to its `main`; None: those of this process.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out")
    _, others = parser.parse_known_args(arguments)
    return shlex.join([*command.split(), *others])


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    """Empty outside a git checkout."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""

"""`revdist doctor`: findings about this machine, and about a cluster, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from revdist.cluster.doctor import examine_ray
from revdist.devices.doctor import Finding, examine_machine

MARKS = {"ok": Text("ok", style="green"), "warn": Text("warn", style="yellow"), "fail": Text("FAIL", style="bold red")}


def examine(address: str | None) -> list[Finding]:
    """All checks of this machine and its Ray, then whether the cluster at `address` answers, where one is given."""
    findings = [*examine_machine(), *examine_ray()]
    return findings if address is None else [*findings, _check_cluster(address)]


def findings_table(findings: Sequence[Finding]) -> RenderableType:
    """One line a check, the remedy under what needs one."""
    table = Table(box=None, padding=(0, 1), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for finding in findings:
        text = Text(finding.found)
        if finding.remedy:
            text.append(f"\n{finding.remedy}", style="yellow" if finding.status == "warn" else "red")
        table.add_row(MARKS[finding.status], finding.name, text)
    return table


def _check_cluster(address: str) -> Finding:
    from revdist.cluster.inventory import cluster_devices
    from revdist.errors import UsageError

    name = "Ray cluster"
    try:
        with cluster_devices(address) as read:
            readings = read()
    except UsageError as error:
        return Finding(name=name, status="fail", found=f"none at {address}", remedy=str(error))
    silent = [reading for reading in readings if not reading.usable]
    num_hosts = len({reading.host for reading in readings})
    found = f"{len(readings)} devices on {num_hosts} host{'' if num_hosts == 1 else 's'} at {address}"
    if silent:
        notes = "; ".join(reading.note for reading in silent)
        return Finding(name=name, status="fail", found=f"{found}, {len(silent)} unusable", remedy=notes)
    return Finding(name=name, status="ok", found=found)

"""A page of Markdown about one result: what was measured, where and with what, then its tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.table import Table


def page(
    title: str,
    about: Mapping[str, Any],
    tables: Iterable[Table],
    *,
    figure: str = "",
    caption: str = "",
    remarks: Iterable[str] = (),
) -> str:
    """`about` is `provenance` with what the benchmark says of itself: its `command` and, if need be, its `method`.

    figure, caption: name of a picture beside the page, and what it shows
    remarks: further lines, after the tables
    """
    hardware = about["hardware"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    parts = [
        f"# {title}, {about['date'][:10]}\n",
        f"`{about['command']}`, {about['date']}, commit {about['commit']}. {hardware['cpu']}, {hardware['num_cores']} "
        f"cores, {hardware['memory_bytes'] / 2**30:.0f} GiB, {about['system']}, load {about['load']}. {versions}.\n",
    ]
    if "method" in about:
        parts.append(f"{about['method']}\n")
    if figure:
        parts.append(f"![{caption}]({figure})\n")
    return "\n".join([*parts, *(table.as_markdown() for table in tables), *remarks])

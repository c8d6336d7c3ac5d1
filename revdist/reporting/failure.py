"""An error as it is shown on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from revdist.cluster.failure_lines import failure_lines
from revdist.errors import Preempted


def failure_text(error: BaseException) -> Text:
    return lines_text(failure_lines(error), in_order=isinstance(error, Preempted))


def lines_text(lines: Sequence[str], *, in_order: bool) -> Text:
    """Lines about an ending. in_order: told to stop, and did so, which is no error."""
    first, *rest = lines
    text = Text(first, style="yellow") if in_order else Text.assemble(("error: ", "bold red"), (first, "bold"))
    for line in rest:
        text.append(f"\n  {line}")
    return text

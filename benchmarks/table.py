"""One table, written to the terminal and to Markdown."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import rich.box
from rich.markup import escape
from rich.table import Table as TerminalTable

NAME_WIDTH = 40
"""Columns that the names of rows get where the values beside them are words, which wrap better."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Cells are plain text; the first column names the row, the others hold its values."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    colors: dict[str, str] = dataclasses.field(default_factory=dict)
    """Terminal style of every cell that reads so."""
    words: bool = False
    """Whether the values are words, to be aligned left, and not numbers."""

    def for_terminal(self) -> TerminalTable:
        table = TerminalTable(title=self.title, title_justify="left", title_style="bold", box=rich.box.SIMPLE_HEAD)
        for number, column in enumerate(self.columns):
            left = number == 0 or self.words
            width = NAME_WIDTH if number == 0 and self.words else None
            table.add_column(column, justify="left" if left else "right", min_width=width, overflow="fold")
        for row in self.rows:
            table.add_row(*(self._styled(cell) for cell in row))
        return table

    def as_markdown(self) -> str:
        dividers = [":---" if number == 0 or self.words else "---:" for number in range(len(self.columns))]
        lines = [self.columns, dividers, *self.rows]
        body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return f"### {self.title}\n\n{body}\n"

    def _styled(self, cell: str) -> str:
        color = self.colors.get(cell)
        return f"[{color}]{escape(cell)}[/]" if color else escape(cell)

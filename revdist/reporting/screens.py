"""Where the live view is drawn: a terminal that is redrawn in place, or lines into a pipe or file."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import final

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from revdist.errors import format_bytes
from revdist.reporting.live_state import RunState
from revdist.reporting.live_table import picture, progress_line

Clock = Callable[[], float]

REDRAW_S = 0.1
"""A terminal is redrawn at most this often."""
LINE_S = 5.0
"""A pipe or file gets a line on progress at most this often."""


class Screen(ABC):
    """Shows the state of a run and lines about what happened in it."""

    @abstractmethod
    def open(self, state: RunState) -> None: ...

    @abstractmethod
    def line(self, head: Text, sentence: Text) -> None:
        """Print something that stays: when and where, then what happened."""

    @abstractmethod
    def refresh(self, state: RunState, *, now: bool = False) -> None:
        """Show the state, unless it was shown a moment ago; `now`: in any case."""

    @abstractmethod
    def close(self) -> None: ...


@final
class LiveScreen(Screen):
    """Draws the table in place; lines scroll by above it."""

    def __init__(self, console: Console, clock: Clock = time.monotonic) -> None:
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._clock = clock
        self._drawn_at = float("-inf")

    def open(self, state: RunState) -> None:
        self._live.start()
        self.refresh(state, now=True)

    def line(self, head: Text, sentence: Text) -> None:
        grid = Table.grid(padding=(0, 2))  # a long sentence wraps under its own beginning
        grid.add_column(no_wrap=True)
        grid.add_row(head, sentence)
        self._live.console.print(grid)

    def refresh(self, state: RunState, *, now: bool = False) -> None:
        if now or self._clock() - self._drawn_at >= REDRAW_S:
            self._drawn_at = self._clock()
            self._live.update(picture(state), refresh=True)

    def close(self) -> None:
        self._live.stop()


@final
class PlainScreen(Screen):
    """One line now and then, for logs: nothing moves and nothing is coloured."""

    def __init__(self, console: Console, clock: Clock = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._printed_at = float("-inf")

    def open(self, state: RunState) -> None:
        pass

    def line(self, head: Text, sentence: Text) -> None:
        self._console.print(Text("  ").join([head, sentence]), soft_wrap=True)

    def refresh(self, state: RunState, *, now: bool = False) -> None:
        if not state.step or self._clock() - self._printed_at < LINE_S:
            return
        self._printed_at = self._clock()
        self._console.print(f"{progress_line(state)} | {_ranks(state)}", soft_wrap=True, highlight=False)

    def close(self) -> None:
        pass


@final
class HeldScreen(Screen):
    """Holds back what is told of the past but for its newest lines, and then goes on as another screen."""

    def __init__(self, screen: Screen, *, num_lines: int) -> None:
        self._screen = screen
        self._lines: deque[tuple[Text, Text]] | None = deque(maxlen=num_lines)
        self._state: RunState | None = None

    def open(self, state: RunState) -> None:
        self._state = state
        if self._lines is None:
            self._screen.open(state)

    def line(self, head: Text, sentence: Text) -> None:
        if self._lines is None:
            self._screen.line(head, sentence)
        else:
            self._lines.append((head, sentence))

    def refresh(self, state: RunState, *, now: bool = False) -> None:
        if self._lines is None:
            self._screen.refresh(state, now=now)

    def release(self) -> None:
        """The past is told: show its newest lines, and from here on everything."""
        lines, self._lines = self._lines or deque(), None
        for head, sentence in lines:
            self._screen.line(head, sentence)
        if self._state is not None:
            self._screen.open(self._state)

    def close(self) -> None:
        if self._lines is None:
            self._screen.close()


def _ranks(state: RunState) -> str:
    """`cpu-0 22 samples, free 31.2 MiB; cpu-1 42 samples, free 140.1 MiB`."""
    return "; ".join(
        f"{rank.device} {rank.plan.share} samples, free {format_bytes(rank.free_bytes or 0)}"
        for rank in state.ranks.values()
        if rank.plan
    )


def screen_for(console: Console) -> Screen:
    return LiveScreen(console) if console.is_terminal and not console.is_dumb_terminal else PlainScreen(console)

"""A schedule as a strip of coloured letters, squeezed to the room there is."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.text import Text

from revdist.planning.costs import Mode
from revdist.reporting.palette import MODE_OF_LETTER, MODE_WORDS, TERMINAL_STYLES

MIN_WIDTH = 8


def squeeze(strip: str, width: int) -> str:
    """At most `width` letters, each the most frequent one of the operators it stands for."""
    if len(strip) <= width:
        return strip
    edges = [len(strip) * cell // width for cell in range(width + 1)]
    return "".join(Counter(strip[start:end]).most_common(1)[0][0] for start, end in itertools.pairwise(edges))


def paint(strip: str) -> Text:
    """The letters on their colours."""
    text = Text(no_wrap=True)
    for letter in strip:
        mode = MODE_OF_LETTER.get(letter)
        text.append(letter, style=TERMINAL_STYLES[mode] if mode else "")
    return text


def legend(modes: Iterable[Mode]) -> Text:
    """`S keep   I rebuild`, in colour."""
    text = Text()
    for index, mode in enumerate(modes):
        text.append("   " if index else "")
        text.append_text(paint(mode.letter))
        text.append(f" {MODE_WORDS[mode]}", style="dim")
    return text


@dataclasses.dataclass(frozen=True, slots=True)
class Strip:
    """A renderable that shows as much of a strip as its column is wide."""

    letters: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield paint(squeeze(self.letters, options.max_width))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        longest = max(1, len(self.letters))
        return Measurement(min(MIN_WIDTH, longest), longest).clamp(max_width=options.max_width)

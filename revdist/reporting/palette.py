"""One colour and one plain word per mode, the same in the terminal, in figures and in the report.

The colours are Okabe and Ito's, which people with colour-blindness tell apart.
"""

from __future__ import annotations

from revdist.planning.costs import Mode

MODE_COLORS: dict[str, str] = {
    Mode.SAVE: "#0072b2",
    Mode.INVERT: "#e69f00",
    Mode.RECOMPUTE: "#009e73",
    Mode.OFFLOAD: "#cc79a7",
}

TERMINAL_STYLES: dict[str, str] = {
    Mode.SAVE: "bold white on blue",
    Mode.INVERT: "bold black on yellow",
    Mode.RECOMPUTE: "bold black on green",
    Mode.OFFLOAD: "bold black on magenta",
}
"""The nearest of the sixteen colours every terminal has: nearest-colour rules would merge two of ours."""

MODE_WORDS: dict[str, str] = {
    Mode.SAVE: "keep",
    Mode.INVERT: "rebuild",
    Mode.RECOMPUTE: "run again",
    Mode.OFFLOAD: "move to host",
}

MODE_OF_LETTER: dict[str, Mode] = {mode.letter: mode for mode in Mode}

RANK_COLORS: tuple[str, ...] = (
    "#4053d3",
    "#b51d14",
    "#00a08a",
    "#ddb310",
    "#a03ab5",
    "#00beff",
    "#7a7a7a",
    "#fb49b0",
)

INK = "#1f2933"
MUTED = "#7b8794"
FAINT = "#e4e7eb"


def rank_color(rank: int) -> str:
    return RANK_COLORS[rank % len(RANK_COLORS)]

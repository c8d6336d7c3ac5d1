from __future__ import annotations

import io

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from revdist.planning.costs import Mode
from revdist.reporting.strips import Strip, legend, squeeze


def shown(renderable: object, **options: object) -> str:
    console = Console(file=io.StringIO(), **{"width": 40, **options})  # type: ignore[arg-type]
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


@given(st.text("SIRO", min_size=1, max_size=300), st.integers(1, 80))
def test_a_squeezed_strip_fits_and_shows_only_what_is_there(strip: str, width: int) -> None:
    squeezed = squeeze(strip, width)
    assert len(squeezed) == min(len(strip), width)
    assert set(squeezed) <= set(strip)


def test_every_cell_shows_its_most_frequent_mode() -> None:
    assert squeeze("SSSIIIIISS", 2) == "SI"


def test_a_strip_takes_the_room_of_its_column() -> None:
    table = Table(box=None, expand=True)
    table.add_column("schedule", ratio=1)
    table.add_row(Strip("S" * 100))
    assert shown(table).splitlines()[1].strip() == "S" * 38


def test_letters_stay_readable_without_colour() -> None:
    text = shown(Strip("SIRO"), force_terminal=True, no_color=True)
    assert "S" in text
    assert ";44m" not in text
    assert ";44m" in shown(Strip("SIRO"), force_terminal=True, color_system="standard", no_color=False)


def test_the_legend_names_the_modes() -> None:
    assert shown(legend([Mode.SAVE, Mode.INVERT])).strip() == "S keep   I rebuild"

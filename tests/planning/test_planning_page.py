"""The example on the page about planning says what really happens."""

from __future__ import annotations

import re
from pathlib import Path

from revdist.planning.costs import Mode, Schedule

PAGE = Path(__file__).parents[2] / "docs" / "planning.md"


def test_the_example_gives_what_its_comments_say() -> None:
    example = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert example is not None
    names: dict = {}
    exec(example[1], names)
    frontier = names["frontier"]
    assert frontier.budgets_bytes.tolist() == [150, 160]
    assert frontier.extra_s.tolist() == [1.0, 0.0]
    assert frontier.best(155) == Schedule(modes=(Mode.INVERT, Mode.SAVE), extra_s=1.0, need_bytes=150)

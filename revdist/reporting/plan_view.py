"""A plan in the terminal: what each budget costs in time, as bars and strips, and what more memory buys."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from revdist.errors import format_bytes
from revdist.reporting.phrases import letters_used, rate, seconds
from revdist.reporting.plan_study import Study, accuracy, best_batch, headline, letter, one_more
from revdist.reporting.strips import Strip, legend


def study_view(found: Study) -> RenderableType:
    parts: list[RenderableType] = [Text(headline(found)), Text(), _table(found)]
    strips = [choice.schedule.strip for choice in found.choices]
    parts.append(Padding(legend(letters_used(strips)), (0, 0, 1, 1)))
    parts += [Text(_too_small(found, budget), style="yellow") for budget in found.too_small]
    parts.append(Text(one_more(found), style="bold"))
    if sentence := accuracy(found):
        parts.append(Text(sentence))
    return Group(*parts)


def _too_small(found: Study, budget_bytes: int) -> str:
    missing = format_bytes(found.frontier.minimum_bytes - budget_bytes)
    sentence = f"{format_bytes(budget_bytes)} holds no schedule of a micro-batch of {found.profile.micro_batch}: "
    best = best_batch(found, budget_bytes)
    return f"{sentence}{missing} missing" + (f"; one of {best.micro_batch} fits" if best else "")


def _table(found: Study) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="dim", expand=True)
    table.add_column("", style="bold", no_wrap=True)
    table.add_column("budget", justify="right", no_wrap=True)
    table.add_column("extra time", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True, min_width=6)
    table.add_column("", width=8)
    if found.curves:
        table.add_column("best batch", justify="right", no_wrap=True)
    table.add_column("schedule", ratio=1, no_wrap=True)
    most = max(float(found.frontier.extra_s[0]), 1e-12)
    base_s = found.profile.base_s
    for index, choice in enumerate(found.choices):
        extra_s = choice.schedule.extra_s
        bar = ProgressBar(most, extra_s, width=8, complete_style="yellow", finished_style="yellow")
        row: list[RenderableType] = [
            f"{letter(index)} {choice.device}".strip(),
            format_bytes(choice.budget_bytes),
            seconds(extra_s),
        ]
        row += [f"+{extra_s / base_s:.0%}" if base_s else "", bar]
        if found.curves:
            best = best_batch(found, choice.budget_bytes)
            row.append(f"{best.micro_batch}: {rate(best.samples_per_s)}/s" if best else "")
        table.add_row(*row, Strip(choice.schedule.strip))
    return table

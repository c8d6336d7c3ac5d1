"""Figures draw what they are given. How they look is judged by eye; here it is what they show."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from sample_profiles import profile
from sample_run import OPERATORS, event, write_run

from revdist.planning.replay import replay
from revdist.reporting.figure import save_png, to_svg
from revdist.reporting.history import read_history
from revdist.reporting.plan_figures import plan_figure
from revdist.reporting.plan_study import study
from revdist.reporting.run_figures import MAX_POINTS, learning_figure, memory_figure

PNG = b"\x89PNG"


def titles(figure: Figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]


def test_a_plan_on_one_page(tmp_path: Path) -> None:
    found = study([profile(8), profile(32)])
    figure = plan_figure(found, title="a network")
    assert [title.split(":")[0].split(" within")[0] for title in titles(figure)] == [
        "Frontier",
        "Schedules over the network",
        "One step",
        "Throughput by micro-batch (dot",
    ]
    path = tmp_path / "plan.png"
    save_png(figure, path, dpi=50)
    assert path.read_bytes().startswith(PNG)


def test_the_frontier_is_drawn_where_it_is() -> None:
    found = study([profile()])
    line = plan_figure(found).axes[0].get_lines()[0]
    x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
    assert np.allclose(x[:-1] * 2**20, found.frontier.budgets_bytes)
    assert np.allclose(y[:-1] * 1e-3, found.frontier.extra_s)


def test_a_measured_timeline_is_laid_over_the_predicted_one() -> None:
    found = study([profile()])
    moments = replay(found.profile, found.focus.schedule.modes).timeline
    measured = [moment.held_bytes for moment in moments]
    texts = [text.get_text() for text in plan_figure(found, measured_bytes=measured).axes[2].get_legend().get_texts()]
    assert "measured" in texts


@pytest.mark.parametrize("operators", [1, 4, 300])
def test_networks_of_any_length_are_drawn(operators: int) -> None:
    assert to_svg(plan_figure(study([profile(operators=operators)]))).startswith("<?xml")


def test_a_profile_without_times_is_drawn() -> None:
    assert to_svg(plan_figure(study([dataclasses.replace(profile(), base_s=0.0)])))


def test_devices_far_beyond_the_frontier_do_not_stretch_it() -> None:
    found = study([profile()], devices={"large": 2**33})
    _, high = plan_figure(found).axes[0].get_xlim()
    assert high * 2**20 < 2 * found.frontier.maximum_bytes


def test_a_run_over_time(tmp_path: Path) -> None:
    history = read_history(write_run(tmp_path / "run", steps=60))
    learning, memory = learning_figure(history), memory_figure(history)
    assert titles(learning) == ["Loss", "Throughput"]
    assert [title.split(",")[0] for title in titles(memory)] == ["Rank 0", "Rank 1"]
    texts = {text.get_text().strip() for axes in memory.axes for text in axes.texts}
    assert texts >= {"the batch is split anew", "less memory is free", "more memory is free", "24 samples, 2 x 16"}
    ribbon = memory.axes[3].collections[0].get_array()
    assert ribbon is not None
    assert ribbon.size == OPERATORS


def test_who_was_lost_and_what_steps_waited_for_it_is_marked(tmp_path: Path) -> None:
    history = read_history(write_run(tmp_path / "run", steps=60))
    lost = event(20, "lost", rank=1, device="CPU-0001", detail="killed")
    joined = event(40, "joined", rank=1, device="CPU-0009", detail="cpu-9 on node-b")
    metrics = tuple(line | {"pause_s": 0.3 * (line["step"] == 21)} for line in history.metrics)
    harmed = dataclasses.replace(history, events=(*history.events, lost, joined), metrics=metrics)
    speed = learning_figure(harmed).axes[1]
    assert {text.get_text().strip() for text in speed.texts} == {"cpu-1 lost", "CPU-0009 joined"}
    assert len(speed.patches) == 1  # the one pause
    assert not learning_figure(history).axes[1].patches


def test_long_runs_are_thinned(tmp_path: Path) -> None:
    history = read_history(write_run(tmp_path / "run", steps=4000))
    line = learning_figure(history).axes[0].get_lines()[0]
    assert 500 < len(np.asarray(line.get_xdata())) <= MAX_POINTS


def test_steps_without_a_loss_leave_a_gap(tmp_path: Path) -> None:
    history = read_history(write_run(tmp_path / "run", steps=20))
    gap = dataclasses.replace(history, metrics=({**history.metrics[0], "loss": None}, *history.metrics[1:]))
    values = np.asarray(learning_figure(gap).axes[0].get_lines()[0].get_ydata(), dtype=float)
    assert np.isnan(values[0])
    assert np.isfinite(values[1:]).all()


def test_drawing_leaves_the_settings_of_others_alone() -> None:
    before = dict(mpl.rcParams)
    to_svg(plan_figure(study([profile()])))
    assert dict(mpl.rcParams) == before

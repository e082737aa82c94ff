"""
What is drawn: legends name what has a colour or a mark, axes have their units, what is outside stands on the edge and
is marked, and what is close to something else can be told apart.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from figure_data import LAYOUTS, instance_samples, requests, run_summary, step_samples
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from cascadeinfer.core.plan.objective import BalancedLatency, MeanNormalizedLatency, SloAttainment, WeightedLatency
from cascadeinfer.evaluation.setting import load_setting
from cascadeinfer.figures.drawing import Limits, draw_within, grid_figure, latency_cdfs, nines, save
from cascadeinfer.figures.fit_figure import fit_figure
from cascadeinfer.figures.plan_figure import plan_figure
from cascadeinfer.figures.rate_figures import rate_curves
from cascadeinfer.figures.timelines import stage_timelines
from cascadeinfer.results.summary import SHORT_RUN

UNITS = re.compile(
    r"\b(s|ms|tokens|%|requests per second|requests per instance|per second|share|instances|number of|TPOT, s)\b|%"
)
GREY = {"#333333", "#777777", "#bbbbbb", "#555555", "#b0b0b0", "#000000", "#ffffff"}


def panels(figure: Figure) -> Iterator[Axes]:
    """Those that show something."""
    return (axis for axis in figure.axes if axis.axison)


def legend_of(axis: Axes) -> list[str]:
    """The texts of a panel's legend."""
    legend = axis.get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


def x_of(line: Line2D) -> NDArray[np.float64]:
    """Where a curve's points are."""
    return np.asarray(line.get_xdata(), dtype=np.float64)


def y_of(line: Line2D) -> NDArray[np.float64]:
    """How high they are."""
    return np.asarray(line.get_ydata(), dtype=np.float64)


def colours_of(axis: Axes) -> set[str]:
    """The colours of what is drawn, without greys."""
    found = {to_hex(line.get_color()) for line in axis.lines if len(x_of(line))}
    found |= {to_hex(bar.get_facecolor()) for bar in axis.patches}
    return found - GREY


def named_colours(figure: Figure) -> set[str]:
    """The colours that some legend names."""
    found = set()
    for axis in figure.axes:
        if (legend := axis.get_legend()) is not None:
            found |= {to_hex(line.get_color()) for line in legend.get_lines()}
            found |= {to_hex(patch.get_facecolor()) for patch in legend.get_patches()}
            bars = [handle for handle in axis.get_legend_handles_labels()[0] if isinstance(handle, ErrorbarContainer)]
            found |= {to_hex(bar.lines[0].get_color()) for bar in bars}
    return found


def check_named(figure: Figure) -> None:
    """Every colour is in a legend, and every axis has a label with what is measured and its unit."""
    for axis in panels(figure):
        assert colours_of(axis) <= named_colours(figure), axis.get_ylabel()
        for label in (axis.get_xlabel(), axis.get_ylabel()):
            assert UNITS.search(label), f"no unit in {label!r}"
        figure.canvas.draw()
        for ticks in (axis.get_xticklabels(), axis.get_yticklabels()):
            assert sum(bool(tick.get_text()) for tick in ticks) >= 1


def test_curves_over_the_rate() -> None:
    """Policies, bands and runs that were too short are named; the latter are hollow, and only they."""
    spans_s = [60.0, 60.0, 60.0]
    curves = {
        "cascade": [[run_summary(2.0), run_summary(2.2)], [run_summary(4.0), run_summary(4.4)]] * 1
        + [[run_summary(59.0 / SHORT_RUN), run_summary(61.0 / SHORT_RUN)]],
        "llumnix": [[run_summary(2.0), run_summary(2.2)]] * 3,
    }
    figure = rate_curves(curves, [1.0, 2.0, 3.0], "made up", spans_s)
    check_named(figure)
    axis = figure.axes[0]
    assert legend_of(axis) == ["cascade", "llumnix", "95 % interval over the seeds", "run too short to be steady"]
    hollow = [line for line in axis.lines if line.get_markerfacecolor() == "white" and len(x_of(line))]
    assert [x_of(line).tolist() for line in hollow] == [[3.0]]
    widths = [line.get_linewidth() for line in axis.lines if line.get_label() in curves]
    assert widths == sorted(widths, reverse=True)
    assert len(set(widths)) == 2  # one that lies over another lets it be seen
    low, high = axis.get_ylim()
    assert low > 10.0  # the band, which reaches zero, does not set the axis
    assert high < 1000.0
    steady = rate_curves({"cascade": [[run_summary(2.0)]]}, [1.0], "made up", [60.0])
    assert legend_of(steady.axes[0]) == ["cascade"]


def test_shares_near_the_whole_can_be_told_apart() -> None:
    """99 and 99.9 % are further apart than 50 and 60 %; the whole is on the axis."""
    _, (axis,) = grid_figure(1, 1, "made up")
    axis.plot([0, 1], [99.0, 100.0])
    nines(axis, 100.0)
    heights = axis.transData.transform([(0.0, value) for value in (50.0, 60.0, 99.0, 99.9, 100.0)])[:, 1]
    assert heights[3] - heights[2] > 3.0 * (heights[1] - heights[0])
    assert heights[4] > heights[3]
    assert axis.get_ylim() == (0.0, 100.0)
    assert axis.get_yticks().tolist() == [0.0, 50.0, 80.0, 90.0, 95.0, 99.0, 100.0]


def test_what_is_outside_stands_on_the_edge() -> None:
    """Points beyond an axis are hollow triangles at its end, pointing outwards, with their values."""
    _, (axis,) = grid_figure(1, 1, "made up")
    style = {"color": "#123456"}
    x, y = np.array([1.0, 2.0, 3.0]), np.array([0.5, 5.0, 2345.0])
    draw_within(axis, x, y, Limits(1.0, 10.0), style, "curve")
    marks = {line.get_marker(): line for line in axis.lines[1:]}
    assert set(marks) == {"^", "v"}
    assert (x_of(marks["^"])[0], y_of(marks["^"])[0]) == (3.0, 10.0)
    assert (x_of(marks["v"])[0], y_of(marks["v"])[0]) == (1.0, 1.0)
    assert all(line.get_fillstyle() == "none" for line in marks.values())
    assert sorted(text.get_text() for text in axis.texts) == ["0.5", "2,345"]


def test_distributions_say_median_and_tail() -> None:
    """Each curve's legend has the quantiles that are hard to see, of what finished; where nothing did, it says so."""
    runs = {"a": [requests([1.0, 2.0, 3.0]), requests([4.0, 5.0, np.nan])], "none": [requests([np.nan])]}
    figure = latency_cdfs(runs, "made up")
    check_named(figure)
    assert legend_of(figure.axes[3]) == ["a: median 3, p99 4.96", "none: none"]


def test_timelines_name_stages_and_boundaries() -> None:
    """Boundaries are named by the stages they part, instances by their stage; idle reports have no step time."""
    figure = stage_timelines(instance_samples(), LAYOUTS, "made up")
    check_named(figure)
    assert legend_of(figure.axes[4]) == ["between stages 0 and 1", "between stages 1 and 2"]
    assert legend_of(figure.axes[5]) == ["stage 0", "stage 1", "stage 2"]
    steps_ms = y_of(figure.axes[3].lines[1])
    assert np.allclose(steps_ms, 20.0)


def test_timelines_do_not_bridge_what_was_not_reported() -> None:
    """Where a stage has nothing to show for long, its curve is broken; reports that are just rare are joined."""
    samples = instance_samples(400)
    idle = (samples.time_s > 10.0) & (samples.time_s < 20.0) & (samples.stage == 1)
    running = np.where(idle, 0, samples.running)
    figure = stage_timelines(replace(samples, running=running), LAYOUTS, "made up")
    always, broken = figure.axes[1].lines
    assert np.isfinite(y_of(always)).all()
    at = np.flatnonzero(np.isnan(x_of(broken)))
    assert len(at) == 1
    before_s, after_s = x_of(broken)[at[0] - 1], x_of(broken)[at[0] + 1]
    assert 9.0 < before_s < 10.5
    assert 19.5 < after_s < 21.0


def test_a_fit_marks_what_is_beyond_its_axis() -> None:
    """The error axis fits most errors; the others stand on its edge as triangles, and are counted."""
    samples = step_samples()
    predicted_s = samples.step_s * (1.0 + 0.02 * np.sin(np.arange(len(samples))))
    predicted_s[5] *= 3.0
    predicted_s[9] *= 0.2
    figure = fit_figure(samples, predicted_s, np.full(len(samples), 0.05), "made up")
    check_named(figure)
    errors = figure.axes[1]
    assert errors.get_ylim() == (-15.0, 15.0)
    assert legend_of(errors)[-1] == "beyond 15 % (2)"
    edge = [
        y for points in errors.collections for y in np.asarray(points.get_offsets())[:, 1].tolist() if abs(y) == 15.0
    ]
    assert sorted(edge) == [-15.0, 15.0]
    assert "within 10 %" in legend_of(errors)
    assert legend_of(figure.axes[2])[-2:] == ["measured, with its spread", "predicted"]
    close = fit_figure(samples, samples.step_s * 1.01, np.full(len(samples), 0.05), "made up")
    assert not any("beyond" in text for text in legend_of(close.axes[1]))


@pytest.mark.parametrize(
    ("objective", "unit"),
    [
        (MeanNormalizedLatency(), "ms per token"),
        (BalancedLatency(), "25% by request, the rest by token; ms per token"),
        (WeightedLatency(), "1 x TTFT + 10 x TPOT, s"),
        (SloAttainment(2.0, 0.1), "miss the SLO, %"),
    ],
)
def test_a_plan_says_what_it_costs(objective: MeanNormalizedLatency, unit: str, tmp_path: Path) -> None:
    """Costs have the objective's unit and the difference to this plan; its colours are named."""
    setting = load_setting("h200-llama-3.1-8b", Path("sample"), 6, objective=objective)
    plan = setting.plan(12.0)
    figure = plan_figure(plan, "made up")
    check_named(figure)
    lengths, stages, costs = figure.axes
    assert unit in costs.get_ylabel()
    assert legend_of(costs)[0] == "this plan"
    texts = [text.get_text() for text in costs.texts]
    assert sum(text.endswith(" %") and text[0] in "+-" for text in texts) == len(texts) - 1
    assert ("stage boundaries" in legend_of(lengths)) == (len(plan.stages) > 1)
    assert len(stages.texts) == len(plan.stages)
    save(figure, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_a_plan_marks_what_cannot_carry_the_load() -> None:
    """Numbers of stages that are too slow for the rate are crossed, not just missing."""
    setting = load_setting("h200-llama-3.1-8b", Path("sample"), 4)
    plan = setting.plan(0.99 * setting.one_stage_capacity_rps)
    costs = plan_figure(plan, "made up").axes[2]
    crossed = [line for line in costs.lines if line.get_marker() == "x"]
    n_finite = int(np.isfinite(plan.cost_by_stages).sum())
    assert sum(len(x_of(line)) for line in crossed) == len(plan.cost_by_stages) - n_finite
    assert ("cannot carry the load" in legend_of(costs)) == (n_finite < len(plan.cost_by_stages))

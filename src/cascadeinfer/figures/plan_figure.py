"""A plan drawn: requests, tokens and work over length, the stages, and the cost by number of stages."""

from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cascadeinfer.core.cost.histogram import Column
from cascadeinfer.core.plan.planner import Plan
from cascadeinfer.figures.drawing import grid_figure, logarithmic, style_of

SHARES: Final = (
    ("requests, by prompt", Column.STARTS),
    ("tokens decoded", Column.STEPS),
    ("KV read", Column.KV_STEPS),
)


def plan_figure(plan: Plan, title: str) -> Figure:
    """
    Three panels: shares over length with the stages, each stage's step time and batch, cost by number of stages.

    Args:
        plan: A plan from the planner.
        title: Title of the figure.
    """
    figure, axes = grid_figure(1, 3, f"{title} (predicted)", height=3.4)
    _lengths(axes[0], plan)
    _stages(axes[1], plan)
    _costs(axes[2], plan)
    return figure


def _lengths(axis: Axes, plan: Plan) -> None:
    histogram = plan.problem.histogram
    edges = histogram.edges_tokens.astype(np.float64)
    for number, (label, column) in enumerate(SHARES):
        prefix = histogram.prefix[column]
        axis.plot(
            edges[1:], prefix[1:] / max(float(prefix[-1]), 1e-300), label=label, linewidth=1.4, **style_of(number)
        )
    low, high = _occupied(plan)
    for boundary in plan.boundaries_tokens:
        axis.axvline(boundary, color="#333333", linewidth=1.0, linestyle=":")
    ends = [low, *(float(b) for b in plan.boundaries_tokens), high]
    for start, end, instances in zip(ends[:-1], ends[1:], plan.instances, strict=True):
        middle = float(np.sqrt(max(start, 1.0) * max(end, start + 1.0)))
        axis.annotate(
            str(instances),
            (middle, 1.06),
            ha="center",
            fontsize=9,
            annotation_clip=False,
            xycoords=("data", "axes fraction"),
        )
    axis.annotate("instances:", (-0.02, 1.06), ha="right", fontsize=8, annotation_clip=False, xycoords="axes fraction")
    axis.set_xlim(low, high)
    logarithmic(axis, "x")
    axis.set_ylim(0.0, 1.01)
    axis.set_xlabel("length, tokens", fontsize=9)
    axis.set_ylabel("share below this length", fontsize=9)
    axis.legend(fontsize=8, loc="lower right")


def _occupied(plan: Plan) -> tuple[float, float]:
    """The range of lengths that contains nearly everything."""
    histogram = plan.problem.histogram
    prefix: NDArray[np.float64] = histogram.prefix[Column.STARTS]
    inside = np.flatnonzero(prefix > 1e-4)
    low = float(histogram.edges_tokens[max(0, int(inside[0]) - 1)])
    return max(1.0, low), float(histogram.longest_tokens)


def _stages(axis: Axes, plan: Plan) -> None:
    names = [str(stage.range) for stage in plan.stages]
    places = np.arange(len(names), dtype=np.float64)
    one = plan.problem.service(0, len(plan.problem.edges) - 1, plan.problem.n_instances)
    axis.bar(places, [1e3 * stage.service.step_s for stage in plan.stages], width=0.6, color=style_of(1)["color"])
    for place, stage in zip(places, plan.stages, strict=True):
        text = f"batch {stage.service.batch:.0f}\nbusy {stage.service.utilisation:.0%}"
        axis.annotate(
            text, (place, 0.0), xytext=(0, 3), textcoords="offset points", ha="center", color="white", fontsize=7
        )
    if np.isfinite(one.step_s) and len(plan.stages) > 1:
        axis.axhline(1e3 * one.step_s, color="#333333", linewidth=1.0, linestyle="--", label="one stage")
        axis.legend(fontsize=8, loc="upper left")
    axis.set_xticks(places, names, fontsize=8)
    axis.set_xlabel("stage", fontsize=9)
    axis.set_ylabel("step time, ms", fontsize=9)


def _costs(axis: Axes, plan: Plan) -> None:
    costs = np.asarray(plan.cost_by_stages, dtype=np.float64)
    counts = np.arange(1, len(costs) + 1)
    finite = np.isfinite(costs)
    chosen = counts[finite] == len(plan.stages)
    colours = [style_of(0)["color"] if c else "#aab7b8" for c in chosen.tolist()]
    axis.bar(counts[finite], costs[finite], width=0.7, color=colours)
    axis.set_xticks(counts)
    axis.set_xlabel("number of stages (chosen: dark)", fontsize=9)
    axis.set_ylabel("predicted objective", fontsize=9)

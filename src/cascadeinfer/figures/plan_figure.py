"""A plan drawn: requests, tokens and work over length, the stages, and the cost by number of stages."""

from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cascadeinfer.core.cost.histogram import Column
from cascadeinfer.core.plan.objective import (
    BalancedLatency,
    MeanNormalizedLatency,
    Objective,
    SloAttainment,
    WeightedLatency,
)
from cascadeinfer.core.plan.planner import Plan
from cascadeinfer.figures.drawing import grid_figure, logarithmic, style_of

WHITE: Final = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
"""Behind words that a line may cross."""
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
    for number, boundary in enumerate(plan.boundaries_tokens):
        name = "stage boundaries" if number == 0 else None
        axis.axvline(boundary, color="#333333", linewidth=1.0, linestyle=":", label=name)
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
    axis.legend(fontsize=8, loc="upper left", framealpha=0.8)


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
    steps_ms = [1e3 * stage.service.step_s for stage in plan.stages]
    axis.bar(places, steps_ms, width=0.6, color=style_of(1)["color"], label="with these stages")
    for place, step_ms, stage in zip(places, steps_ms, plan.stages, strict=True):
        service = stage.service
        text = f"{step_ms:.3g} ms\nbatch {service.batch:.3g}\nbusy {service.utilisation:.0%}"
        _above(axis, float(place), step_ms, text)
    highest_ms = max(steps_ms)
    if np.isfinite(one.step_s) and len(plan.stages) > 1:
        one_ms = 1e3 * one.step_s
        axis.axhline(one_ms, color="#333333", linewidth=1.0, linestyle="--", label=f"with one stage: {one_ms:.3g} ms")
        highest_ms = max(highest_ms, one_ms)
    axis.set_ylim(0.0, 1.45 * highest_ms)
    axis.legend(fontsize=8, loc="upper left")
    axis.set_xticks(places, names, fontsize=8)
    axis.set_xlim(-0.7, max(len(names), 2) - 0.3)
    axis.set_xlabel("stage: lengths in tokens", fontsize=9)
    axis.set_ylabel("step time, ms", fontsize=9)


def _costs(axis: Axes, plan: Plan) -> None:
    label, factor = _axis_of(plan.problem.objective)
    costs = factor * np.asarray(plan.cost_by_stages, dtype=np.float64)
    counts = np.arange(1, len(costs) + 1)
    chosen = len(plan.stages)
    finite = np.isfinite(costs)
    for is_chosen, colour, name in ((True, style_of(0)["color"], "this plan"), (False, "#aab7b8", "other plans")):
        shown = finite & ((counts == chosen) == is_chosen)
        if shown.any():
            axis.bar(counts[shown], costs[shown], width=0.7, color=colour, label=name)
    own = costs[chosen - 1]
    for count, cost in zip(counts[finite].tolist(), costs[finite].tolist(), strict=True):
        _above(axis, count, cost, f"{cost:.4g}" if count == chosen or own <= 0.0 else _difference(cost, own))
    axis.set_ylim(0.0, 1.35 * float(costs[finite].max()) or 1.0)
    if not finite.all():
        axis.plot(
            counts[~finite], np.zeros(int((~finite).sum())), "x", color="#333333", clip_on=False, zorder=4,
            label="cannot carry the load",
        )  # fmt: skip
    axis.set_xticks(counts)
    axis.legend(fontsize=8, loc="upper right")
    axis.set_xlabel("number of stages (%: against this plan)", fontsize=9)
    axis.set_ylabel(label, fontsize=9)


def _difference(cost: float, own: float) -> str:
    """How much more another plan costs than this one, in per cent."""
    return f"{100.0 * (cost / own - 1.0):+.2g} %"


def _above(axis: Axes, place: float, height: float, text: str) -> None:
    """Write above a bar."""
    axis.annotate(
        text, (place, height), xytext=(0, 4), textcoords="offset points", ha="center", fontsize=7, zorder=5, bbox=WHITE
    )


def _axis_of(objective: Objective) -> tuple[str, float]:
    """The label of an axis for values of an objective, with the unit, and the factor that leads to it."""
    match objective:
        case MeanNormalizedLatency():
            return "mean normalised latency, ms per token", 1e3
        case BalancedLatency():
            return f"{objective.normalised_share:.0%} by request, the rest by token; ms per token", 1e3
        case WeightedLatency():
            return f"{objective.ttft_weight:g} x TTFT + {objective.tpot_weight:g} x TPOT, s", 1.0
        case SloAttainment():
            return "requests that miss the SLO, %", 100.0
        case _:
            return "predicted objective, in its own unit", 1.0

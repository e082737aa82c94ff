"""
A run over time, per stage: running requests, their mean length, KV in use, step time, and the boundaries between
stages.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from cascadeinfer.core.layout import StageLayout
from cascadeinfer.figures.drawing import curve_style, grid_figure, logarithmic, style_of
from cascadeinfer.results.records import InstanceSamples

BINS: Final = 120
"""Most points per curve; the reports within one are averaged."""

LONG_GAP: Final = 3.0
"""A gap of more than this many usual ones between two points breaks a curve."""

PANELS: Final = (
    ("running requests per instance", "running", 1.0),
    ("mean running length, tokens", "mean_tokens", 1.0),
    ("KV cache in use, %", "kv_use", 100.0),
    ("step time, ms", "step_s", 1e3),
)


def stage_timelines(samples: InstanceSamples, layouts: Sequence[tuple[float, StageLayout]], title: str) -> Figure:
    """
    Four panels over time, one curve per stage, and a fifth with the boundaries if there are any.

    Args:
        samples: Reports of the instances.
        layouts: Layouts with the time from which each was in force.
        title: Title of the figure.
    """
    bounded = any(layout.boundaries_tokens for _, layout in layouts)
    figure, axes = grid_figure(3 if bounded else 2, 2, f"{title} (simulated)", height=2.6)
    for axis, (label, field, factor) in zip(axes, PANELS, strict=False):
        stages = np.unique(samples.stage).tolist()
        for number, stage in enumerate(stages):
            values = np.asarray(factor * getattr(samples, field), dtype=np.float64)
            if field == "step_s":
                values = np.where(values > 0.0, values, np.nan)  # an instance that did not step has no step time
            times, means = binned(samples, stage, values)
            name = "all instances" if stage < 0 else f"stage {stage}"
            axis.plot(times, means, label=name, **_seen_beneath(number, len(stages)))
        axis.set_ylabel(label, fontsize=8)
        axis.set_xlabel("time, s", fontsize=8)
        axis.set_ylim(bottom=0.0)
    axes[0].legend(fontsize=8)
    if bounded:
        end_s = float(samples.time_s[-1])
        _boundaries(axes[4], layouts, end_s)
        _instances(axes[5], layouts, end_s)
    return figure


def _seen_beneath(number: int, n_curves: int) -> dict[str, Any]:
    """As `curve_style`, without markers."""
    return curve_style(number, n_curves) | {"marker": None}


def binned(
    samples: InstanceSamples, stage: int, values: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """
    Mean of the values of one stage's reports over equal intervals of time. Intervals without any are left out; where
    more of them than usual follow one another, NaN breaks the curve, which would bridge what was not reported.
    """
    chosen = (samples.stage == stage) & np.isfinite(values)
    edges = np.linspace(0.0, max(float(samples.time_s[-1]), 1e-9), BINS + 1)
    places = np.clip(np.searchsorted(edges, samples.time_s[chosen], side="right") - 1, 0, BINS - 1)
    counts = np.bincount(places, minlength=BINS)
    sums = np.bincount(places, weights=values[chosen], minlength=BINS)
    filled = np.flatnonzero(counts)
    times, means = (0.5 * (edges[:-1] + edges[1:]))[filled], sums[filled] / counts[filled]
    steps = np.diff(filled)
    breaks = np.flatnonzero(steps > LONG_GAP * np.median(steps)) + 1 if len(steps) else np.empty(0, dtype=np.int64)
    return np.insert(times, breaks, np.nan), np.insert(means, breaks, np.nan)


def _boundaries(axis: Axes, layouts: Sequence[tuple[float, StageLayout]], end_s: float) -> None:
    """Draw each boundary as a step curve."""
    times = [since for since, _ in layouts] + [end_s]
    most = max(len(layout.boundaries_tokens) for _, layout in layouts)
    for index in range(most):
        column = [
            float(layout.boundaries_tokens[index]) if index < len(layout.boundaries_tokens) else np.nan
            for _, layout in layouts
        ]
        name = f"between stages {index} and {index + 1}"
        axis.step(times, [*column, column[-1]], where="post", linewidth=1.2, label=name, **style_of(index))
    logarithmic(axis, "y")
    axis.set_ylabel("boundaries, tokens", fontsize=8)
    axis.set_xlabel("time, s", fontsize=8)
    axis.legend(fontsize=7, framealpha=0.8)


def _instances(axis: Axes, layouts: Sequence[tuple[float, StageLayout]], end_s: float) -> None:
    times = [since for since, _ in layouts] + [end_s]
    most = max(len(layout.stages) for _, layout in layouts)
    for index in range(most):
        column = [
            float(len(layout.stages[index].instance_ids)) if index < len(layout.stages) else np.nan
            for _, layout in layouts
        ]
        style = _seen_beneath(index, most)
        axis.step(times, [*column, column[-1]], where="post", label=f"stage {index}", **style)
    axis.set_ylim(bottom=0.0)
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylabel("instances per stage", fontsize=8)
    axis.set_xlabel("time, s", fontsize=8)
    axis.legend(fontsize=7, framealpha=0.8)

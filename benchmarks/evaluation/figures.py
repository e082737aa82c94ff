"""Plots of the evaluation: one panel per trace, one curve per policy, over the load."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from cells import Results
from compare import Field, Point, mean
from grid import LOADS, OVERLOAD, POOLS, POOLS_LOADS, TRACES
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from cascadeinfer.figures.drawing import Limits, curve_style, draw_within, grid_figure, logarithmic, nines, save

COLUMNS = 4
HEADROOM: Final = 1.15
"""Room above the highest curve and below the lowest, as a factor."""
Curves = dict[str, NDArray[np.float64]]


def over_load(
    results: Results, profile: str, policies: Sequence[str], field: Field, label: str, file: Path, *, log: bool
) -> None:
    """Draw one figure of a profile."""
    save(over_load_figure(results, profile, policies, field, label, log=log), file)


def over_load_figure(
    results: Results, profile: str, policies: Sequence[str], field: Field, label: str, *, log: bool
) -> Figure:
    """
    One figure of a profile.

    Args:
        results: All cells.
        profile: Whose.
        policies: The curves.
        field: What is drawn.
        label: Its name, with the unit.
        log: Whether its axis is logarithmic; if not, it is a share.
    """
    rows = math.ceil((len(TRACES) + 1) / COLUMNS)
    figure, axes = grid_figure(rows, COLUMNS, f"{profile}: {label} (simulated)", width=3.6, height=2.9)
    loads = np.array((*LOADS, OVERLOAD))
    has_beyond = False
    for place, (axis, trace) in enumerate(zip(axes, TRACES, strict=False)):
        curves = {
            policy: np.array([mean(results, Point(profile, trace, load), policy, field) for load in loads])
            for policy in policies
        }
        limits = limits_of(curves) if log else Limits(0.0, 1.0)
        for number, (policy, values) in enumerate(curves.items()):
            draw_within(axis, loads, values, limits, curve_style(number, len(curves)), policy)
            has_beyond |= bool((values > limits.high).any())
        _scale(axis, limits, log=log)
        axis.set_xticks(loads)
        axis.set_title(trace, fontsize=8)
        axis.set_xlabel("load, share of what one stage carries", fontsize=8)
        if place % COLUMNS == 0:
            axis.set_ylabel(label, fontsize=7)
    for axis in axes[len(TRACES) :]:
        axis.set_axis_off()
    _legend(axes, has_beyond=has_beyond)
    return figure


def limits_of(curves: Curves) -> Limits:
    """The range of a panel: that of all curves but the pools', which may be a hundred times as high as any other."""
    values = np.concatenate([column for policy, column in curves.items() if policy != POOLS])
    values = values[np.isfinite(values) & (values > 0.0)]
    if not len(values):
        return Limits(0.1, 1.0)
    return Limits(float(values.min()) / HEADROOM, float(values.max()) * HEADROOM)


def _scale(axis: Axes, limits: Limits, *, log: bool) -> None:
    if log:
        axis.set_ylim(limits)
        logarithmic(axis, "y")
    else:
        nines(axis, 1.0)


def _legend(axes: Sequence[Axes], *, has_beyond: bool) -> None:
    """In the empty place after the last panel."""
    handles, labels = axes[0].get_legend_handles_labels()
    if has_beyond:
        handles.append(Line2D([], [], linestyle="none", marker="^", markersize=7, fillstyle="none", color="#555555"))
        labels.append("above the panel, at the value beside it")
    title = f"{POOLS} was run up to a load of {max(POOLS_LOADS):g}" if POOLS in labels else None
    axes[-1].legend(handles, labels, fontsize=8, loc="center", title=title, title_fontsize=7)

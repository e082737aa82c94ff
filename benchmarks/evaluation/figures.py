"""Plots of the evaluation: one panel per trace, one curve per policy, over the load."""

import math
from collections.abc import Sequence
from pathlib import Path

from cells import Results
from compare import Field, Point, mean
from grid import LOADS, OVERLOAD, TRACES

from cascadeinfer.figures.drawing import grid_figure, logarithmic, save, style_of

COLUMNS = 4


def over_load(
    results: Results, profile: str, policies: Sequence[str], field: Field, label: str, file: Path, *, log: bool
) -> None:
    """Draw one figure of a profile."""
    rows = math.ceil(len(TRACES) / COLUMNS)
    figure, axes = grid_figure(rows, COLUMNS, f"{profile}: {label} (simulated)", width=3.4, height=2.7)
    loads = (*LOADS, OVERLOAD)
    for axis, trace in zip(axes, TRACES, strict=False):
        for number, policy in enumerate(policies):
            values = [mean(results, Point(profile, trace, load), policy, field) for load in loads]
            axis.plot(loads, values, marker="o", markersize=3, linewidth=1.3, label=policy, **style_of(number))
        if log:
            logarithmic(axis, "y")
        else:
            axis.set_ylim(0.0, 1.03)
        axis.set_title(trace, fontsize=8)
        axis.set_xlabel("load", fontsize=8)
    for axis in axes[len(TRACES) :]:
        axis.set_axis_off()
    handles, labels = axes[0].get_legend_handles_labels()
    axes[-1].legend(handles, labels, fontsize=8, loc="center")
    save(figure, file)

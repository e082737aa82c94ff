"""Figures over the request rate: latency and SLO curves of policies, with confidence bands over the seeds."""

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from matplotlib.figure import Figure

from cascadeinfer.figures.drawing import grid_figure, logarithmic, style_of
from cascadeinfer.results.summary import RunSummary, interval

PANELS: Final = (
    ("normalised latency, ms per token", "normalised_latency_s_mean", 1e3),
    ("end-to-end latency p99, s", "e2e_s_p99", 1.0),
    ("output tokens per second", "throughput_tokens_per_s", 1.0),
    ("requests within the SLO, %", "slo_attainment", 100.0),
)
LOGARITHMIC: Final = frozenset({"normalised_latency_s_mean", "e2e_s_p99"})


def rate_curves(curves: Mapping[str, Sequence[Sequence[RunSummary]]], rates_rps: Sequence[float], title: str) -> Figure:
    """
    Four panels over the rate, one curve per policy.

    Args:
        curves: Per policy and rate, one summary per seed.
        rates_rps: The rates, in requests per second.
        title: Title of the figure.
    """
    figure, axes = grid_figure(2, 2, f"{title} (simulated)")
    for axis, (label, field, factor) in zip(axes, PANELS, strict=True):
        for number, (name, curve) in enumerate(curves.items()):
            points = [interval([factor * getattr(run, field) for run in runs]) for runs in curve]
            means = np.array([point.mean for point in points])
            half = np.array([point.half_width for point in points])
            style = style_of(number)
            axis.plot(rates_rps, means, marker="o", markersize=3, label=name, linewidth=1.4, **style)
            if np.all(np.isfinite(half)):
                axis.fill_between(
                    rates_rps,
                    np.maximum(means - half, 1e-9),
                    means + half,
                    color=style["color"],
                    alpha=0.12,
                    linewidth=0,
                )
        if field in LOGARITHMIC:
            logarithmic(axis, "y")
        else:
            axis.set_ylim(bottom=0.0)
        axis.set_xlabel("requests per second", fontsize=9)
        axis.set_ylabel(label, fontsize=9)
    axes[0].legend(fontsize=8)
    return figure

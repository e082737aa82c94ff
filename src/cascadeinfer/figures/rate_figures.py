"""Figures over the request rate: latency and SLO curves of policies, with confidence bands over the seeds."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from cascadeinfer.figures.drawing import curve_style, grid_figure, logarithmic, nines
from cascadeinfer.results.summary import RunSummary, interval, is_short

PANELS: Final = (
    ("normalised latency, ms per token", "normalised_latency_s_mean", 1e3),
    ("end-to-end latency p99, s", "e2e_s_p99", 1.0),
    ("output tokens per second", "throughput_tokens_per_s", 1.0),
    ("requests within the SLO, %", "slo_attainment", 100.0),
)
ATTAINMENT: Final = "slo_attainment"
LOGARITHMIC: Final = frozenset({"normalised_latency_s_mean", "e2e_s_p99"})


def rate_curves(
    curves: Mapping[str, Sequence[Sequence[RunSummary]]],
    rates_rps: Sequence[float],
    title: str,
    spans_s: Sequence[float],
) -> Figure:
    """
    Four panels over the rate, one curve per policy; hollow points are runs too short to be steady.

    Args:
        curves: Per policy and rate, one summary per seed.
        rates_rps: The rates, in requests per second.
        title: Title of the figure.
        spans_s: For how long requests came at each rate.
    """
    figure, axes = grid_figure(2, 2, f"{title} (simulated)")
    rates = np.asarray(rates_rps, dtype=np.float64)
    has_band, has_short = False, False
    for axis, (label, field, factor) in zip(axes, PANELS, strict=True):
        for number, (name, curve) in enumerate(curves.items()):
            points = [interval([factor * getattr(run, field) for run in runs]) for runs in curve]
            means = np.array([point.mean for point in points])
            half = np.array([point.half_width for point in points])
            style = curve_style(number, len(curves))
            axis.plot(rates, means, label=name, **style)
            has_band |= _band(axis, rates, means, half, style, top=100.0 if field == ATTAINMENT else np.inf)
            short = np.array(
                [any(is_short(span_s, run) for run in runs) for span_s, runs in zip(spans_s, curve, strict=True)]
            )
            has_short |= bool(short.any())
            axis.plot(
                rates[short], means[short], linestyle="none", marker=style["marker"], markersize=style["markersize"],
                color=style["color"], markerfacecolor="white", zorder=4,
            )  # fmt: skip
        _scale(axis, field, [line.get_ydata() for line in axis.lines])
        axis.set_xlabel("requests per second", fontsize=9)
        axis.set_ylabel(label, fontsize=9)
    handles, names = axes[0].get_legend_handles_labels()
    if has_band:
        handles, names = [*handles, Patch(color="#777777", alpha=0.2)], [*names, "95 % interval over the seeds"]
    if has_short:
        hollow = Line2D([], [], linestyle="none", marker="o", markerfacecolor="white", color="#777777")
        handles, names = [*handles, hollow], [*names, "run too short to be steady"]
    axes[0].legend(handles, names, fontsize=7, framealpha=0.8)
    return figure


def _band(
    axis: Axes,
    rates: NDArray[np.float64],
    means: NDArray[np.float64],
    half: NDArray[np.float64],
    style: dict[str, Any],
    *,
    top: float,
) -> bool:
    """Draw the interval of each mean, as far as the axis goes; returns whether there is one (more than one seed)."""
    known = np.isfinite(half)
    if not known.any():
        return False
    low, high = np.maximum(means - half, 0.0), np.minimum(means + half, top)
    axis.fill_between(rates, low, high, where=known, color=style["color"], alpha=0.12, linewidth=0)
    return True


def _scale(axis: Axes, field: str, curves: Sequence[Any]) -> None:
    """The vertical axis by its curves alone: an interval may be many times as wide, and may reach zero."""
    if field == ATTAINMENT:
        nines(axis, 100.0)
        return
    values = np.concatenate([np.asarray(curve, dtype=np.float64) for curve in curves])
    values = values[np.isfinite(values) & (values > 0.0)]
    if field not in LOGARITHMIC:
        axis.set_ylim(bottom=0.0)
    elif len(values):
        axis.set_ylim(values.min() / 1.3, values.max() * 1.3)
        logarithmic(axis, "y")

"""Measured step times against those that a fitted model predicts."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from cascadeinfer.core.cost.fit import StepSamples, region_masks
from cascadeinfer.figures.drawing import COLOURS, grid_figure, logarithmic

Column = NDArray[np.float64]
BAND: Final = 0.1
"""Shaded: predictions within 10 %."""
MARKERS: Final = ("o", "^", "s", "D")
MAX_CURVES: Final = 6
ERROR_LIMIT: Final = 60.0
"""Longest error axis, in per cent; points beyond its end stand on the edge, as hollow triangles."""
LEAST_ERROR_LIMIT: Final = 15.0
"""Shortest one."""
INSIDE: Final = 0.98
"""Share of the points that the error axis has room for, if it may be that long."""
BAND_LABEL: Final = f"within {100 * BAND:g} %"


def fit_figure(samples: StepSamples, predicted_s: Column, spread: Column, title: str) -> Figure:
    """
    Predicted over measured, the relative error over the step time, and decode steps over their KV.

    Args:
        samples: Measured steps.
        predicted_s: Prediction for each sample, preferably by a fit that has not seen it.
        spread: Relative spread of each sample; drawn as bars in the third panel.
        title: Title of the figure.
    """
    figure, (against, errors, decode) = grid_figure(1, 3, title, width=4.6, height=3.9)
    masks = {name: mask for name, mask in region_masks(samples).items() if mask.any()}
    measured_ms, predicted_ms = 1e3 * samples.step_s, 1e3 * predicted_s
    ends = np.array([min(measured_ms.min(), predicted_ms.min()), max(measured_ms.max(), predicted_ms.max())])
    against.plot(ends, ends, color="#777777", linewidth=0.8, zorder=0)
    shade: dict[str, Any] = {"color": "#bbbbbb", "alpha": 0.35, "linewidth": 0, "zorder": 0, "label": BAND_LABEL}
    against.fill_between(ends, (1 - BAND) * ends, (1 + BAND) * ends, **shade)
    errors.axhspan(-100 * BAND, 100 * BAND, **shade)
    percent = 100 * (predicted_s / samples.step_s - 1)
    limit = float(np.clip(1.1 * np.quantile(np.abs(percent), INSIDE), LEAST_ERROR_LIMIT, ERROR_LIMIT))
    for number, (name, mask) in enumerate(masks.items()):
        style: dict[str, Any] = {
            "color": COLOURS[number],
            "marker": MARKERS[number % len(MARKERS)],
            "s": 13,
            "alpha": 0.65,
            "linewidths": 0,
        }
        against.scatter(measured_ms[mask], predicted_ms[mask], label=f"{name} ({mask.sum()})", **style)
        inside = mask & (np.abs(percent) <= limit)
        errors.scatter(measured_ms[inside], percent[inside], label=name, **style)
        for marker, beyond in (("^", mask & (percent > limit)), ("v", mask & (percent < -limit))):
            edge = np.clip(percent[beyond], -limit, limit)
            errors.scatter(
                measured_ms[beyond],
                edge,
                marker=marker,
                s=40,
                facecolors="none",
                edgecolors=COLOURS[number],
                clip_on=False,
            )
    for axis in (against, errors):
        logarithmic(axis, "x")
        axis.set_xlabel("measured step, ms", fontsize=9)
    logarithmic(against, "y")
    against.set_ylabel("predicted step, ms (held out)", fontsize=9)
    against.legend(fontsize=7, loc="upper left", framealpha=0.9)
    errors.set_ylabel("predicted / measured - 1, %", fontsize=9)
    errors.set_ylim(-limit, limit)
    _error_legend(errors, int((np.abs(percent) > limit).sum()), limit)
    _decode_panel(decode, samples, predicted_s, spread, masks)
    return figure


def _error_legend(errors: Axes, n_beyond: int, limit: float) -> None:
    handles, labels = errors.get_legend_handles_labels()
    if n_beyond:
        handles.append(Line2D([], [], linestyle="none", marker="^", fillstyle="none", color="#777777"))
        labels.append(f"beyond {limit:.0f} % ({n_beyond})")
    errors.legend(handles, labels, fontsize=7, loc="best", framealpha=0.8)


def _decode_panel(
    panel: Axes, samples: StepSamples, predicted_s: Column, spread: Column, masks: Mapping[str, NDArray[np.bool_]]
) -> None:
    """Decode steps of similar lengths over their KV, one colour per count: points measured, lines predicted."""
    like = masks.get("decode, like lengths", np.zeros(len(samples), dtype=np.bool_))
    counts = sorted(set(samples.n_decode[like].tolist()))
    shown = (
        [counts[i] for i in sorted(set(np.linspace(0, len(counts) - 1, MAX_CURVES).round().astype(int)))]
        if counts
        else []
    )
    for number, count in enumerate(shown):
        mask = like & (samples.n_decode == count)
        order = np.argsort(samples.kv_tokens[mask])
        kv, measured_ms = samples.kv_tokens[mask][order], 1e3 * samples.step_s[mask][order]
        colour = COLOURS[number % len(COLOURS)]
        bars = measured_ms * spread[mask][order]
        panel.errorbar(
            kv,
            measured_ms,
            bars,
            fmt="o",
            markersize=3,
            linewidth=0.8,
            color=colour,
            label=f"{count:g} request{'s' if count != 1 else ''}",
        )
        panel.plot(kv, 1e3 * predicted_s[mask][order], color=colour, linewidth=1.0)
    logarithmic(panel, "x")
    logarithmic(panel, "y")
    panel.set_xlabel("KV tokens in the batch", fontsize=9)
    panel.set_ylabel("decode step, ms", fontsize=9)
    if shown:
        handles, labels = panel.get_legend_handles_labels()
        handles += [Line2D([], [], linestyle="none", marker="o", markersize=3, color="#777777")]
        handles += [Line2D([], [], linewidth=1.0, color="#777777")]
        labels += ["measured, with its spread", "predicted"]
        panel.legend(handles, labels, fontsize=7, loc="upper left", framealpha=0.9)

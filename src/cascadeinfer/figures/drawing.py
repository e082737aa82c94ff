"""
What all figures share (size, colours, saving), and distributions of latencies.

Records and summaries in, a matplotlib `Figure` out. Nothing is computed here that `summary.py` provides, and only
`save` writes anything. Figures are made without pyplot, so there is no global state and no window. Needs the extra
`figures`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

from cascadeinfer.results.output_files import replacing
from cascadeinfer.results.records import RequestRecords

DPI: Final = 110
COLOURS: Final = ("#c0392b", "#2471a3", "#229954", "#7d3c98", "#b9770e", "#17a589", "#5d6d7e", "#d4ac0d")
"""In the order of the policies; dark enough for white paper, distinct in hue and lightness."""
DASHES: Final = ("-", "--", "-.", ":")
MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X", "h")
NEARLY_ALL: Final = 1e-3
"""Shares closer to the whole than this are drawn as the whole (`nines`)."""
CDF_POINTS: Final = 400

LATENCIES: Final = (
    ("time to first token, s", "ttft_s"),
    ("time per output token, s", "tpot_s"),
    ("normalised latency, s per token", "normalised_latency_s"),
    ("end-to-end latency, s", "e2e_s"),
)


class Limits(NamedTuple):
    """The range of an axis."""

    low: float
    high: float


def grid_figure(
    rows: int, columns: int, title: str, *, width: float = 5.0, height: float = 3.2
) -> tuple[Figure, list[Axes]]:
    """An empty figure with this many panels, each `width` by `height` inches, row by row."""
    figure = Figure(figsize=(width * columns, height * rows + 0.3), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    figure.suptitle(title, fontsize=10)
    axes: list[Axes] = [panel for row in panels for panel in row]
    for panel in axes:
        panel.grid(visible=True, alpha=0.25)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def style_of(number: int) -> dict[str, Any]:
    """Colour and dashes of a policy or stage, by its number."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[(number // len(COLOURS)) % len(DASHES)]}


def curve_style(number: int, n_curves: int) -> dict[str, Any]:
    """
    Colour, dashes, marker and width of one of several curves that may coincide: the earlier ones are thicker, so that
    each is seen beneath those drawn over it.
    """
    lower = (n_curves - 1 - number) / max(1, n_curves - 1)
    marker = MARKERS[number % len(MARKERS)]
    return {**style_of(number), "linewidth": 1.0 + 1.8 * lower, "marker": marker, "markersize": 3.0 + 3.0 * lower}


def draw_within(
    panel: Axes, x: NDArray[np.float64], y: NDArray[np.float64], limits: Limits, style: dict[str, Any], label: str
) -> None:
    """
    Draw a curve whose points beyond the limits of the vertical axis stand on its edge, as hollow triangles that point
    outwards with the value beside them.
    """
    panel.plot(x, y, label=label, clip_on=True, **style)
    for mark, beyond, edge, shift in (("^", y > limits.high, limits.high, -9), ("v", y < limits.low, limits.low, 5)):
        for at, value in zip(x[beyond].tolist(), y[beyond].tolist(), strict=True):
            panel.plot(
                [at], [edge], marker=mark, markersize=7, fillstyle="none", color=style["color"], clip_on=False, zorder=4
            )
            panel.annotate(
                f"{value:,.0f}" if value >= 1000.0 else f"{value:.3g}",
                (at, edge),
                xytext=(6, shift),
                textcoords="offset points",
                fontsize=7,
                color=style["color"],
            )


def nines(panel: Axes, whole: float) -> None:
    """
    Make a vertical axis of shares show differences near the whole: from 90 to 99 % is as far as from 0 to 90 %.

    Args:
        panel: Whose axis; its curves are shares of `whole`.
        whole: 1.0, or 100.0 for per cent.
    """

    def forward(share: NDArray[np.float64]) -> NDArray[np.float64]:
        missing = np.clip(1.0 - np.asarray(share, dtype=np.float64) / whole, 0.0, None)
        return -np.log10(missing + NEARLY_ALL)

    def back(distance: NDArray[np.float64]) -> NDArray[np.float64]:
        return whole * (1.0 + NEARLY_ALL - 10.0 ** -np.asarray(distance, dtype=np.float64))

    panel.set_yscale("function", functions=(forward, back))
    panel.set_ylim(0.0, whole)
    panel.yaxis.set_major_locator(FixedLocator([whole * share for share in (0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 1.0)]))
    panel.yaxis.set_minor_locator(FixedLocator([]))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for line in panel.lines:
        line.set_clip_on(False)  # points at the whole lie on the edge


def logarithmic(panel: Axes, which: Literal["x", "y"]) -> None:
    """
    Make an axis logarithmic with ticks like 0.1, 1, 10 rather than powers; below two decades also at 2 and 5, and below
    one also between them.
    """
    (panel.set_xscale if which == "x" else panel.set_yscale)("log")
    axis = panel.xaxis if which == "x" else panel.yaxis
    low, high = panel.get_xlim() if which == "x" else panel.get_ylim()
    ratio = high / max(low, 1e-300)
    subs = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0) if ratio < 10.0 else (1.0, 2.0, 5.0) if ratio < 100.0 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_minor_locator(LogLocator(subs=tuple(range(2, 10))))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def save(figure: Figure, file: Path) -> None:
    """
    Write a PNG.

    Raises:
        ConfigError: The file cannot be written.
    """
    with replacing(file, "--plot") as beside:
        figure.savefig(beside, format="png", dpi=DPI, metadata={"Software": "cascadeinfer"})


def latency_cdfs(runs: Mapping[str, Sequence[RequestRecords]], title: str) -> Figure:
    """
    Share of the finished requests within each latency, one curve per policy or server.

    Args:
        runs: Per policy or server, the counted requests of each seed or run, which are pooled.
        title: Title of the figure; says whether this was simulated or measured.
    """
    figure, axes = grid_figure(2, 2, title)
    for axis, (label, field) in zip(axes, LATENCIES, strict=True):
        for number, (name, per_seed) in enumerate(runs.items()):
            pooled = np.concatenate([getattr(records, field) for records in per_seed])
            values, shares = distribution(pooled)
            style = curve_style(number, len(runs)) | {"marker": None}
            axis.plot(values, shares, label=f"{name}: {_median_and_tail(pooled)}", **style)
        logarithmic(axis, "x")
        axis.set_xlabel(label, fontsize=9)
        axis.set_ylabel("share of finished requests", fontsize=9)
        axis.set_ylim(0.0, 1.01)
        axis.legend(fontsize=7, loc="best", framealpha=0.8)
    return figure


def _median_and_tail(values: NDArray[np.float64]) -> str:
    """The two quantiles that curves show badly where they nearly coincide."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return "none"
    median, tail = np.quantile(finite, [0.5, 0.99]).tolist()
    return f"median {median:.3g}, p99 {tail:.3g}"


def distribution(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Quantiles and their shares, finite values only, at no more points than a screen shows; the ends are exact."""
    finite = np.sort(values[np.isfinite(values)])
    if not len(finite):
        return np.empty(0), np.empty(0)
    shares = np.linspace(0.0, 1.0, min(CDF_POINTS, len(finite)))
    return np.quantile(finite, shares), shares

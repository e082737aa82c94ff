"""
What all figures share (size, colours, saving), and distributions of latencies.

Records and summaries in, a matplotlib `Figure` out. Nothing is computed here that `summary.py` provides, and only
`save` writes anything. Figures are made without pyplot, so there is no global state and no window. Needs the extra
`figures`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

from cascadeinfer.results.output_files import replacing
from cascadeinfer.results.records import RequestRecords

DPI: Final = 110
COLOURS: Final = ("#c0392b", "#2471a3", "#229954", "#7d3c98", "#b9770e", "#17a589", "#5d6d7e", "#d4ac0d")
"""In the order of the policies; dark enough for white paper, distinct in hue and lightness."""
DASHES: Final = ("-", "--", "-.", ":")
CDF_POINTS: Final = 400

LATENCIES: Final = (
    ("time to first token, s", "ttft_s"),
    ("time per output token, s", "tpot_s"),
    ("normalised latency, s per token", "normalised_latency_s"),
    ("end-to-end latency, s", "e2e_s"),
)


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


def logarithmic(panel: Axes, which: Literal["x", "y"]) -> None:
    """Make an axis logarithmic with ticks like 0.1, 1, 10 rather than powers; below two decades also at 2 and 5."""
    (panel.set_xscale if which == "x" else panel.set_yscale)("log")
    axis = panel.xaxis if which == "x" else panel.yaxis
    low, high = panel.get_xlim() if which == "x" else panel.get_ylim()
    narrow = high < 100.0 * max(low, 1e-300)
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if narrow else (1.0,)))
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
            values, shares = distribution(np.concatenate([getattr(records, field) for records in per_seed]))
            axis.plot(values, shares, label=name, linewidth=1.4, **style_of(number))
        logarithmic(axis, "x")
        axis.set_xlabel(label, fontsize=9)
        axis.set_ylabel("share of requests", fontsize=9)
        axis.set_ylim(0.0, 1.01)
    axes[0].legend(fontsize=8, loc="lower right", framealpha=0.9)
    return figure


def distribution(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Quantiles and their shares, finite values only, at no more points than a screen shows; the ends are exact."""
    finite = np.sort(values[np.isfinite(values)])
    if not len(finite):
        return np.empty(0), np.empty(0)
    shares = np.linspace(0.0, 1.0, min(CDF_POINTS, len(finite)))
    return np.quantile(finite, shares), shares

"""Tables of simulated figures: a row per policy, a column per figure, the mean over seeds with its 95 % interval."""

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from cascadeinfer.results.summary import Interval, RunSummary

PIPE_COLUMNS: Final = 200
"""Table width when standard output is not a terminal, wide enough that nothing is cut off in a file."""


class Figure(NamedTuple):
    """A column: heading, field of `RunSummary`, factor to the displayed unit, better direction (0: neither)."""

    heading: str
    field: str
    factor: float = 1.0
    better: int = -1


FIGURES: Final = (
    Figure("TTFT s", "ttft_s_mean"),
    Figure("TPOT ms", "tpot_s_mean", 1e3),
    Figure("norm. latency ms", "normalised_latency_s_mean", 1e3),
    Figure("e2e s", "e2e_s_mean"),
    Figure("e2e p50 s", "e2e_s_p50"),
    Figure("e2e p99 s", "e2e_s_p99"),
    Figure("tokens/s", "throughput_tokens_per_s", 1.0, 1),
    Figure("in SLO %", "slo_attainment", 100.0, 1),
    Figure("goodput req/s", "goodput_rps", 1.0, 1),
    Figure("moves", "migrations", 1.0, 0),
    Figure("preempted", "preemptions", 1.0, 0),
)


def console() -> "Console":
    """The console for standard output."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS)


def progress_bar() -> "Progress":
    """A progress bar on standard error, if that is a terminal: the task, the share done, the time left."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def shown(cell: "Interval") -> str:
    """Three significant digits, or all digits of large numbers, with the half-width to the same decimal place."""
    import math

    if not math.isfinite(cell.mean):
        return "-"
    places = 0 if cell.mean == 0.0 else max(0, 2 - math.floor(math.log10(abs(cell.mean))))
    if not math.isfinite(cell.half_width):
        return f"{cell.mean:,.{places}f}"
    return f"{cell.mean:,.{places}f} ±{cell.half_width:,.{places}f}"


def policy_table(runs: Mapping[str, Sequence["RunSummary"]], title: str) -> "Table":
    """Policies side by side; the best mean of each column is bold."""
    from rich.table import Table

    from cascadeinfer.results.summary import interval

    seeds = len(next(iter(runs.values())))
    table = Table(title=title, caption=f"simulated; {seeds} seed{'s: mean ±95 % confidence' if seeds > 1 else ''}")
    table.add_column("policy", no_wrap=True)
    for figure in FIGURES:
        table.add_column(figure.heading, justify="right")
    cells = {
        name: [interval([f.factor * getattr(run, f.field) for run in per_seed]) for f in FIGURES]
        for name, per_seed in runs.items()
    }
    best = [
        (max if figure.better > 0 else min)(row[i].mean for row in cells.values()) if figure.better else None
        for i, figure in enumerate(FIGURES)
    ]
    for name, row in cells.items():
        row_text = [
            f"[bold]{shown(cell)}[/bold]" if cell.mean == top and len(cells) > 1 else shown(cell)
            for cell, top in zip(row, best, strict=True)
        ]
        table.add_row(name, *row_text)
    return table

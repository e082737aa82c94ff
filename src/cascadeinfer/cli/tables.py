"""
Tables of figures: a row per policy or label, a column per figure, each with its 95 % confidence interval.

Every table fits `WIDTH` columns, so figures that belong together share a table and the rest get their own. A value is
marked as the best of its column only if its interval lies apart from all others: of two that overlap, neither is.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from cascadeinfer.results.estimates import Estimate
    from cascadeinfer.results.summary import Interval, RunSummary

WIDTH: Final = 100
"""Columns of a table, and of standard output when it is not a terminal."""


class Figure(NamedTuple):
    """A column: heading, field of `RunSummary`, factor to the displayed unit, better direction (0: neither)."""

    heading: str
    field: str
    factor: float = 1.0
    better: int = -1


TOKEN_FIGURES: Final = (
    Figure("TTFT s", "ttft_s_mean"),
    Figure("TTFT p99 s", "ttft_s_p99"),
    Figure("TPOT ms", "tpot_s_mean", 1e3),
    Figure("TPOT p99 ms", "tpot_s_p99", 1e3),
    Figure("norm. latency ms", "normalised_latency_s_mean", 1e3),
)
WHOLE_FIGURES: Final = (
    Figure("e2e s", "e2e_s_mean"),
    Figure("e2e p50 s", "e2e_s_p50"),
    Figure("e2e p99 s", "e2e_s_p99"),
    Figure("moves", "migrations", 1.0, 0),
    Figure("shared", "shared", 1.0, 0),
    Figure("preempted", "preemptions", 1.0, 0),
)
RATE_FIGURES: Final = (
    Figure("tokens/s", "throughput_tokens_per_s", 1.0, 1),
    Figure("in SLO %", "slo_attainment", 100.0, 1),
    Figure("goodput req/s", "goodput_rps", 1.0, 1),
)
SWEEP_FIGURES: Final = (*TOKEN_FIGURES, RATE_FIGURES[1])
GROUPS: Final = ((TOKEN_FIGURES, "tokens"), (WHOLE_FIGURES, "whole answers"), (RATE_FIGURES, "rates"))


def console() -> "Console":
    """The console for standard output."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else WIDTH)


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
    if not math.isfinite(cell.mean):
        return "-"
    places = 0 if cell.mean == 0.0 else max(0, 2 - math.floor(math.log10(abs(cell.mean))))
    if not math.isfinite(cell.half_width):
        return f"{cell.mean:,.{places}f}"
    return f"{cell.mean:,.{places}f} ±{cell.half_width:,.{places}f}"


def clear_winner(cells: Sequence["Estimate"], better: int) -> int | None:
    """
    The cell that is better than all others beyond doubt.

    Args:
        cells: Values with their intervals; one without a value does not compete, one without an interval leaves doubt.
        better: 1: more is better; -1: less is better; 0: neither.

    Returns:
        Its place, or None: nothing is better, fewer than two compete, or the best interval touches another.
    """
    competing = [i for i, cell in enumerate(cells) if math.isfinite(cell.value)]
    if not better or len(competing) < 2:
        return None
    best = max(competing, key=lambda i: better * cells[i].value)
    top, others = cells[best], [cells[i] for i in competing if i != best]
    apart = all(top.low > other.high if better > 0 else top.high < other.low for other in others)  # false with NaN
    return best if apart else None


def policy_tables(runs: Mapping[str, Sequence["RunSummary"]], title: str) -> list["Table"]:
    """Policies side by side, one table per group of figures. See the module header for what is bold."""
    return [policy_table(runs, figures, f"{title}: {what}") for figures, what in GROUPS]


def policy_table(runs: Mapping[str, Sequence["RunSummary"]], figures: Sequence[Figure], title: str) -> "Table":
    """These figures of each policy; its runs are those of the seeds."""
    from rich.table import Table

    from cascadeinfer.results.estimates import Estimate
    from cascadeinfer.results.summary import interval

    seeds = len(next(iter(runs.values())))
    meaning = "s: mean ±95 % confidence; bold: better than all others by more than that" if seeds > 1 else ""
    table = Table(title=title, caption=f"simulated; {seeds} seed{meaning}")
    table.add_column("policy", overflow="fold")
    for figure in figures:
        table.add_column(figure.heading, justify="right")
    rows = [[interval([f.factor * getattr(run, f.field) for run in done]) for f in figures] for done in runs.values()]
    spans = [[Estimate(c.mean, c.mean - c.half_width, c.mean + c.half_width) for c in row] for row in rows]
    best = [clear_winner([row[i] for row in spans], figure.better) for i, figure in enumerate(figures)]
    for number, (name, row) in enumerate(zip(runs, rows, strict=True)):
        table.add_row(name, *(marked(shown(cell), top == number) for cell, top in zip(row, best, strict=True)))
    return table


def tell_best_budgets(
    runs: Mapping[str, Sequence["RunSummary"]], policies: Sequence[str], token_budgets: Sequence[int | None]
) -> str:
    """In one line: the token budget at which each policy has the lowest mean normalised latency."""
    from cascadeinfer.evaluation.runs import label_of

    def mean_s(policy: str, budget: int | None) -> float:
        done = runs[label_of(policy, budget)]
        return sum(run.normalised_latency_s_mean for run in done) / len(done)

    best = {policy: min(token_budgets, key=lambda budget: mean_s(policy, budget)) for policy in policies}
    told = ", ".join(f"{policy} {budget}" for policy, budget in best.items())
    return f"token budget with the lowest mean normalised latency: {told}"


def marked(text: str, is_best: bool) -> str:
    """The text of a cell, bold if it is the best of its column."""
    return f"[bold]{text}[/bold]" if is_best else text

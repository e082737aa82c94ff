"""
Tables of `bench`: a row per label, a column per figure.

Each figure has its 95 % confidence interval; ratios are to the first label. There is one table per group of requests.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from rich.table import Table

    from cascadeinfer.results.estimates import Estimate, GroupSummary


class Column(NamedTuple):
    """Heading, figure, factor to the displayed unit, and which direction is better."""

    heading: str
    figure: str
    factor: float = 1.0
    better: int = -1


TOKEN_COLUMNS: Final = (
    *(Column(f"TTFT {name} ms", f"ttft_s_{name}", 1e3) for name in ("mean", "p50", "p99")),
    *(Column(f"TPOT {name} ms", f"tpot_s_{name}", 1e3) for name in ("mean", "p50", "p99")),
)
WHOLE_COLUMNS: Final = (
    *(Column(f"norm. {name} ms", f"normalised_latency_s_{name}", 1e3) for name in ("mean", "p50", "p99")),
    *(Column(f"e2e {name} s", f"e2e_s_{name}") for name in ("mean", "p50", "p99")),
)
RATE_COLUMNS: Final = (
    Column("req/s", "throughput_rps", 1.0, 1),
    Column("tokens/s", "throughput_tokens_per_s", 1.0, 1),
    Column("goodput req/s", "goodput_rps", 1.0, 1),
    Column("in SLO %", "slo_attainment", 100.0, 1),
)
RATIO_COLUMNS: Final = tuple(
    column for column in (*TOKEN_COLUMNS, *WHOLE_COLUMNS, *RATE_COLUMNS) if not column.figure.endswith("_p50")
)

Runs = Mapping[str, Sequence[Mapping[str, "GroupSummary"]]]
"""For each label, the summaries by group of all of its runs."""


def shown(estimate: "Estimate", factor: float = 1.0) -> str:
    """Three significant digits, with half of the interval's width to the same decimal place."""
    value = factor * estimate.value
    if not math.isfinite(value):
        return "-"
    places = 0 if value == 0.0 else max(0, 2 - math.floor(math.log10(abs(value))))
    half = 0.5 * factor * (estimate.high - estimate.low)
    return f"{value:,.{places}f}" + (f" ±{half:,.{places}f}" if math.isfinite(half) else "")


def figure_tables(runs: Runs, title: str) -> list["Table"]:
    """For each group: latency per token and end to end, then rates. The best value of each column is bold."""
    tables = []
    for group in _groups(runs):
        for columns, what in ((TOKEN_COLUMNS, "tokens"), (WHOLE_COLUMNS, "whole answers"), (RATE_COLUMNS, "rates")):
            tables.append(_table(runs, group, columns, f"{title}: {group} requests, {what}"))
    return tables


def _groups(runs: Runs) -> list[str]:
    from cascadeinfer.results.estimates import GROUPS

    present = [name for name in GROUPS if any(name in run for of_label in runs.values() for run in of_label)]
    return ["all"] if present == ["all", "short"] else present  # the same requests


def _table(runs: Runs, group: str, columns: Sequence[Column], title: str) -> "Table":
    from rich.table import Table

    from cascadeinfer.results.estimates import by_group, over_runs

    table = Table(title=title, caption="measured; ± half of the 95 % interval")
    table.add_column("label", no_wrap=True)
    table.add_column("runs", justify="right")
    table.add_column("requests", justify="right")
    table.add_column("failed", justify="right")
    for column in columns:
        table.add_column(column.heading, justify="right")
    rows = {label: by_group(of_label, group) for label, of_label in runs.items()}
    rows = {label: summaries for label, summaries in rows.items() if summaries}
    cells = {
        label: [over_runs([summary.figures[column.figure] for summary in summaries]) for column in columns]
        for label, summaries in rows.items()
    }
    best = [_best([row[i].value for row in cells.values()], column) for i, column in enumerate(columns)]
    for label, summaries in rows.items():
        failed = sum(summary.failed for summary in summaries)
        texts = [
            f"[bold]{shown(cell, column.factor)}[/bold]"
            if cell.value == top and len(rows) > 1
            else shown(cell, column.factor)
            for cell, column, top in zip(cells[label], columns, best, strict=True)
        ]
        table.add_row(
            label,
            str(len(summaries)),
            str(sum(summary.requests for summary in summaries)),
            f"[red]{failed}[/red]" if failed else "0",
            *texts,
        )
    return table


def _best(values: Sequence[float], column: Column) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    return max(finite) if column.better > 0 else min(finite)


def ratio_tables(runs: Runs, title: str) -> list["Table"]:
    """For each group: ratios to the first label's figures, run by run."""
    from rich.table import Table

    from cascadeinfer.results.estimates import ratio_over_runs

    reference, *others = runs
    tables = []
    for group in _groups(runs) if others else ():
        table = Table(
            title=f"{title}: {group} requests, times {reference}",
            caption=(
                "geometric mean over pairs of runs ± half of the 95 % interval; "
                "below 1 is better for latencies, above 1 for rates"
            ),
        )
        table.add_column("label", no_wrap=True)
        for column in RATIO_COLUMNS:
            table.add_column(column.heading.removesuffix(" ms").removesuffix(" s").removesuffix(" %"), justify="right")
        for label in others:
            pairs = [
                (mine[group], theirs[group])
                for mine, theirs in zip(runs[label], runs[reference], strict=False)
                if group in mine and group in theirs
            ]
            ratios = [
                ratio_over_runs(
                    [mine.figures[column.figure] for mine, _ in pairs],
                    [theirs.figures[column.figure] for _, theirs in pairs],
                )
                for column in RATIO_COLUMNS
            ]
            table.add_row(label, *(shown(ratio) for ratio in ratios))
        tables.append(table)
    return tables

"""
Tables of `bench`: a row per label, a column per figure.

Each figure has its 95 % confidence interval; ratios are to the first label. There are three tables per group of
requests, and the last of them counts runs, requests and failures. For what is bold see `tables.py`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from cascadeinfer.cli.tables import clear_winner, marked

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
GROUPS_OF_COLUMNS: Final = ((TOKEN_COLUMNS, "tokens"), (WHOLE_COLUMNS, "whole answers"), (RATE_COLUMNS, "rates"))

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
    """For each group: latency per token and end to end, then rates."""
    tables = []
    for group in _groups(runs):
        for columns, what in GROUPS_OF_COLUMNS:
            tables.append(_table(runs, group, columns, f"{title}: {group} requests, {what}"))
    return tables


def _groups(runs: Runs) -> list[str]:
    from cascadeinfer.results.estimates import GROUPS

    present = [name for name in GROUPS if any(name in run for of_label in runs.values() for run in of_label)]
    return ["all"] if present == ["all", "short"] else present  # the same requests


def _table(runs: Runs, group: str, columns: Sequence[Column], title: str) -> "Table":
    from rich.table import Table

    from cascadeinfer.results.estimates import by_group, over_runs

    counted = columns is RATE_COLUMNS
    table = Table(
        title=title, caption="measured; ± half of the 95 % interval; bold: its interval is apart from all others"
    )
    table.add_column("label", overflow="fold")
    for heading in ("runs", "requests", "failed") if counted else ():
        table.add_column(heading, justify="right")
    for column in columns:
        table.add_column(column.heading, justify="right")
    rows = {label: by_group(of_label, group) for label, of_label in runs.items()}
    rows = {label: summaries for label, summaries in rows.items() if summaries}
    cells = [
        [over_runs([summary.figures[column.figure] for summary in summaries]) for column in columns]
        for summaries in rows.values()
    ]
    best = [clear_winner([row[i] for row in cells], column.better) for i, column in enumerate(columns)]
    for number, (label, summaries) in enumerate(rows.items()):
        texts = [
            marked(shown(cell, column.factor), top == number)
            for cell, column, top in zip(cells[number], columns, best, strict=True)
        ]
        table.add_row(label, *(_counts(summaries) if counted else ()), *texts)
    return table


def _counts(summaries: Sequence["GroupSummary"]) -> tuple[str, str, str]:
    """Runs, their requests, and how many of those failed."""
    failed = sum(summary.failed for summary in summaries)
    requests = sum(summary.requests for summary in summaries)
    return str(len(summaries)), str(requests), f"[red]{failed}[/red]" if failed else "0"


def ratio_tables(runs: Runs, title: str) -> list["Table"]:
    """For each group: ratios to the first label's figures, run by run, without medians."""
    if len(runs) < 2:
        return []
    tables = []
    for group in _groups(runs):
        for columns, what in GROUPS_OF_COLUMNS:
            kept = [column for column in columns if not column.figure.endswith("_p50")]
            tables.append(_ratio_table(runs, group, kept, f"{title}: {group} requests, {what}"))
    return tables


def _ratio_table(runs: Runs, group: str, columns: Sequence[Column], title: str) -> "Table":
    from rich.table import Table

    from cascadeinfer.results.estimates import ratio_over_runs

    reference, *others = runs
    better = "above" if columns[0].better > 0 else "below"
    table = Table(
        title=f"{title}, times {reference}",
        caption=f"geometric mean over pairs of runs ± half of the 95 % interval; {better} 1 is better",
    )
    table.add_column("label", overflow="fold")
    for column in columns:
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
            for column in columns
        ]
        table.add_row(label, *(shown(ratio) for ratio in ratios))
    return table

"""Tables of figures: what they show, how wide they are, and when a winner is marked."""

import math
from collections.abc import Sequence
from dataclasses import fields, replace

import pytest
from rich.console import Console
from rich.table import Table

from cascadeinfer.cli.bench_tables import figure_tables, ratio_tables
from cascadeinfer.cli.tables import WIDTH, clear_winner, policy_tables
from cascadeinfer.results.estimates import LATENCIES, RATES, STATISTICS, Estimate, GroupSummary
from cascadeinfer.results.summary import RunSummary

INTEGERS = {"requests", "unfinished", "migrations", "preemptions", "shared"}


def summary(**changes: float) -> RunSummary:
    """A run with 12,345 in every unit that tables show."""
    given = {f.name: 12_345 if f.name in INTEGERS else 12_345.0 for f in fields(RunSummary)}
    per_token = dict.fromkeys(("tpot_s_mean", "tpot_s_p99", "normalised_latency_s_mean"), 12.345)
    return RunSummary(**(given | per_token | {"slo_attainment": 0.5} | changes))  # type: ignore[arg-type]


def text_of(tables: Sequence[Table], *, width: int = WIDTH, styled: bool = False) -> str:
    """The tables as a console of this width prints them."""
    console = Console(width=width, force_terminal=styled, color_system="standard" if styled else None)
    with console.capture() as captured:
        for table in tables:
            console.print(table)
    return captured.get()


def test_the_tail_stands_beside_the_mean() -> None:
    """Mean and p99 of TTFT and TPOT are in one table."""
    runs = {"cascade": [summary(ttft_s_mean=1.25, ttft_s_p99=7.75, tpot_s_mean=0.0125, tpot_s_p99=0.0375)]}
    row = next(line for line in text_of(policy_tables(runs, "title")).splitlines() if "cascade" in line)
    assert row.replace("│", " ").split() == ["cascade", "1.25", "7.75", "12.5", "37.5", "12,345"]


def test_wide_values_fit() -> None:
    """Values of five digits with such intervals, and the longest name of a policy: no line is too wide or cut."""
    runs = {"cascade-no-rebalance": [summary(), summary(ttft_s_mean=22_345.0, tpot_s_p99=20.0)]}
    text = text_of(policy_tables(runs, "a title that is long, as those with profile, trace and rate are"))
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "…" not in text
    assert "17,345 ±63,531" in text
    assert "16,172 ±48,633" in text


def test_wide_measurements_fit() -> None:
    """The same for tables of live runs, by group and as ratios, with long labels."""
    figures = {f"{latency}_{name}": Estimate(12.345, 11.0, 13.0) for latency in LATENCIES for name in STATISTICS}
    figures |= {name: Estimate(12_345.0, 11_000.0, 13_000.0) for name in RATES}
    run = {"all": GroupSummary(12_345, 12, figures)}
    labels = {f"a label of some length, number {n}": [run, run, run] for n in range(2)}
    text = text_of([*figure_tables(labels, "title"), *ratio_tables(labels, "title")])
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "…" not in text
    assert "12,345 ±0" in text
    assert "1.00 ±0.00" in text


def value(mean: float, half: float = 0.1) -> Estimate:
    """A value with a symmetric interval."""
    return Estimate(mean, mean - half, mean + half)


@pytest.mark.parametrize(
    ("cells", "better", "place"),
    [
        ([value(1.0), value(2.0)], -1, 0),
        ([value(1.0), value(2.0)], 1, 1),
        ([value(1.0), value(2.0)], 0, None),
        ([value(1.0), value(1.15)], -1, None),
        ([value(1.0), value(1.0, 0.0)], -1, None),
        ([value(1.0, 0.0), value(1.0, 0.0)], -1, None),
        ([value(2.0), value(1.0), value(1.15)], -1, None),
        ([value(1.0, math.nan), value(2.0)], -1, None),
        ([value(1.0), value(2.0, math.nan)], -1, None),
        ([value(1.0), value(math.nan), value(2.0)], -1, 0),
        ([value(1.0)], -1, None),
        ([], -1, None),
    ],
)
def test_a_winner_is_clear_or_there_is_none(cells: list[Estimate], better: int, place: int | None) -> None:
    """Only a value whose interval is apart from all others wins; without intervals nobody does."""
    assert clear_winner(cells, better) == place


def test_only_a_clear_winner_is_bold() -> None:
    """With two seeds that differ, the lower mean alone is not enough to be bold; with equal ones it is."""
    slow, fast = summary(), summary(ttft_s_mean=6.0)
    clear = {"a": [slow, slow], "b": [fast, fast]}
    unclear = {"a": [slow, slow], "b": [fast, replace(fast, ttft_s_mean=24_000.0)]}
    one_seed = {"a": [slow], "b": [fast]}
    bold = [
        text_of(policy_tables(runs, "t")[:1], styled=True).count("\x1b[1m6.00") for runs in (clear, unclear, one_seed)
    ]
    assert bold == [1, 0, 0]

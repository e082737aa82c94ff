"""
From cells to tables: `benchmarks/results/peers.json` with every figure, and the tables between the marks of
docs/benchmarks.md.

A figure of a system is its mean over rounds; a ratio is system over ours, round by round, as geometric mean with the
lowest and highest round. With a handful of rounds a Student's t interval would add little; the JSON has every round.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from systems import MAX_NUM_SEQS, N_INSTANCES, groups_for
from workloads import BLOCK_TOKENS, CASES

import measuring
from cascadeinfer.results.estimates import (
    GROUPS,
    LATENCIES,
    RATES,
    STATISTICS,
    counted_rows,
    errors_by_kind,
    summarise_groups,
)
from cascadeinfer.results.record_files import read_records
from cascadeinfer.results.summary import Slo

PAGE = Path(__file__).parent.parent.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- peers: begin -->", "<!-- peers: end -->"
WARM_UP = 0.1
RATIO_FIGURES = {
    "TTFT mean": "ttft_s_mean",
    "TPOT mean": "tpot_s_mean",
    "norm. latency mean": "normalised_latency_s_mean",
    "e2e mean": "e2e_s_mean",
    "e2e p99": "e2e_s_p99",
    "tokens/s": "throughput_tokens_per_s",
    "goodput": "goodput_rps",
}
ORDERED_BY = "e2e_s_mean"
FIGURES = [*(f"{latency}_{name}" for latency in LATENCIES for name in STATISTICS), *RATES]

Cell = dict[str, Any]


def write(out: Path, only_json: str | None = None) -> None:
    """
    Read all cells, write the JSON and the page; with a name, only the JSON of that name.

    For a workload without cells in `out`, the JSON's earlier cells are kept, with the machine and time given for them:
    `out` is not kept, and one is measured again without the others.
    """
    cells = [cell for model in CASES for workload in CASES[model].workloads for cell in cells_of(out, model, workload)]
    kept: dict[str, Any] = {}
    if only_json is None:
        old_cells, kept = kept_from(measuring.RESULTS / "peers.json", {_of(cell) for cell in cells})
        cells += old_cells
    results: dict[str, Any] = {}
    text: list[str] = []
    for model, case in CASES.items():
        for workload in case.workloads:
            own = [cell for cell in cells if (cell["model"], cell["workload"]) == (model, workload)]
            if own:
                results.setdefault(model, {})[workload] = table = compare(own)
                text += markdown(model, workload, table)
    settings = {
        "instances": N_INSTANCES, "max_num_seqs": MAX_NUM_SEQS, "block_tokens": BLOCK_TOKENS, "warm_up": WARM_UP,
        "cases": {name: _plain(case) for name, case in CASES.items()},
    }  # fmt: skip
    print(
        measuring.write_results(
            only_json or "peers", measuring.machine(), settings, {"kept": kept, "tables": results, "cells": cells}
        )
    )
    if only_json is not None:
        return
    page = PAGE.read_text(encoding="utf-8")
    head, mark, rest = page.partition(BEGIN)
    if not mark:
        raise SystemExit(f"{PAGE} has no mark {BEGIN}")
    PAGE.write_text(head + mark + "\n\n" + "\n".join(text) + "\n" + END + rest.partition(END)[2], encoding="utf-8")


def kept_from(file: Path, measured: set[str]) -> tuple[list[Cell], dict[str, Any]]:
    """The JSON's cells of workloads not measured now, and the machine and time of the report for each of these."""
    if not file.is_file():
        return [], {}
    before = json.loads(file.read_text())
    cells = [cell for cell in before["results"]["cells"] if _of(cell) not in measured]
    latest = {name: before[name] for name in ("machine", "at")}
    older = before["results"].get("kept", {})
    return cells, {_of(cell): older.get(_of(cell), older.get(cell["model"], latest)) for cell in cells}


def _of(cell: Cell) -> str:
    """Model and workload of a cell."""
    return f"{cell['model']} {cell['workload']}"


def cells_of(out: Path, model: str, workload: str) -> list[Cell]:
    """Every finished cell as figures, systems in the order of the groups."""
    case = CASES[model]
    slo = Slo(case.ttft_slo_s, case.tpot_slo_s)
    order = [system for group in groups_for(case) for system in group.systems]
    cells = []
    for file in sorted((out / model / workload).glob("*.parquet")):
        run = read_records(file)
        counted = counted_rows(run.records, WARM_UP)
        groups = summarise_groups(counted, slo, case.long_tokens, np.random.default_rng(0))
        beside = json.loads(file.with_suffix(".json").read_text())
        cells.append(
            {
                "model": model, "workload": workload, "system": run.label, "round": int(file.suffixes[-2][1:]),
                "errors": errors_by_kind(run.errors), **beside,
                "groups": {
                    name: {
                        "requests": group.requests, "failed": group.failed,
                        **{figure: _finite(group.figures[figure].value) for figure in FIGURES},
                    }
                    for name, group in groups.items()
                },
            }
        )  # fmt: skip
    return sorted(cells, key=lambda cell: (order.index(cell["system"]), cell["round"]))


def compare(cells: Sequence[Cell]) -> dict[str, Any]:
    """Per group and system: means over rounds, and ratios to ours in the same round."""
    systems = list(dict.fromkeys(cell["system"] for cell in cells))
    by_key = {(cell["system"], cell["round"]): cell for cell in cells}
    ours = systems[0]
    rates = [cell["rate_rps"] for cell in cells if "rate_rps" in cell]
    table: dict[str, Any] = {"ours": ours, "order": order_held(cells), "rate_rps": rates[0] if rates else None}
    for group in GROUPS:
        rows = {}
        for system in systems:
            own = [cell for cell in cells if cell["system"] == system and group in cell["groups"]]
            if own:
                rows[system] = {
                    "rounds": [cell["round"] for cell in own],
                    "requests": sum(cell["groups"][group]["requests"] for cell in own),
                    "failed": sum(cell["groups"][group]["failed"] for cell in own),
                    "load_1min": _mean([cell["load_1min"] for cell in own]),
                    "others_cpu_share": _mean([cell["others_cpu_share"] for cell in own]),
                    "figures": {figure: _mean([cell["groups"][group][figure] for cell in own]) for figure in FIGURES},
                    "over_ours": {
                        figure: _ratio(own, by_key, ours, group, figure) for figure in RATIO_FIGURES.values()
                    },
                }
        if rows:
            table[group] = rows
    return table


def order_held(cells: Sequence[Cell]) -> dict[str, dict[str, list[int]]]:
    """
    How often the order of each pair held, in the mean end-to-end latency of all requests.

    Returns:
        Per system, fastest first by the mean over its rounds, and other system: rounds in which the former was faster,
        and rounds in which both were measured.
    """
    of: dict[str, dict[int, float]] = {}
    for cell in cells:
        of.setdefault(cell["system"], {})[cell["round"]] = cell["groups"]["all"][ORDERED_BY]
    ranked = sorted(of, key=lambda system: float(np.mean(list(of[system].values()))))
    found: dict[str, dict[str, list[int]]] = {}
    for system in ranked:
        both = {other: sorted(of[system].keys() & of[other].keys()) for other in ranked if other != system}
        found[system] = {
            other: [sum(of[system][n] < of[other][n] for n in rounds), len(rounds)] for other, rounds in both.items()
        }
    return found


def _ratio(own: Sequence[Cell], by_key: dict[tuple[str, int], Cell], ours: str, group: str, figure: str) -> Any:
    """Ratio of a system to ours in rounds that have both: [geometric mean, lowest, highest], or None."""
    ratios = []
    for cell in own:
        other = by_key.get((ours, cell["round"]))
        mine, theirs = cell["groups"][group][figure], other["groups"][group][figure] if other else None
        if mine and theirs:
            ratios.append(mine / theirs)
    if not ratios:
        return None
    return [float(np.exp(np.mean(np.log(ratios)))), min(ratios), max(ratios)]


def markdown(model: str, workload: str, table: dict[str, Any]) -> list[str]:
    """Tables of one workload."""
    lines = [f"### {model}, {workload}", ""]
    if table["rate_rps"] is not None:
        lines += [f"{table['rate_rps']:.2f} requests per second.", ""]
    groups = [group for group in GROUPS if group in table]
    for group in ["all"] if groups == ["all", "short"] else groups:
        lines += _figures(group, table[group]) + _ratios(group, table[group], table["ours"])
    return lines + _order(table["order"])


def _order(order: dict[str, dict[str, list[int]]]) -> list[str]:
    """Which system was faster than which, and in how many rounds."""
    lines = [
        "Rounds in which the row's system had a lower mean end-to-end latency, all requests, than the column's:",
        "",
        f"| faster | {' | '.join(order)} |",
        "|---|" + "---|" * len(order),
    ]
    for system, others in order.items():
        cells = ["" if other == system else f"{others[other][0]} of {others[other][1]}" for other in order]
        lines.append(f"| {system} | {' | '.join(cells)} |")
    return [*lines, ""]


def _figures(group: str, rows: dict[str, Any]) -> list[str]:
    lines = [
        f"{group.capitalize()} requests; latencies as mean / p50 / p99, means over rounds:",
        "",
        (
            "| system | rounds | requests | failed | TTFT ms | TPOT ms | norm. latency ms/token | e2e s | tokens/s | "
            "goodput req/s | in SLO | load, other work |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for system, row in rows.items():
        figures = row["figures"]

        def three(field: str, factor: float, own: dict[str, Any] = figures) -> str:
            return " / ".join(_shown(own[f"{field}_{name}"], factor) for name in STATISTICS)

        lines.append(
            f"| {system} | {len(row['rounds'])} | {row['requests']} | {row['failed']} | {three('ttft_s', 1e3)} "
            f"| {three('tpot_s', 1e3)} | {three('normalised_latency_s', 1e3)} | {three('e2e_s', 1.0)} "
            f"| {_shown(figures['throughput_tokens_per_s'], 1.0)} | {_shown(figures['goodput_rps'], 1.0)} "
            f"| {100 * figures['slo_attainment']:.0f} % | {row['load_1min']:.1f}, "
            f"{100 * row['others_cpu_share']:.0f} % |"
        )
    return [*lines, ""]


def _ratios(group: str, rows: dict[str, Any], ours: str) -> list[str]:
    lines = [
        (
            f"{group.capitalize()} requests, times `{ours}`, [lowest, highest round]; latencies above 1 are slower "
            "than ours:"
        ),
        "",
        f"| system | {' | '.join(RATIO_FIGURES)} |",
        "|---|" + "---|" * len(RATIO_FIGURES),
    ]
    for system, row in rows.items():
        if system == ours:
            continue
        ratios = [row["over_ours"][figure] for figure in RATIO_FIGURES.values()]
        cells = ["-" if r is None else f"{r[0]:.2f} [{r[1]:.2f}, {r[2]:.2f}]" for r in ratios]
        lines.append(f"| {system} | {' | '.join(cells)} |")
    return [*lines, ""]


def _shown(value: float | None, factor: float) -> str:
    if value is None:
        return "-"
    places = 0 if factor * value >= 100 else 1 if factor * value >= 10 else 2
    return f"{factor * value:.{places}f}"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _plain(case: Any) -> dict[str, Any]:
    return json.loads(json.dumps(case, default=vars))

"""The table that ends a GPU check: what became of each part, and its main figures, as Markdown."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Final

from check_parts import Outcome, State
from row_log import Row


def table_of(machine: dict[str, Any], outcomes: dict[str, Outcome]) -> str:
    """Everything, part by part."""
    kind = "measured" if machine["kind"] == "cuda" else "stand-ins on a processor, no measurement"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"## {machine['device']} ({kind})",
        "",
        versions,
        "",
        "| part | state | rows | s | |",
        "|---|---|---|---|---|",
    ]
    for name, outcome in outcomes.items():
        reason = outcome.reason.splitlines()[0] if outcome.reason else ""
        lines.append(f"| {name} | {outcome.state} | {len(outcome.rows)} | {outcome.seconds:.0f} | {reason} |")
    for name, outcome in outcomes.items():
        make = TABLES.get(name)
        if make is not None and (part := make(outcome.rows)):
            incomplete = "" if outcome.state is State.DONE else f" ({outcome.state}: incomplete)"
            lines += ["", f"### {name}{incomplete}", "", *part]
    return "\n".join(lines)


def _grid(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table; nothing without rows."""
    if not rows:
        return []
    return [f"| {' | '.join(headings)} |", "|" + "---|" * len(headings), *(f"| {' | '.join(row)} |" for row in rows)]


def _number(value: float | None, digits: int = 2, scale: float = 1.0) -> str:
    return "-" if value is None else f"{value * scale:.{digits}f}"


def kernel_table(rows: Sequence[Row]) -> list[str]:
    """Time of mixed over equal lengths, measured / predicted: per kernel and batch, a column per prompt chunk."""
    cells: defaultdict[tuple[str, str, int], dict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if "ratio" in row:
            cells[row["kernel"], row["batch"], row["kv_heads"]][row["prompt_tokens"]].append(row)
    prompts = sorted({prompt for by_prompt in cells.values() for prompt in by_prompt})
    lines = []
    for (kernel, batch, kv_heads), by_prompt in cells.items():
        texts = [_ratio_cell(by_prompt[prompt]) if prompt in by_prompt else "-" for prompt in prompts]
        lines.append([kernel, batch, str(kv_heads), *texts])
    headings = ["kernel", "batch", "KV heads", *(f"beside {prompt}" if prompt else "alone" for prompt in prompts)]
    note = "Mixed over equal lengths of the same count and total, measured (predicted); median over page sizes."
    grid = _grid(headings, lines)
    return [note, "", *grid] if grid else []


def _ratio_cell(rows: Sequence[Row]) -> str:
    """Measured ratio, and the predicted one in brackets if there is one."""
    measured = _number(statistics.median(row["ratio"] for row in rows))
    predicted = [row["predicted"] for row in rows if row["predicted"] is not None]
    return f"{measured} ({_number(statistics.median(predicted))})" if predicted else measured


def step_table(rows: Sequence[Row]) -> list[str]:
    """Step times beside prompt tokens; then how the profiles fit."""
    lines = [
        [
            row["way"], f"{row['decodes']} x {row['shortest']}..{row['longest']}", str(row["prompt_tokens"]),
            _number(row["step_s"], 2, 1e3), _number(row["over_alone"]), _number(row["predicted_s"], 2, 1e3),
            str(row["steps"]),
        ]
        for row in rows
        if "step_s" in row
    ]  # fmt: skip
    found = _grid(["engine", "decodes", "prompt tokens", "step ms", "over none", "shipped profile ms", "steps"], lines)
    fits = [
        f"{row['profile']}: median error {row['errors']['all']['median']:.1%}, nine in ten within "
        f"{row['errors']['all']['p90']:.1%}"
        for row in rows
        if "profile" in row and "all" in row["errors"]
    ]
    return [*found, *([""] if fits else []), *fits]


def move_table(rows: Sequence[Row]) -> list[str]:
    """Same text or not, by case and way."""
    cells: defaultdict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        cells[row["case"]][row["way"]] = row
    lines = [
        [case, *(_same(ways.get(way)) for way in ("no move", "pull", "recompute")), _pinned(ways)]
        for case, ways in cells.items()
    ]
    headings = ["sampling", "no move, other instance", "moves, pulled", "moves, recomputed", "pinned by our rules"]
    return _grid(headings, lines)


def _same(row: Row | None) -> str:
    if row is None:
        return "-"
    if row["way"] != "no move" and row["moves"] == 0:
        return "did not move"
    return "same" if row["same"] else f"differs from token {row['differs_at']} of {row['tokens']}"


def _pinned(ways: dict[str, Row]) -> str:
    row = next(iter(ways.values()))
    return f"{row['pinned'] or 'no'} ({row['runner']})"


def pause_table(rows: Sequence[Row]) -> list[str]:
    """The pause by context, medians."""
    lines = [
        [
            str(row["context_tokens"]), _number(row["gap_s"]["median"], 1, 1e3),
            _number(row["pull_pause_s"]["median"], 0, 1e3), _number(row["recompute_pause_s"]["median"], 0, 1e3),
            _number(row["pull_over_gap"]["median"], 1), _number(row["recompute_over_pull"]["median"], 1),
            str(row["recompute_over_pull"]["n"]),
        ]
        for row in rows
    ]  # fmt: skip
    headings = ["context", "gap ms", "pull ms", "recompute ms", "pull / gap", "recompute / pull", "pairs"]
    return _grid(headings, lines)


def serving_table(rows: Sequence[Row]) -> list[str]:
    """Latencies by system and group, means over rounds."""
    lines = []
    for system in dict.fromkeys(row["system"] for row in rows):
        own = [row for row in rows if row["system"] == system]
        for group in ("all", "short", "long"):
            groups = [row[group] for row in own if group in row]
            if groups:
                lines.append(
                    [
                        system, group, str(len(groups)), str(sum(g["requests"] for g in groups)),
                        str(sum(g["failed"] for g in groups)), _mean(groups, "ttft_s_mean", 0, 1e3),
                        _mean(groups, "tpot_s_mean", 1, 1e3), _mean(groups, "e2e_s_mean", 2, 1.0),
                        _mean(groups, "e2e_s_p99", 2, 1.0), _mean(groups, "throughput_tokens_per_s", 0, 1.0),
                    ]
                )  # fmt: skip
    headings = ["system", "requests", "rounds", "n", "failed", "TTFT ms", "TPOT ms", "e2e s", "e2e p99 s", "tokens/s"]
    return _grid(headings, lines)


def _mean(groups: Sequence[Row], figure: str, digits: int, scale: float) -> str:
    values = [group[figure] for group in groups if group[figure] is not None]
    return _number(statistics.fmean(values), digits, scale) if values else "-"


TABLES: Final[dict[str, Callable[[Sequence[Row]], list[str]]]] = {
    "kernels": kernel_table,
    "steps": step_table,
    "moves": move_table,
    "pause": pause_table,
    "serving": serving_table,
}

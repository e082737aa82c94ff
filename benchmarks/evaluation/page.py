"""`docs/evaluation.md`: tables and plots of the grid, with the paper's figures next to ours."""

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from cells import CONTEXT_TOKENS, FEWEST_REQUESTS, MOST_REQUESTS, SECONDS, Figures, Results
from compare import Field, Point, best_of, geometric, mean, pooled_error, rate_within, ratios
from grid import (
    ABLATION_LOADS,
    ABLATION_TRACES,
    ABLATIONS,
    BASELINES,
    CASCADE,
    FEWER_BASELINES,
    FEWER_LOADS,
    LARGE,
    LOADS,
    OVERLOAD,
    PAPER_GPUS,
    PROFILES,
    SEEDS,
    TRACES,
    cells,
)
from tuned import tuned_section

from figures import over_load

MARKER: Final = re.compile(r"<!-- tables -->.*<!-- end of tables -->", re.DOTALL)
TUNED_MARKER: Final = re.compile(r"<!-- tuned -->.*<!-- end of tuned -->", re.DOTALL)
HIGH_LOAD: Final = 0.85
MIXED: Final = TRACES[:5]
"""Traces whose lengths differ much (coefficient of variation above 0.7); in the other two they are nearly equal."""
PAPER_BASELINES: Final = {
    "vLLM": "round_robin",
    "vLLM's own data-parallel balancer": "vllm_dp",
    "SGLang": "prefix_aware",
    "Llumnix": "llumnix",
}
KEPT: Final = 0.9


def write_report(results: Results, page: Path) -> None:
    """
    Put the tables between the page's markers, and the plots beside it. The surrounding text is written by hand.

    Raises:
        ValueError: The page has no markers.
    """
    text = page.read_text(encoding="utf-8")
    for marker in (MARKER, TUNED_MARKER):
        if not marker.search(text):
            raise ValueError(f"{page} has no part that matches {marker.pattern}")
    folder = page.parent / "figures"
    folder.mkdir(exist_ok=True)
    body = "\n\n".join([*_sections(results), *_plots(results, folder)])
    text = MARKER.sub(lambda _: f"<!-- tables -->\n{body}\n<!-- end of tables -->", text)
    tuned = f"<!-- tuned -->\n{tuned_section(results)}\n<!-- end of tuned -->"
    page.write_text(TUNED_MARKER.sub(lambda _: tuned, text), encoding="utf-8")


def _sections(results: Results) -> list[str]:
    code = sorted({results[cell].code for cell in cells() if cell in results})
    done = sum(cell in results for cell in cells())
    return [
        (
            f"{done} of {len(cells())} cells; code {', '.join(code)}; {len(SEEDS)} seeds; requests come for "
            f"{SECONDS:g} s, "
            f"at least {FEWEST_REQUESTS:,} and at most {MOST_REQUESTS:,} of them; "
            f"sequences up to {CONTEXT_TOKENS:,} tokens."
        ),
        "### Cascade over the best baseline\n\n" + _over_best(results),
        f"### Cascade over each baseline at {HIGH_LOAD:.0%} load\n\n" + _over_each(results),
        f"### Short and long requests at {HIGH_LOAD:.0%} load\n\n" + _short_and_long(results),
        "### Rates and throughput\n\n" + _rates(results),
        "### Requests within 5 and 20 times their latency alone\n\n" + _slo(results),
        "### Llama-3.1-70B, tensor parallel 4, four instances of H20\n\n" + _large(results),
        "### Parts switched off\n\n" + _ablations(results),
    ]


def _over_best(results: Results) -> str:
    rows, per_point, worse = [], [], []
    for profile in PROFILES:
        for trace in TRACES:
            cells_of_row = []
            for load in LOADS:
                point = Point(profile, trace, load)
                best = best_of(results, point, BASELINES, _norm)
                values = [] if best is None else ratios(results, point, CASCADE, best, _norm)
                cells_of_row.append(f"{geometric(values):.3f} ({best})" if values else "-")
                if values:
                    per_point.append((point, values))
            rows.append([profile, trace, *cells_of_row])
    error = pooled_error([values for _, values in per_point])
    means = {point: geometric(values) for point, values in per_point}
    worse = [f"{p.profile} {p.trace} at {p.load:.0%}: {m:.3f}" for p, m in means.items() if m > 1.0 + 2.0 * error]
    mixed = geometric(m for p, m in means.items() if p.trace in MIXED)
    alike = geometric(m for p, m in means.items() if p.trace not in MIXED)
    return "\n".join(
        [
            (
                "Mean normalised latency of `cascade` over that of the baseline that is best at this point "
                "(its name in brackets). Below 1 is better."
            ),
            "",
            *_table(["profile", "trace", *(f"{load:.0%} load" for load in LOADS)], rows),
            "",
            (
                f"Geometric mean {mixed:.3f} on traces of mixed lengths, "
                f"{alike:.3f} on the two whose lengths are nearly alike. "
                f"Standard error of a point {error:.1%} (pooled over points). "
                f"Points above 1 by more than two standard errors: {'; '.join(worse) or 'none'}."
            ),
        ]
    )


def _over_each(results: Results) -> str:
    fields: Sequence[tuple[str, Field]] = (
        ("normalised", _norm),
        ("TTFT", lambda f: f.ttft_ms),
        ("e2e mean", lambda f: f.e2e_s),
        ("e2e p99", lambda f: f.e2e_p99_s),
    )
    rows = []
    for profile in PAPER_GPUS:
        for baseline in BASELINES:
            row = [profile, baseline]
            for _, field in fields:
                over = [
                    geometric(values)
                    for trace in TRACES
                    if (values := ratios(results, Point(profile, trace, HIGH_LOAD), CASCADE, baseline, field))
                ]
                row.append(f"{geometric(over):.2f} ({min(over):.2f} to {max(over):.2f})" if over else "-")
            rows.append(row)
    return "\n".join(
        [
            (
                "Ratios of `cascade` to the baseline, geometric mean over all traces (lowest to highest). Below 1 is "
                "better."
            ),
            "",
            *_table(["profile", "baseline", *(name for name, _ in fields)], rows),
        ]
    )


def _short_and_long(results: Results) -> str:
    rows = []
    for profile in PAPER_GPUS:
        for trace in TRACES:
            point = Point(profile, trace, HIGH_LOAD)
            row = [profile, trace]
            for field in (_norm, lambda f: f.norm_short_ms, lambda f: f.norm_long_ms):
                ours = mean(results, point, CASCADE, field)
                theirs = mean(results, point, "least_loaded", field)
                row.append(f"{ours:.1f} / {theirs:.1f}")
            row.append(f"{mean(results, point, CASCADE, lambda f: f.stages):.1f}")
            row.append(f"{mean(results, point, CASCADE, lambda f: f.moves / f.requests):.2f}")
            rows.append(row)
    return "\n".join(
        [
            "Normalised latency in ms, `cascade` / `least_loaded`; stages in force at the end; moves per request.",
            "",
            *_table(["profile", "trace", "all", "shorter half", "longest tenth", "stages", "moves"], rows),
        ]
    )


def _rates(results: Results) -> str:
    rows = []
    for profile in PAPER_GPUS:
        for trace in TRACES:
            row = [profile, trace]
            for field in (_within_5x, lambda f: f.in_slo):
                point = Point(profile, trace, HIGH_LOAD)
                ours = rate_within(results, point, CASCADE, field, KEPT)
                others = {b: rate_within(results, point, b, field, KEPT) for b in BASELINES}
                known = {b: rate for b, rate in others.items() if math.isfinite(rate)}
                best = max(known, key=lambda b: known[b]) if known else None
                shown = f"{ours:.3g}" if math.isfinite(ours) else "-"
                row.append(
                    f"{shown}; {ours / known[best]:.2f}x {best}, {_over(ours, others['round_robin'])} round_robin"
                    if best is not None and math.isfinite(ours)
                    else shown
                )
            full = Point(profile, trace, OVERLOAD)
            best_full = best_of(results, full, BASELINES, _tokens, lowest=False)
            values = [] if best_full is None else ratios(results, full, CASCADE, best_full, _tokens)
            against = ratios(results, full, CASCADE, "round_robin", _tokens)
            row.append(
                f"{geometric(values):.2f}x {best_full}, {geometric(against):.2f}x round_robin"
                if values and against
                else "-"
            )
            rows.append(row)
    return "\n".join(
        [
            (
                f"Highest rate (requests/s, between the loads that were run) at which {KEPT:.0%} of the requests "
                "take at most 5 times as long as alone; the same "
                f"for TTFT 2 s and TPOT 100 ms; output tokens per second at {OVERLOAD:.0%} load. Each beside the "
                "best baseline and `round_robin`. "
                "`-`: kept at every load, or at none."
            ),
            "",
            *_table(["profile", "trace", "within 5x", "within 2 s, 100 ms", "tokens/s, overload"], rows),
        ]
    )


def _slo(results: Results) -> str:
    rows = []
    for profile in PAPER_GPUS:
        for trace in TRACES:
            for load in (HIGH_LOAD, 0.95):
                point = Point(profile, trace, load)
                row = [profile, trace, f"{load:.0%}"]
                for field in (_within_5x, lambda f: f.within_20x):
                    shares = [mean(results, point, policy, field) for policy in (CASCADE, *FEWER_BASELINES)]
                    row.append(" / ".join(f"{share:.0%}" if math.isfinite(share) else "-" for share in shares))
                rows.append(row)
    return "\n".join(
        [
            f"Share of requests; `{CASCADE}` / {' / '.join(f'`{b}`' for b in FEWER_BASELINES)}.",
            "",
            *_table(["profile", "trace", "load", "within 5x", "within 20x"], rows),
        ]
    )


def _large(results: Results) -> str:
    profile, instances = LARGE
    rows = []
    for trace in TRACES[:2]:
        for load in (*FEWER_LOADS, OVERLOAD):
            point = Point(profile, trace, load, instances)
            row = [trace, f"{load:.0%}"]
            for baseline in FEWER_BASELINES:
                norm = ratios(results, point, CASCADE, baseline, _norm)
                tokens = ratios(results, point, CASCADE, baseline, _tokens)
                row.append(f"{geometric(norm):.2f}; {geometric(tokens):.2f}" if norm and tokens else "-")
            rows.append(row)
    return "\n".join(
        [
            (
                "Ratios of `cascade` to the baseline: normalised latency (below 1 is better); output tokens per second "
                "(above 1 is better)."
            ),
            "",
            *_table(["trace", "load", *FEWER_BASELINES], rows),
        ]
    )


def _ablations(results: Results) -> str:
    rows = []
    for policy in ABLATIONS:
        row = [policy]
        for field in (_norm, lambda f: f.e2e_s, lambda f: f.e2e_p99_s, _tokens):
            over = [
                geometric(values)
                for profile in PAPER_GPUS
                for trace in ABLATION_TRACES
                for load in ABLATION_LOADS
                if (values := ratios(results, Point(profile, trace, load), policy, CASCADE, field))
            ]
            row.append(f"{geometric(over):.3f} ({min(over):.2f} to {max(over):.2f})" if over else "-")
        rows.append(row)
    return "\n".join(
        [
            (
                "Ratios to the whole `cascade`, "
                f"geometric mean over {', '.join(ABLATION_TRACES)} "
                f"at {' and '.join(f'{load:.0%}' for load in ABLATION_LOADS)} load "
                "on both of the paper's GPUs (lowest to highest). "
                "All but `cascade-cold` start with the plan for the trace's own lengths and rate."
            ),
            "",
            *_table(["variant", "normalised", "e2e mean", "e2e p99", "tokens/s"], rows),
        ]
    )


def _plots(results: Results, folder: Path) -> Iterable[str]:
    for profile in PAPER_GPUS:
        for name, field, label, log in (
            ("latency", _norm, "mean normalised latency, ms per token", True),
            ("within-5x", _within_5x, "share of requests within 5 times their latency alone", False),
        ):
            file = folder / f"evaluation-{name}-{profile}.png"
            over_load(results, profile, (CASCADE, *BASELINES), field, label, file, log=log)
            yield f"![{label}, {profile}](figures/{file.name})"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _over(ours: float, theirs: float) -> str:
    return f"{ours / theirs:.2f}x" if math.isfinite(ours) and math.isfinite(theirs) else "-"


def _norm(figures: Figures) -> float:
    return figures.norm_ms


def _tokens(figures: Figures) -> float:
    return figures.tokens_per_s


def _within_5x(figures: Figures) -> float:
    return figures.within_5x

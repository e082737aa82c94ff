"""
The cascade against rivals at their best token budget of a step, and against itself without sharing.

The budget (`max_num_batched_tokens`) bounds the chunks of prompts: small ones keep decode steps short, large ones
finish prompts sooner. Which one is best depends on policy, model, trace and figure, so each rival is taken at the
budget with the lowest mean over the seeds, figure by figure, and the best of them is the one to beat. The cascade is
shown at the profile's own budget and at its best. A rival that was not run with all seeds does not compete. Ratios are
per seed, and averaged geometrically, with Student's t interval at 95 %.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from cells import Cell, Figures, Results
from compare import Field, Point, geometric
from grid import BUDGETS, CASCADE, NOT_SHARING, RIVALS, TUNED_LOAD, TUNED_PROFILES, TUNED_SEEDS, TUNED_TRACES

from cascadeinfer.config.profiles import load_profile
from cascadeinfer.results.estimates import Estimate, ratio_over_runs

FIELDS: Sequence[tuple[str, Field]] = (
    ("normalised", lambda f: f.norm_ms),
    ("e2e p99", lambda f: f.e2e_p99_s),
    ("TTFT p99", lambda f: f.ttft_p99_ms),
)


class Tuned(NamedTuple):
    """A policy at a token budget."""

    policy: str
    max_batched_tokens: int

    def __str__(self) -> str:
        """As in tables."""
        return f"{self.policy} @{self.max_batched_tokens}"

    def cells(self, point: Point) -> list[Cell]:
        """Its cells at a point, seed by seed."""
        return [point.cell(self.policy, seed, self.max_batched_tokens) for seed in TUNED_SEEDS]


def best_tuned(results: Results, point: Point, policies: Iterable[str], field: Field) -> Tuned | None:
    """The policy and budget with the lowest mean of a figure over all seeds; None when none was run with all."""
    means = {}
    for tuned in (Tuned(policy, budget) for policy in policies for budget in BUDGETS):
        values = [field(results[cell]) for cell in tuned.cells(point) if cell in results]
        if len(values) == len(TUNED_SEEDS) and all(map(math.isfinite, values)):
            means[tuned] = sum(values) / len(values)
    return min(means, key=lambda tuned: means[tuned], default=None)


def ratio(results: Results, point: Point, mine: Tuned, other: Tuned, field: Field) -> Estimate | None:
    """Ratio of a figure, seed by seed; None where a cell is missing."""
    pairs = list(zip(mine.cells(point), other.cells(point), strict=True))
    if any(cell not in results for pair in pairs for cell in pair):
        return None
    columns = [[_plain(field(results[cell])) for cell in column] for column in zip(*pairs, strict=True)]
    return ratio_over_runs(*columns)


def tuned_section(results: Results) -> str:
    """The table, with the geometric mean over its points."""
    heads = [
        "profile",
        "trace",
        "figure",
        "best rival",
        "cascade / best rival",
        "tuned / best rival",
        "/ not sharing",
        "shared",
    ]
    rows: list[list[str]] = []
    over: dict[tuple[str, int], list[float]] = {}
    for profile in TUNED_PROFILES:
        own = load_profile(profile).capacity.max_batched_tokens
        for trace in TUNED_TRACES:
            point = Point(profile, trace, TUNED_LOAD)
            cascade = Tuned(CASCADE, own)
            for name, field in FIELDS:
                rival = best_tuned(results, point, RIVALS, field)
                best = best_tuned(results, point, [CASCADE], field)
                pairs = ((cascade, rival), (best, rival), (cascade, Tuned(NOT_SHARING, own)))
                found = [None if None in pair else ratio(results, point, *pair, field) for pair in pairs]  # type: ignore[arg-type]
                for column, estimate in enumerate(found):
                    if estimate is not None:
                        over.setdefault((name, column), []).append(estimate.value)
                rows.append(
                    [profile, trace, name, str(rival or "-"), *map(_shown, found), _share(results, point, cascade)]
                )
    for name, _ in FIELDS:
        means = [over.get((name, column)) for column in range(3)]
        rows.append(["geometric mean", "", name, "", *(f"{geometric(m):.2f}" if m else "-" for m in means), ""])
    return "\n".join([f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)])


def _share(results: Results, point: Point, tuned: Tuned) -> str:
    """Share of the requests that a backlog sent elsewhere."""
    found: list[Figures] = [results[cell] for cell in tuned.cells(point) if cell in results]
    return f"{sum(f.shared for f in found) / sum(f.requests for f in found):.1%}" if found else "-"


def _shown(estimate: Estimate | None) -> str:
    if estimate is None or not math.isfinite(estimate.value):
        return "-"
    if not math.isfinite(estimate.low):
        return f"{estimate.value:.2f}"
    return f"{estimate.value:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"


def _plain(value: float) -> Estimate:
    return Estimate(value, math.nan, math.nan)

"""
Comparison of cells: ratios of policies on the same requests, and the rate that a policy carries within a limit.

Every policy sees the same requests for a seed, so ratios are taken per seed and then averaged (geometrically). `spread`
is the standard error of that mean over seeds, pooled over all points because two seeds alone say little about their own
spread.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from cells import Cell, Figures, Results
from grid import LOADS, OVERLOAD, SEEDS

Field = Callable[[Figures], float]


@dataclass(frozen=True, slots=True)
class Point:
    """A point at which policies are compared."""

    profile: str
    trace: str
    load: float
    instances: int = 16

    def cell(self, policy: str, seed: int, max_batched_tokens: int = 0) -> Cell:
        """One of the point's cells."""
        return Cell(self.profile, self.trace, self.load, policy, seed, self.instances, max_batched_tokens)


def mean(results: Results, point: Point, policy: str, field: Field) -> float:
    """Mean over seeds; NaN where a cell is missing."""
    values = [field(results[cell]) for seed in SEEDS if (cell := point.cell(policy, seed)) in results]
    return sum(values) / len(values) if len(values) == len(SEEDS) else math.nan


def ratios(results: Results, point: Point, policy: str, other: str, field: Field) -> list[float]:
    """Ratio of one policy to another, per seed; empty where a cell is missing or a figure is not positive."""
    found = []
    for seed in SEEDS:
        ours, theirs = results.get(point.cell(policy, seed)), results.get(point.cell(other, seed))
        if ours is None or theirs is None or not (field(ours) > 0.0 and field(theirs) > 0.0):
            return []
        found.append(field(ours) / field(theirs))
    return found


def geometric(values: Iterable[float]) -> float:
    """Geometric mean; NaN for an empty input."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def best_of(
    results: Results, point: Point, policies: Sequence[str], field: Field, *, lowest: bool = True
) -> str | None:
    """The policy with the best mean; None if none was run."""
    means = {policy: mean(results, point, policy, field) for policy in policies}
    known = {policy: value for policy, value in means.items() if math.isfinite(value)}
    if not known:
        return None
    return (min if lowest else max)(known, key=lambda policy: known[policy])


def pooled_error(per_point: Iterable[Sequence[float]]) -> float:
    """Standard error of a point's mean log ratio, from the differences between seeds at all points."""
    squares = []
    for values in per_point:
        if len(values) > 1:
            logs = [math.log(value) for value in values]
            centre = sum(logs) / len(logs)
            squares.append(sum((value - centre) ** 2 for value in logs) / (len(logs) - 1) / len(logs))
    return math.sqrt(sum(squares) / len(squares)) if squares else math.nan


def rate_within(results: Results, point: Point, policy: str, field: Field, share: float) -> float:
    """
    Highest rate at which a share of the requests keeps a limit, between the loads that were run.

    Linear between the last load that keeps it and the first that does not; NaN where a load is missing, and where the
    lowest fails or the highest keeps it.
    """
    loads = (*LOADS, OVERLOAD)
    points = [replace(point, load=load) for load in loads]
    shares = [mean(results, at, policy, field) for at in points]
    rates = [mean(results, at, policy, lambda figures: figures.rate_per_s) for at in points]
    if any(math.isnan(value) for value in shares) or shares[0] < share:
        return math.nan
    for i in range(1, len(loads)):
        if shares[i] < share:
            part = (shares[i - 1] - share) / (shares[i - 1] - shares[i])
            return rates[i - 1] + part * (rates[i] - rates[i - 1])
    return math.nan

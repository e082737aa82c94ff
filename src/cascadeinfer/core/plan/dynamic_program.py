"""
The dynamic program: it chooses stages and instances together, over log-spaced boundaries.

    best[s][b][e] = min over a < b, k <= e of best[s - 1][a][e - k] + cost[a][b][k]

is the minimum cost of covering the lengths below candidate boundary b with exactly s stages and e units of instances;
`cost[a][b][k]` is `stage_service` of the range [a, b) with k units. Because the objective is a sum over stages, the
program is exact over its candidates (tests compare it with exhaustive search). Keeping the number of stages as a
dimension costs little and shows what each additional stage gains.

Up to `MAX_UNITS` instances, a unit is one instance. Beyond that, a unit is n / MAX_UNITS instances, possibly a
fraction, since the closed form accepts any k; 1,024 instances then cost no more than 128. The result is rounded to
whole instances and improved (`plan/refinement.py`), so above `MAX_UNITS` instances the plan is near-optimal rather than
proven optimal; tests bound the loss against the exact program.

Source: arXiv 2512.19179, which plans over exponential length buckets in two phases.
"""

from dataclasses import dataclass
from typing import Final, Self

import numpy as np
from numba import njit
from numpy.typing import NDArray

from cascadeinfer.core.cost.qoe import ServiceInputs, longest_of, stage_service

MAX_UNITS: Final = 128
"""Up to this many instances, the program places them one by one."""


@njit(cache=True, error_model="numpy")
def stage_costs(
    inputs: ServiceInputs, candidates: NDArray[np.int64], n_units: int, instances_per_unit: float
) -> NDArray[np.float64]:
    """
    The cost of every possible stage.

    Args:
        inputs: See `stage_service`.
        candidates: Indices of the edges where a stage may begin or end, first and last included.  # (n_candidates,)
        n_units: Units of instances to place.
        instances_per_unit: Instances in a unit.

    Returns:
        cost[a, b, k] of the range between candidates a < b on k units; infinite elsewhere.
        # (n_candidates, n_candidates, n_units + 1)

    Complexity: O(n_candidates^2 n_units) predictions.
    """
    n = len(candidates)
    costs = np.full((n, n, n_units + 1), np.inf)
    for a in range(n - 1):
        for b in range(a + 1, n):
            low, high = candidates[a], candidates[b]
            longest = longest_of(inputs, low, high)
            for k in range(1, n_units + 1):
                costs[a, b, k] = stage_service(inputs, low, high, longest, k * instances_per_unit).cost
    return costs


@njit(cache=True, error_model="numpy")
def straddling_costs(
    inputs: ServiceInputs, candidates: NDArray[np.int64], at: int, n_units: int, instances_per_unit: float
) -> NDArray[np.float64]:
    """`stage_costs` of those ranges alone that have candidate `at` inside them; infinite elsewhere."""
    n = len(candidates)
    costs = np.full((n, n, n_units + 1), np.inf)
    for a in range(at):
        for b in range(at + 1, n):
            low, high = candidates[a], candidates[b]
            longest = longest_of(inputs, low, high)
            for k in range(1, n_units + 1):
                costs[a, b, k] = stage_service(inputs, low, high, longest, k * instances_per_unit).cost
    return costs


@njit(cache=True, error_model="numpy")
def best_partitions(
    costs: NDArray[np.float64], max_stages: int
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """
    The best partition for each number of stages.

    Args:
        costs: As returned by `stage_costs`.  # (n_candidates, n_candidates, n_units + 1)
        max_stages: Maximum number of stages, >= 1.

    Returns:
        The cost for each number of stages (infinite where none is feasible), the candidates that bound the stages, and
        the units per stage. Row s - 1 is for s stages.
        # (max_stages,), (max_stages, max_stages + 1), (max_stages, max_stages)

    Complexity: O(max_stages n_candidates^2 n_units^2) additions.
    """
    best, from_candidate, from_units = fill(costs, max_stages)
    return _trace_back(best, from_candidate, from_units)


@njit(cache=True, error_model="numpy")
def fill(
    costs: NDArray[np.float64], max_stages: int
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """
    The program's tables: best[s, b, e] and, for each, the last stage's first candidate and its units.
    # (max_stages + 1, n_candidates, n_units + 1)
    """
    n, _, units = costs.shape
    n_units = units - 1
    best = np.full((max_stages + 1, n, n_units + 1), np.inf)
    from_candidate = np.zeros((max_stages + 1, n, n_units + 1), dtype=np.int64)
    from_units = np.zeros((max_stages + 1, n, n_units + 1), dtype=np.int64)
    best[0, 0, 0] = 0.0
    for s in range(1, max_stages + 1):
        for b in range(s, n):
            for a in range(s - 1, b):
                for used in range(s - 1, n_units):
                    before = best[s - 1, a, used]
                    if before == np.inf:
                        continue
                    for k in range(1, n_units - used + 1):
                        value = before + costs[a, b, k]
                        if value < best[s, b, used + k]:
                            best[s, b, used + k] = value
                            from_candidate[s, b, used + k] = a
                            from_units[s, b, used + k] = k
    return best, from_candidate, from_units


@njit(cache=True, error_model="numpy")
def _trace_back(
    best: NDArray[np.float64], from_candidate: NDArray[np.int64], from_units: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Reconstruct the partitions from the program's tables."""
    max_stages = best.shape[0] - 1
    last = best.shape[1] - 1
    n_units = best.shape[2] - 1
    value_of = np.full(max_stages, np.inf)
    bounds = np.zeros((max_stages, max_stages + 1), dtype=np.int64)
    placed = np.zeros((max_stages, max_stages), dtype=np.int64)
    for s in range(1, max_stages + 1):
        value_of[s - 1] = best[s, last, n_units]
        if value_of[s - 1] == np.inf:
            continue
        b = last
        left = n_units
        for stage in range(s, 0, -1):
            bounds[s - 1, stage] = b
            k = from_units[stage, b, left]
            placed[s - 1, stage - 1] = k
            b = from_candidate[stage, b, left]
            left -= k
    return value_of, bounds, placed


@dataclass(frozen=True, slots=True, eq=False)
class Partitions:
    """
    The program's tables, for whoever wants the best partition for every number of units.

    Attributes:
        best: best[s, b, e] of the module header.
        max_stages: Largest s.
    """

    best: NDArray[np.float64]
    max_stages: int
    _from_candidate: NDArray[np.int64]
    _from_units: NDArray[np.int64]

    @classmethod
    def of(cls, costs: NDArray[np.float64], max_stages: int) -> Self:
        """Run the program; see `best_partitions`."""
        best, from_candidate, from_units = fill(costs, max_stages)
        return cls(best, max_stages, from_candidate, from_units)

    def cost(self, stages: int, units: int) -> float:
        """The least cost of covering everything with exactly these stages and units; infinite when infeasible."""
        return float(self.best[stages, -1, units])

    def trace(self, stages: int, units: int) -> tuple[list[int], list[int]]:
        """Candidates that bound the stages (one more than stages), and units of each, of the partition of that cost."""
        b = self.best.shape[1] - 1
        bounds, placed = [b], []
        for s in range(stages, 0, -1):
            k = int(self._from_units[s, b, units])
            b = int(self._from_candidate[s, b, units])
            units -= k
            bounds.append(b)
            placed.append(k)
        return bounds[::-1], placed[::-1]

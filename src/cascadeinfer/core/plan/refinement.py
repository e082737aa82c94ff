"""
Local improvement of a partition, on the histogram's fine grid and in whole instances.

The dynamic program chooses among coarse boundaries. Between them the cost is smooth enough for descent to find the
rest. Two kinds of move are tried until neither helps. For each pair of neighbouring stages: every boundary within a
window, combined with every split of their instances (for large stages, with splits near the present one). Between any
two stages: a shift of instances, in halving steps. A partition is only ever replaced by a cheaper one.
"""

from typing import Final

import numpy as np
from numba import njit
from numpy.typing import NDArray

from cascadeinfer.core.cost.qoe import ServiceInputs, longest_of, stage_service

_INFEASIBLE: Final = 1e30
"""Stands for infinity, plus a penalty that falls with each instance, so that infeasible stages attract instances."""
_MAX_ROUNDS: Final = 20
_SPLIT_WINDOW: Final = 2
"""Instances by which a split may change together with its boundary."""
_SMALLEST_GAIN: Final = 1e-9


@njit(cache=True, error_model="numpy")
def _cost(inputs: ServiceInputs, i: int, j: int, longest: NDArray[np.float64], k: int) -> float:
    cost = stage_service(inputs, i, j, longest, float(k)).cost
    return cost if cost < _INFEASIBLE else _INFEASIBLE * (1.0 + 1.0 / k)


@njit(cache=True, error_model="numpy")
def _improve_pair(
    inputs: ServiceInputs,
    bounds: NDArray[np.int64],
    instances: NDArray[np.int64],
    costs: NDArray[np.float64],
    s: int,
    window: int,
) -> bool:
    """Move the boundary between stages s and s + 1, and a few instances across it, if that helps."""
    lowest = max(bounds[s] + 1, bounds[s + 1] - window)
    highest = min(bounds[s + 2] - 1, bounds[s + 1] + window)
    both = instances[s] + instances[s + 1]
    fewest = max(1, instances[s] - _SPLIT_WINDOW)
    most = min(both - 1, instances[s] + _SPLIT_WINDOW)
    best = costs[s] + costs[s + 1]
    found = False
    new_bound, new_split, new_cost = bounds[s + 1], instances[s], costs[s]
    for bound in range(lowest, highest + 1):
        below = longest_of(inputs, bounds[s], bound)
        above = longest_of(inputs, bound, bounds[s + 2])
        for split in range(fewest, most + 1):
            first = _cost(inputs, bounds[s], bound, below, split)
            if first >= best:
                continue
            second = _cost(inputs, bound, bounds[s + 2], above, both - split)
            if first + second < best * (1.0 - _SMALLEST_GAIN):
                best = first + second
                new_bound, new_split, new_cost = bound, split, first
                found = True
    if found:
        bounds[s + 1] = new_bound
        instances[s], instances[s + 1] = new_split, both - new_split
        costs[s], costs[s + 1] = new_cost, best - new_cost
    return found


@njit(cache=True, error_model="numpy")
def _shift_instances(
    inputs: ServiceInputs,
    bounds: NDArray[np.int64],
    instances: NDArray[np.int64],
    costs: NDArray[np.float64],
    largest_shift: int,
) -> bool:
    """Shift instances between any two stages while that helps, in halving steps."""
    found = False
    shift = largest_shift
    n = len(instances)
    while shift >= 1:
        for giver in range(n):
            for taker in range(n):
                if giver == taker or instances[giver] <= shift:
                    continue
                fewer = instances[giver] - shift
                low, high = bounds[giver], bounds[giver + 1]
                longest = longest_of(inputs, low, high)
                less = _cost(inputs, low, high, longest, fewer)
                if less >= costs[giver] + costs[taker]:
                    continue
                low, high = bounds[taker], bounds[taker + 1]
                longest = longest_of(inputs, low, high)
                more = _cost(inputs, low, high, longest, instances[taker] + shift)
                if less + more < (costs[giver] + costs[taker]) * (1.0 - _SMALLEST_GAIN):
                    instances[giver] -= shift
                    instances[taker] += shift
                    costs[giver] = less
                    costs[taker] = more
                    found = True
        shift //= 2
    return found


@njit(cache=True, error_model="numpy")
def improve(
    inputs: ServiceInputs,
    bounds: NDArray[np.int64],
    instances: NDArray[np.int64],
    window: int,
    largest_shift: int,
) -> float:
    """
    Improve a partition in place.

    Args:
        inputs: See `stage_service`.
        bounds: Edge indices that bound the stages.  # (n_stages + 1,)
        instances: Whole instances per stage, >= 1.  # (n_stages,)
        window: Maximum number of edges by which a boundary moves at once.
        largest_shift: Maximum number of instances that move at once between two stages.

    Returns:
        The cost afterwards; infinite when a stage is infeasible.
    """
    n = len(instances)
    costs = np.empty(n)
    for s in range(n):
        longest = longest_of(inputs, bounds[s], bounds[s + 1])
        costs[s] = _cost(inputs, bounds[s], bounds[s + 1], longest, instances[s])
    for _ in range(_MAX_ROUNDS):
        moved = _shift_instances(inputs, bounds, instances, costs, largest_shift)
        for s in range(n - 1):
            moved |= _improve_pair(inputs, bounds, instances, costs, s, window)
        if not moved:
            break
    total = costs.sum()
    return total if total < _INFEASIBLE else np.inf

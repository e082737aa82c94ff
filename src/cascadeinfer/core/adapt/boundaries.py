"""
Range refinement: neighbouring stages move their common boundary by small steps from what they observe.

Each side knows two things: how full its instances are, and what has arrived and finished of late (`recent.py`). From these, in order:
1. *Pressure.* A side whose instances are nearly full gives, unless the other is nearly as full: the boundary moves away from it,
   whatever any prediction says. What waits for memory is in no step time.
2. *Outlook.* With a cost model: the two stages' predicted cost for the recent workload with the boundary one step up, one step down and
   where it is (the planner's own prediction, so a boundary that the planner has just set stands still). It moves when that gains.
3. *Balance.* Without a cost model: the fuller side gives.

Damping: loads are smoothed; what is inside the dead bands moves nothing; one step changes the boundary by a few per cent; a boundary
keeps its distance from its neighbours, so no range gets empty and none crosses another. Source: arXiv 2512.19179, section on adaptive
range refinement.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from cascadeinfer.core.plan.problem import PlanProblem


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineSettings:
    """
    How fast and how far boundaries move.

    Attributes:
        interval_s: Between two steps.
        memory_s: Time constant of the recent workload.
        min_requests: Fewest finished requests for an outlook.
        smoothing: Weight of a new observation in the smoothed loads.
        step: Change of the log of the boundary in one step.
        least_gain: Share of the two stages' predicted cost that a step must save.
        full_load: Load from which a side is nearly full.
        idle_load: Without an outlook nothing moves while both sides are below this: there is nothing to balance.
        load_band: Difference of loads (pressure), or log of their ratio (balance), that moves nothing.
        spacing: Least ratio between neighbouring boundaries.
        shortest_tokens: No boundary below this.
    """

    interval_s: float = 2.0
    memory_s: float = 60.0
    min_requests: int = 100
    smoothing: float = 0.2
    step: float = 0.05
    least_gain: float = 0.002
    full_load: float = 0.85
    idle_load: float = 0.25
    load_band: float = 0.15
    spacing: float = 1.25
    shortest_tokens: int = 32


@dataclass(frozen=True, slots=True)
class Neighbours:
    """
    Two stages and what lies around them.

    Attributes:
        below_tokens: Start of the lower stage.
        above_tokens: End of the upper stage, None without one.
        lower_load: Mean load of the lower stage's instances; 1.0 is full.
        upper_load: The same of the upper stage.
    """

    below_tokens: int
    above_tokens: int | None
    lower_load: float
    upper_load: float


def outlook(
    problems: tuple[PlanProblem, PlanProblem], boundary_tokens: int, around: Neighbours, instances: tuple[int, int]
) -> Callable[[int], float]:
    """
    What moving a boundary would save by the planner's prediction.

    Args:
        problems: The recent workload with the cost model and capacity of the lower and of the upper stage's instances.
        boundary_tokens: Where the boundary is.
        around: Its two sides.
        instances: Of the lower and of the upper stage.

    Returns:
        Saving as a share of the two stages' predicted cost, by the boundary's new place; lengths count as the nearest edge of the
        workload's buckets.
    """
    lower, upper = problems
    histogram = lower.histogram
    low = histogram.nearest_edge(around.below_tokens)
    high = len(lower.edges) - 1 if around.above_tokens is None else histogram.nearest_edge(around.above_tokens)

    def cost_at(tokens: int) -> float:
        edge = histogram.nearest_edge(tokens)
        if not low < edge < high:
            return math.inf
        return lower.service(low, edge, instances[0]).cost + upper.service(edge, high, instances[1]).cost

    now = cost_at(boundary_tokens)

    def gain_of(tokens: int) -> float:
        then = now if tokens == boundary_tokens else cost_at(tokens)
        if not math.isfinite(now):
            return float(math.isfinite(then))
        return 1.0 - then / now if now > 0.0 else 0.0

    return gain_of


class BoundaryRefiner:
    """One boundary. Keeps the smoothed loads of its two sides between steps."""

    def __init__(self, settings: RefineSettings) -> None:
        self._settings = settings
        self._loads: tuple[float, float] | None = None

    def step(self, boundary_tokens: int, around: Neighbours, gain_of: Callable[[int], float] | None) -> int:
        """
        Where the boundary should be now.

        Args:
            boundary_tokens: Where it is.
            around: Its two sides.
            gain_of: What moving the boundary there would save, as a share of the two stages' predicted cost; None: no outlook.

        Returns:
            The same, or a length one step away, at its distance from the neighbours.
        """
        settings = self._settings
        weight = settings.smoothing
        before = self._loads or (around.lower_load, around.upper_load)
        lower = before[0] + weight * (around.lower_load - before[0])
        upper = before[1] + weight * (around.upper_load - before[1])
        self._loads = (lower, upper)
        if max(lower, upper) >= settings.full_load and abs(lower - upper) > settings.load_band:
            return self._moved(boundary_tokens, around, upwards=upper > lower)
        if gain_of is not None:
            options = [self._moved(boundary_tokens, around, upwards=upwards) for upwards in (False, True)]
            gain, best = max((gain_of(option), option) for option in options)
            return best if gain >= settings.least_gain else boundary_tokens
        if (
            max(lower, upper) >= settings.idle_load
            and abs(math.log(max(upper, 1e-3) / max(lower, 1e-3))) > settings.load_band
        ):
            return self._moved(boundary_tokens, around, upwards=upper > lower)
        return boundary_tokens

    def _moved(self, boundary_tokens: int, around: Neighbours, *, upwards: bool) -> int:
        settings = self._settings
        if upwards:
            moved = math.ceil(boundary_tokens * math.exp(settings.step))
            most = moved if around.above_tokens is None else math.floor(around.above_tokens / settings.spacing)
            return max(boundary_tokens, min(moved, most))
        moved = math.floor(boundary_tokens * math.exp(-settings.step))
        least = max(settings.shortest_tokens, math.ceil(around.below_tokens * settings.spacing))
        return min(boundary_tokens, max(moved, least))

"""
Range refinement: neighbouring stages move their common boundary in small steps, based on what they observe.

Each side knows how full its instances are, and what has arrived and finished recently (`recent.py`). Three rules apply,
in this order:
1. *Pressure.* If the instances of one side are nearly full and the other side's are not nearly as full, the boundary
   moves away from the full side, whatever the prediction says: waiting for memory shows up in no step time.
2. *Outlook.* With a cost model, the cost of the two stages is predicted for the recent workload with the boundary one
   step up, one step down and unchanged. This is the planner's own prediction, so a boundary that the planner has just
   set stays put. The boundary moves where the cost falls.
3. *Balance.* Without a cost model, the fuller side gives.

Damping: loads are smoothed; differences inside the dead bands move nothing; one step changes the boundary by a few per
cent; a boundary keeps its distance from its neighbours, so no range becomes empty and no two cross. Source: arXiv
2512.19179, section on adaptive range refinement.
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
        interval_s: Time between two steps.
        memory_s: Time constant of the recent workload.
        min_requests: Fewest finished requests for an outlook.
        smoothing: Weight of a new observation in the smoothed loads.
        step: Change of the log of the boundary in one step.
        least_gain: Share of the two stages' predicted cost that a step must save.
        full_load: Load from which a side counts as nearly full.
        idle_load: Without an outlook, nothing moves while both sides are below this load: there is nothing to balance.
        load_band: Difference of loads (pressure), or log of their ratio (balance), that moves nothing.
        spacing: Least ratio between neighbouring boundaries.
        shortest_tokens: Lower bound of every boundary.
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
    Two stages and their surroundings.

    Attributes:
        below_tokens: Start of the lower stage.
        above_tokens: End of the upper stage; None if it is open.
        lower_load: Mean load of the lower stage's instances; 1.0 is full.
        upper_load: The same for the upper stage.
    """

    below_tokens: int
    above_tokens: int | None
    lower_load: float
    upper_load: float


def outlook(
    problems: tuple[PlanProblem, PlanProblem], boundary_tokens: int, around: Neighbours, instances: tuple[int, int]
) -> Callable[[int], float]:
    """
    What moving a boundary would save, by the planner's prediction.

    Args:
        problems: The recent workload with the cost model and capacity of the lower and of the upper stage's instances.
        boundary_tokens: The current boundary.
        around: Its two sides.
        instances: Number of instances of the lower and of the upper stage.

    Returns:
        Saving as a share of the two stages' predicted cost, as a function of the new boundary. Lengths are rounded to
        the nearest edge of the workload's buckets.
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
        The boundary after this step.

        Args:
            boundary_tokens: The current boundary.
            around: Its two sides.
            gain_of: Saving of moving the boundary to a length, as a share of the two stages' predicted cost; None
                without an outlook.

        Returns:
            The same length, or one a step away that keeps its distance from the neighbours.
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

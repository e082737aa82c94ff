"""
How many instances a load needs: the fewest with which the step model predicts that the SLO is kept.

For each number of instances the planner's own prediction is taken of the best layout, plain load balancing included,
with the share of requests that miss a limit as its objective. The share falls as instances are added, so the fewest are
found by doubling steps around a first guess and by bisection.

Hysteresis is in the load, not in time: more instances are advised as soon as the load needs them, fewer only when they
would also carry the load plus `headroom`. A load that varies by less than that changes nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from cascadeinfer.core.errors import PlanError
from cascadeinfer.core.plan.objective import SloAttainment
from cascadeinfer.core.plan.planner import lowest_cost
from cascadeinfer.core.plan.problem import PlanProblem


@dataclass(frozen=True, slots=True)
class ServiceLevel:
    """
    What the instances are to achieve.

    Attributes:
        ttft_s: Limit on a request's time to first token.
        tpot_s: Limit on its time per output token.
        attainment: Share of requests that keep both.
        headroom: Share by which the load may grow before fewer instances are too few.

    Raises:
        PlanError: A value is out of range.
    """

    ttft_s: float
    tpot_s: float
    attainment: float = 0.95
    headroom: float = 0.15

    def __post_init__(self) -> None:
        """Check the fields."""
        if not (self.ttft_s > 0.0 and self.tpot_s > 0.0):
            raise PlanError(f"SLO limits must be positive, not TTFT {self.ttft_s} s and TPOT {self.tpot_s} s")
        if not 0.0 < self.attainment < 1.0:
            raise PlanError(f"the share of requests that keep the SLO lies in (0, 1), not {self.attainment}")
        if not 0.0 <= self.headroom <= 1.0:
            raise PlanError(f"the headroom lies in [0, 1], not {self.headroom}")

    def __str__(self) -> str:
        """E.g. `95 % within TTFT 2 s and TPOT 0.1 s`."""
        return f"{100.0 * self.attainment:g} % within TTFT {self.ttft_s:g} s and TPOT {self.tpot_s:g} s"


def desired_instances(problem: PlanProblem, level: ServiceLevel, before: int | None, most: int) -> int | None:
    """
    The number of instances to have.

    Args:
        problem: Workload, rate, step model and capacity; its number of instances is the first guess.
        level: What they are to achieve.
        before: The last answer, for hysteresis; None if there is none.
        most: The largest number considered, >= 1.

    Returns:
        The number, or None if `most` instances do not keep the SLO.
    """
    needed = _fewest(problem, level, before or problem.n_instances, most)
    if needed is None or before is None or needed >= before:
        return needed
    with_headroom = _fewest(problem.with_rate(problem.rate_per_s * (1.0 + level.headroom)), level, needed, before)
    return before if with_headroom is None else min(before, with_headroom)


def _fewest(problem: PlanProblem, level: ServiceLevel, near: int, most: int) -> int | None:
    objective = SloAttainment(level.ttft_s, level.tpot_s)
    allowed = 1.0 - level.attainment

    def is_kept(n_instances: int) -> bool:
        try:
            return lowest_cost(replace(problem, n_instances=n_instances, objective=objective)) <= allowed
        except PlanError:
            return False

    return fewest(is_kept, near, most)


def fewest(is_enough: Callable[[int], bool], near: int, most: int) -> int | None:
    """
    The smallest number from 1 to `most` that is enough, given that all larger ones are; None if none is.

    It asks O(log of the distance from `near`) times.
    """
    high = min(max(1, near), most)
    low, step = 0, 1  # `low` is not enough
    if is_enough(high):
        while high > 1:
            middle = max(1, high - step)
            if not is_enough(middle):
                low = middle
                break
            high, step = middle, 2 * step
    else:
        while True:
            if high == most:
                return None
            low, high, step = high, min(most, high + step), 2 * step
            if is_enough(high):
                break
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high

"""Advises how many instances the recent workload needs, whenever the number changes (`core/plan/scale.py`)."""

from dataclasses import dataclass
from typing import Final

from cascadeinfer.core.plan.problem import PlanProblem
from cascadeinfer.core.plan.scale import ServiceLevel, desired_instances

MOST_INSTANCES: Final = 1024
"""As many as a server takes."""


@dataclass(frozen=True, slots=True)
class Advice:
    """A number of instances, None if no number keeps the SLO, and why."""

    n_instances: int | None
    why: str


class ScaleAdvisor:
    """Keeps the last advice, for hysteresis and to be silent while nothing changes."""

    def __init__(self, level: ServiceLevel) -> None:
        """
        Args:
            level: What the instances are to achieve.
        """
        self._level = level
        self._advised: int | None = None
        self._last: Advice | None = None

    def advise(self, problem: PlanProblem) -> Advice | None:
        """New advice for this workload; None if it is the last one."""
        wanted = desired_instances(problem, self._level, self._advised, MOST_INSTANCES)
        if self._last is not None and self._last.n_instances == wanted:
            return None
        if wanted is not None:
            self._advised = wanted
            why = f"{problem.rate_per_s:.3g} requests/s, {self._level}"
        else:
            why = f"not even {MOST_INSTANCES} keep {self._level} at {problem.rate_per_s:.3g} requests/s"
        self._last = Advice(wanted, why)
        return self._last

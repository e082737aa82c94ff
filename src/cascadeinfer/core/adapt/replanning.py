"""
Online planning: when to plan, from which workload, and whether to adopt the new plan.

The workload consists of the requests that arrived recently, finished or not (`core/adapt/recent.py`). The planner runs
every `interval_s`. Its plan is adopted when it gains enough over the layout in force, as predicted by the same model
for the same workload. The required gain is larger for a small sample than for a large one (hysteresis: a plan that may
be no better than the one in force changes nothing). When the demand exceeds the capacity of every layout, the plan is
made for what could be served.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from cascadeinfer.core.adapt.recent import MOST_UNKNOWN, NOBODY, RecentWorkload, Unfinished
from cascadeinfer.core.cost.histogram import LengthHistogram
from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.errors import PlanError
from cascadeinfer.core.layout import Proposal, StageLayout
from cascadeinfer.core.plan.objective import MeanNormalizedLatency, Objective
from cascadeinfer.core.plan.planner import predict, solve
from cascadeinfer.core.plan.problem import DEFAULT_MARGIN, DEFAULT_MAX_STAGES, HandOverCost, PlanProblem, ServiceFloor
from cascadeinfer.core.plan.scale import ServiceLevel
from cascadeinfer.core.policy import NextPlan
from cascadeinfer.core.types import InstanceCapacity, InstanceId

Planner = Callable[[LengthHistogram, float, InstanceCapacity, int, StageLayout], Proposal | None]
"""
(workload, requests per second, capacity of an instance, instances, layout in force) -> better stages, or None.
`Replanner` assigns the instances to the stages.
"""

SURE_REQUESTS: Final = 1000.0
"""With at least this many requests, the sampling error is smaller than the model's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSettings:
    """
    Parameters of online planning.

    Attributes:
        interval_s: Time between two plans.
        memory_s: Time constant of the workload's exponential decay.
        min_requests: Minimum number of finished requests to plan from.
        most_unknown: Maximum share of requests that may outlive all finished ones; above it, lengths are guesses and
            nothing is planned.
        margin: Minimum gain of several stages over one.
        hysteresis: Minimum gain of a new plan over the layout in force, in the limit of many requests; see
            `needed_gain`.
        overload_share: Share of the capacity to plan for when the demand exceeds it.
        objective: What to minimise; None: what the kind of plan minimises by default.
        hand_over: Cost of a hand-over.
        floor: Limits that every stage must meet.
        max_stages: Maximum number of stages.
        max_tokens: Longest sequence.
        service_level: What the instances are to achieve, to be told how many are needed; None: no advice is given.
    """

    interval_s: float = 30.0
    memory_s: float = 300.0
    min_requests: int = 200
    most_unknown: float = MOST_UNKNOWN
    margin: float = DEFAULT_MARGIN
    hysteresis: float = 0.06
    overload_share: float = 0.9
    objective: Objective | None = None
    hand_over: HandOverCost = field(default_factory=HandOverCost)
    floor: ServiceFloor = field(default_factory=ServiceFloor)
    max_stages: int = DEFAULT_MAX_STAGES
    max_tokens: int = 131_072
    service_level: ServiceLevel | None = None

    def needed_gain(self, requests: float) -> float:
        """
        The gain over the layout in force that a new plan needs, given the (decayed) number of requests in the workload.

        A prediction has the error of its model and that of its sample, which shrinks with the square root of the sample
        size. Near capacity, 800 requests of nearly equal lengths were seen to promise 6 % to a layout that was 3 %
        worse (simulated).
        """
        return self.hysteresis * (1.0 + math.sqrt(SURE_REQUESTS / max(1.0, requests)))

    def problem(
        self,
        model: StepModel,
        workload: LengthHistogram,
        rate_per_s: float,
        capacity: InstanceCapacity,
        n_instances: int,
        objective: Objective | None = None,
    ) -> PlanProblem:
        """
        The planning problem for this workload.

        Args:
            model: Cost of a step.
            workload: Lengths of the requests.
            rate_per_s: Requests per second.
            capacity: Capacity of each instance.
            n_instances: Instances to place.
            objective: The default of this kind of plan; None: mean normalised latency.

        Raises:
            PlanError: The workload does not fit the instances.
        """
        return PlanProblem(
            workload,
            model,
            capacity,
            rate_per_s,
            n_instances,
            objective=self.objective or objective or MeanNormalizedLatency(),
            margin=self.margin,
            hand_over=self.hand_over,
            floor=self.floor,
            max_stages=self.max_stages,
        )


class ModelPlanner:
    """
    The planner of `core/plan` on a cost model, with hysteresis; a `Planner`.

    Attributes:
        model: The cost model; without one, no plan is made.
        why: The reason for the last proposal, with its predicted gain.
        verdict: What became of the last call.
    """

    def __init__(self, model: StepModel | None, settings: PlanSettings) -> None:
        self.model = model
        self.why = ""
        self.verdict = ""
        self._settings = settings

    def __call__(
        self,
        workload: LengthHistogram,
        rate_per_s: float,
        capacity: InstanceCapacity,
        n_instances: int,
        current: StageLayout,
    ) -> Proposal | None:
        """See `Planner`."""
        settings = self._settings
        if self.model is None:
            self.verdict = "the cost of steps is not known yet"
            return None
        problem = settings.problem(self.model, workload, rate_per_s, capacity, n_instances)
        try:
            best = solve(problem)
        except PlanError as error:
            if not error.capacity_per_s:
                self.verdict = "no layout can serve this workload"
                return None  # even the smallest demand cannot be served within the floor: no layout is better
            problem = problem.with_rate(settings.overload_share * error.capacity_per_s)
            best = solve(problem)
        in_force = Proposal.like(current)
        if best.proposal == in_force:
            self.verdict = "the best stages are those in force"
            return None
        gain = problem.objective.gain(self._cost_of(problem, in_force), best.cost)
        needed = settings.needed_gain(workload.requests)
        if gain < needed:
            self.verdict = f"the best other stages would gain {gain:.1%}, less than the {needed:.1%} needed"
            return None
        self.verdict = "new stages were put in force"
        self.why = (
            f"planned from {workload.requests:.0f} requests at {rate_per_s:.3g}/s: predicted gain over the layout "
            f"before {gain:.0%}"
        )
        return best.proposal

    @staticmethod
    def _cost_of(problem: PlanProblem, in_force: Proposal) -> float:
        try:
            return predict(problem, in_force).cost
        except PlanError:
            return float("inf")  # boundaries too close together for the workload's buckets


class PlanSchedule:
    """
    Schedules online planning and keeps the workload that plans are made from.

    Attributes:
        workload: Must be notified of arrivals and ends.
        seen: Lengths and requests per second that the last plan was made from; None if too little had been seen.
    """

    def __init__(self, settings: PlanSettings) -> None:
        """
        Args:
            settings: When to plan, and from what.
        """
        self.workload = RecentWorkload(settings.memory_s, settings.max_tokens)
        self._settings = settings
        self._next_s: float | None = None
        self.seen: tuple[LengthHistogram, float] | None = None
        self._too_few = False

    def next_plan(self, verdict: str) -> NextPlan:
        """
        What the next plan needs.

        Args:
            verdict: What became of the planner's last call.
        """
        requests = self.workload.n_finished
        last = "too few requests, or too few of their final lengths, had been seen" if self._too_few else verdict
        return NextPlan(self._next_s, requests, self._settings.min_requests, self._settings.needed_gain(requests), last)

    def is_due(self, now_s: float) -> bool:
        """Whether `propose` should be called. The first plan is due one interval after the first call."""
        if self._next_s is None:
            self._next_s = now_s + self._settings.interval_s
        return now_s >= self._next_s

    def look(self, now_s: float, unfinished: Unfinished = NOBODY) -> tuple[LengthHistogram, float] | None:
        """
        Lengths and requests per second to plan from now, or None; the next plan is due one interval later.

        Args:
            now_s: The time.
            unfinished: Requests that run or wait now.
        """
        self._next_s = now_s + self._settings.interval_s
        self.seen = self.workload.look(now_s, self._settings.min_requests, unfinished, self._settings.most_unknown)
        self._too_few = self.seen is None
        return self.seen


class Replanner(PlanSchedule):
    """Asks a planner for better stages when they are due."""

    def __init__(self, planner: Planner, settings: PlanSettings) -> None:
        """
        Args:
            planner: Makes the plans.
            settings: When, and from what.
        """
        super().__init__(settings)
        self._planner = planner

    def propose(
        self,
        current: StageLayout,
        capacity: InstanceCapacity,
        ranked_ids: Sequence[InstanceId],
        now_s: float,
        unfinished: Unfinished = NOBODY,
    ) -> StageLayout | None:
        """
        Ask the planner for a better layout.

        Args:
            current: Layout in force.
            capacity: Capacity of each instance.
            ranked_ids: The instances in the order in which they are assigned to stages, shortest stage first.
            now_s: The time.
            unfinished: Requests that run or wait now.

        Returns:
            A layout that is better by the required gain, or None.
        """
        seen = self.look(now_s, unfinished)
        if seen is None:
            return None
        proposed = self._planner(*seen, capacity, len(ranked_ids), current)
        return None if proposed is None else proposed.on(ranked_ids)

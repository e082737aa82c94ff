"""
The planner's public functions: `plan(...) -> Plan`, `predict(...)` for given stages, and `capacity_rate(...)`.

A dynamic program over coarse boundaries (`dynamic_program.py`) is followed by local refinement on the histogram's own
grid (`refinement.py`) and by the choice: among the plans within `stage_tolerance` of the best, the one with the fewest
stages, or a single stage if that plan does not gain the margin over it. The margin is there because differences between
layouts are predicted with some error (though a smaller one than absolute values), and because hand-overs and moving
boundaries cost more than the model accounts for.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cascadeinfer.core.cost.histogram import Column, LengthHistogram
from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.cost.qoe import StageService
from cascadeinfer.core.errors import PlanError
from cascadeinfer.core.layout import Proposal, StageLayout
from cascadeinfer.core.plan.dynamic_program import MAX_UNITS, best_partitions, stage_costs
from cascadeinfer.core.plan.objective import MeanNormalizedLatency, Objective
from cascadeinfer.core.plan.problem import (
    DEFAULT_MARGIN,
    DEFAULT_MAX_STAGES,
    HandOverCost,
    PlanProblem,
    ServiceFloor,
)
from cascadeinfer.core.plan.refinement import improve
from cascadeinfer.core.types import UNBOUNDED_TOKENS, InstanceCapacity, InstanceId, LengthRange

_CAPACITY_STEPS: Final = 14
"""Bisections in the search for the capacity; the result is accurate to 1 part in 10,000 of the first bracket."""


@dataclass(frozen=True, slots=True)
class StagePrediction:
    """
    One stage of a plan.

    Attributes:
        range: Lengths it serves.
        n_instances: Number of instances.
        service: The model's prediction for the stage.
        share_of_requests: Share of the requests that start here.
        share_of_steps: Share of the decode steps that run here.
        share_of_work: Share of the seconds of work of all stages, without the constant cost of steps.
        hand_overs_per_s: Requests per second handed over into the stage.
    """

    range: LengthRange
    n_instances: int
    service: StageService
    share_of_requests: float
    share_of_steps: float
    share_of_work: float
    hand_overs_per_s: float


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """
    Proposed stages with their predictions.

    Attributes:
        stages: In order of length.
        cost: Predicted objective of this plan.
        one_stage_cost: Predicted objective of plain load balancing; infinite when that cannot carry the load.
        best: The best proposal with more than one stage, whether chosen or not; None when only one stage is feasible.
        cost_by_stages: Cost of the best layout found with 1, 2, ... stages; infinite where none is feasible.
        problem: The problem that was solved.
    """

    stages: tuple[StagePrediction, ...]
    cost: float
    one_stage_cost: float
    best: "Partition | None"
    cost_by_stages: tuple[float, ...]
    problem: PlanProblem

    @property
    def boundaries_tokens(self) -> tuple[int, ...]:
        """Inner boundaries, one fewer than there are stages."""
        return tuple(stage.range.lo_tokens for stage in self.stages[1:])

    @property
    def instances(self) -> tuple[int, ...]:
        """Instances per stage."""
        return tuple(stage.n_instances for stage in self.stages)

    @property
    def proposal(self) -> Proposal:
        """The stages' boundaries and sizes, without instances assigned."""
        return Proposal(self.boundaries_tokens, self.instances)

    @property
    def gain(self) -> float:
        """Gain of the best layout with several stages over one stage, as the objective counts it; 0 without one."""
        return 0.0 if self.best is None else self.problem.objective.gain(self.one_stage_cost, self.best.cost)

    def layout(self, instance_ids: tuple[InstanceId, ...]) -> StageLayout:
        """
        The plan applied to these instances, in order of id.

        Raises:
            PlanError: Their number is not the plan's.
        """
        return self.proposal.on(sorted(instance_ids))


@dataclass(frozen=True, slots=True)
class Partition:
    """A proposal and its predicted cost."""

    proposal: Proposal
    cost: float


def plan(
    histogram: LengthHistogram,
    step_model: StepModel,
    capacity: InstanceCapacity,
    rate_per_s: float,
    n_instances: int,
    *,
    objective: Objective | None = None,
    margin: float = DEFAULT_MARGIN,
    hand_over: HandOverCost | None = None,
    floor: ServiceFloor | None = None,
    max_stages: int = DEFAULT_MAX_STAGES,
) -> Plan:
    """
    Partition the length axis into the stages with the best predicted QoE, or keep one stage if nothing beats it by the
    margin.

    Args:
        histogram: Lengths of the requests.
        step_model: Cost of a step.
        capacity: Capacity of each instance.
        rate_per_s: Requests per second.
        n_instances: Instances to place.
        objective: What to minimise; mean normalised latency by default.
        margin: Gain that several stages must bring over one.
        hand_over: Cost of a hand-over.
        floor: Mean TTFT and TPOT that every stage must meet.
        max_stages: Maximum number of stages.

    Raises:
        PlanError: Invalid arguments, or a demand above capacity; for the latter, the message and `capacity_per_s` give
            the rate that could be served.

    Complexity: O(c^2 u) predictions and O(s c^2 u^2) additions for c candidates, u <= 128 units and s stages.
    """
    return solve(
        PlanProblem(
            histogram,
            step_model,
            capacity,
            rate_per_s,
            n_instances,
            objective=objective or MeanNormalizedLatency(),
            margin=margin,
            hand_over=hand_over or HandOverCost(),
            floor=floor or ServiceFloor(),
            max_stages=max_stages,
        )
    )


def solve(problem: PlanProblem) -> Plan:
    """
    The plan for a problem. See `plan`.

    Raises:
        PlanError: The demand is above the capacity of every layout.
    """
    last = len(problem.edges) - 1
    one_stage = problem.service(0, last, problem.n_instances).cost
    values, bounds, units = _coarse(problem)
    best: Partition | None = None
    if np.isfinite(values[1:]).any():
        near = np.flatnonzero(values[1:] <= (1.0 + problem.stage_tolerance) * values[1:].min()) + 1
        fewest = int(near[0])
        best = _refine(problem, bounds[fewest, : fewest + 2], units[fewest, : fewest + 1])
        values[fewest] = best.cost
        if not np.isfinite(best.cost):  # the rounded plan may be infeasible where fractions were not
            best = None
    values[0] = one_stage
    if not np.isfinite(one_stage) and best is None:
        capacity = _capacity(problem)
        raise PlanError(
            f"{problem.rate_per_s:g} requests/s is above the capacity of {problem.n_instances} instances for this "
            f"workload, about {capacity:.3g} requests/s",
            capacity_per_s=capacity,
        )
    by_stages = tuple(float(value) for value in values)
    take_best = best is not None and problem.objective.gain(one_stage, best.cost) >= max(problem.margin, 1e-12)
    if best is None or not take_best:
        return _describe(problem, Proposal((), (problem.n_instances,)), one_stage, best, by_stages)
    return _describe(problem, best.proposal, one_stage, best, by_stages)


def predict(problem: PlanProblem, proposal: Proposal) -> Plan:
    """
    The prediction for given stages, such as those in force. Boundaries are rounded to the nearest bucket edge.

    If the stages cannot carry the load, `cost` is infinite; that is a result, not an error.

    Raises:
        PlanError: Two boundaries fall on the same edge of the histogram's buckets.
    """
    boundaries_tokens = proposal.boundaries_tokens
    edges = [problem.histogram.nearest_edge(boundary) for boundary in boundaries_tokens]
    if any(b <= a for a, b in zip([0, *edges], [*edges, len(problem.edges) - 1], strict=True)):
        raise PlanError(f"boundaries {boundaries_tokens} are closer than the histogram's buckets")
    one_stage = problem.service(0, len(problem.edges) - 1, proposal.n_instances).cost
    rounded = Proposal(tuple(int(problem.histogram.edges_tokens[edge]) for edge in edges), proposal.sizes)
    return _describe(problem, rounded, one_stage, None, (one_stage,))


def lowest_cost(problem: PlanProblem) -> float:
    """
    The objective of the best layout, without making it a plan: of one stage, or of the best coarse partition.

    Infinite when no layout carries the load; that is a result, not an error.
    """
    one_stage = problem.service(0, len(problem.edges) - 1, problem.n_instances).cost
    values, _, _ = _coarse(problem)
    return float(min(one_stage, values.min()))


def capacity_rate(
    histogram: LengthHistogram,
    step_model: StepModel,
    capacity: InstanceCapacity,
    n_instances: int,
    *,
    max_stages: int = 1,
    floor: ServiceFloor | None = None,
) -> float:
    """
    The highest rate, in requests per second, that some layout of up to `max_stages` stages carries in steady state.

    At that rate the KV cache, the batch slots or the token budget run out, or a limit of `floor` is missed. Latency
    grows without bound on the way there, so it is not a rate to operate at. 0 when even the smallest rate cannot be
    served within the floor.

    Raises:
        PlanError: Invalid arguments.
    """
    return _capacity(
        PlanProblem(
            histogram, step_model, capacity, 1.0, n_instances, max_stages=max_stages, floor=floor or ServiceFloor()
        )
    )


def _capacity(problem: PlanProblem) -> float:
    last = len(problem.edges) - 1

    def one_stage_fits(rate_per_s: float) -> bool:
        return bool(np.isfinite(problem.with_rate(rate_per_s).service(0, last, problem.n_instances).cost))

    def some_layout_fits(rate_per_s: float) -> bool:
        values, _, _ = _coarse(problem.with_rate(rate_per_s))
        return bool(np.isfinite(values).any())

    low, high = 1e-9, 1.0
    if not one_stage_fits(low) and not some_layout_fits(low):
        return 0.0
    while one_stage_fits(high):
        low, high = high, 2.0 * high
    for _ in range(40):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if one_stage_fits(middle) else (low, middle)
    if problem.max_stages == 1 or problem.n_instances == 1 or not some_layout_fits(low * 1.001):
        return low
    high = low
    while some_layout_fits(high):
        low, high = high, 1.25 * high
    for _ in range(_CAPACITY_STEPS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if some_layout_fits(middle) else (low, middle)
    return low


def _coarse(problem: PlanProblem) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Run the dynamic program; bounds are returned as edge indices."""
    candidates = problem.candidates()
    n_units = min(problem.n_instances, MAX_UNITS)
    max_stages = max(1, min(problem.max_stages, n_units, len(candidates) - 1))
    costs = stage_costs(problem.inputs, candidates, n_units, problem.n_instances / n_units)
    values, bounds, units = best_partitions(costs, max_stages)
    return values, candidates[bounds], units


def _refine(problem: PlanProblem, bounds: NDArray[np.int64], units: NDArray[np.int64]) -> Partition:
    """Round units to whole instances, then improve the partition locally."""
    per_unit = problem.n_instances / int(units.sum())
    instances = whole_instances(units.astype(np.float64) * per_unit, problem.n_instances)
    bounds = bounds.copy()
    window = -(-_buckets_per_octave(problem) // problem.boundaries_per_octave)
    cost = improve(problem.inputs, bounds, instances, window, max(1, round(per_unit)))
    edges = problem.histogram.edges_tokens
    return Partition(
        Proposal(tuple(int(edges[b]) for b in bounds[1:-1]), tuple(int(n) for n in instances)), float(cost)
    )


def _buckets_per_octave(problem: PlanProblem) -> int:
    edges = problem.edges
    top = len(edges) - 2
    return max(1, top - int(np.searchsorted(edges, edges[top] / 2.0)))


def whole_instances(shares: NDArray[np.float64], n_instances: int) -> NDArray[np.int64]:
    """Round shares to whole numbers >= 1 with this sum, by largest remainders."""
    whole = np.maximum(1, np.floor(shares + 1e-9)).astype(np.int64)
    missing = n_instances - int(whole.sum())
    order = np.argsort(-(shares - whole), kind="stable")
    whole[order[:missing]] += 1
    return whole


def _describe(
    problem: PlanProblem,
    proposal: Proposal,
    one_stage_cost: float,
    best: Partition | None,
    cost_by_stages: tuple[float, ...],
) -> Plan:
    prefix = problem.histogram.prefix
    boundaries_tokens, instances = proposal.boundaries_tokens, proposal.sizes
    edges = [0, *(problem.histogram.edge_index(b) for b in boundaries_tokens), len(problem.edges) - 1]
    services = [problem.service(a, b, k) for a, b, k in zip(edges[:-1], edges[1:], instances, strict=True)]
    work = np.array([s.utilisation * k for s, k in zip(services, instances, strict=True)])
    shares = work / work.sum() if np.all(np.isfinite(work)) and work.sum() > 0.0 else np.full(len(work), np.nan)
    steps = max(float(prefix[Column.STEPS, -1]), 1e-300)
    crossing = problem.histogram.hand_overs
    los = (0, *boundaries_tokens)
    his = (*boundaries_tokens, UNBOUNDED_TOKENS)
    stages = tuple(
        StagePrediction(
            LengthRange(los[s], his[s]),
            instances[s],
            services[s],
            float(prefix[Column.STARTS, edges[s + 1]] - prefix[Column.STARTS, edges[s]]),
            float(prefix[Column.STEPS, edges[s + 1]] - prefix[Column.STEPS, edges[s]]) / steps,
            float(shares[s]),
            problem.rate_per_s * max(0.0, float(crossing[edges[s]])) if s else 0.0,
        )
        for s in range(len(instances))
    )
    return Plan(stages, sum(s.cost for s in services), one_stage_cost, best, cost_by_stages, problem)

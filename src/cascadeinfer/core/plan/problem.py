"""
The planning problem as one value: workload, cost of a step, instances, rate and objective.

`PlanProblem` is validated once and holds the arrays that the compiled code reads, so that planning, predicting a given
layout and searching for the capacity share them. `with_rate` keeps the arrays and is therefore cheap.
"""

from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cascadeinfer.core.cost.histogram import Column, LengthHistogram
from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.cost.qoe import ObjectiveTerms, ServiceInputs, StageService, range_service
from cascadeinfer.core.cost.queues import ServiceLimits
from cascadeinfer.core.errors import PlanError
from cascadeinfer.core.plan.objective import MeanNormalizedLatency, Objective, stage_table
from cascadeinfer.core.types import InstanceCapacity

DEFAULT_MARGIN: Final = 0.03
"""
Minimum gain of several stages over one. In simulation, every predicted gain of 3 % was a real gain, and mostly a larger
one (docs/planning.md).
"""
DEFAULT_MAX_STAGES: Final = 8
DEFAULT_STAGE_TOLERANCE: Final = 0.01
"""Minimum saving of an additional stage: half the median error of the prediction."""
_LEAST_S: Final = 1e-12
"""Stands for a KV token that costs no time."""
_NEGLIGIBLE: Final = 1e-3
"""
Boundaries are not considered where less than this share of the tokens lies below, or of the KV reads above: it would
not justify one instance in 1,000.
"""


@dataclass(frozen=True, slots=True)
class HandOverCost:
    """
    What a hand-over costs, and how many are possible.

    Attributes:
        pause_s: Pause of the request besides its transfer. Measured in the simulator: 20 ms.
        pause_per_token_s: Pause of the request per token of its length (KV bytes per token / bandwidth).
        per_instance_per_s: Maximum hand-overs into and out of one instance. 3 at once, attempted every 0.1 s, make 30;
            a stage that needs nearly all of them keeps requests that should have left.
        copied_ahead: Whether full blocks are copied before the cut, so that a hand-over's pause does not grow with the
            length. A request that is parked has its cut behind it and waits for all in either case.

    Raises:
        PlanError: A value is negative or not finite.
    """

    pause_s: float = 0.02
    pause_per_token_s: float = 0.0
    per_instance_per_s: float = 20.0
    copied_ahead: bool = False

    def __post_init__(self) -> None:
        """Check the fields."""
        for name in ("pause_s", "pause_per_token_s", "per_instance_per_s"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value >= 0.0):
                raise PlanError(f"{name} must be finite and >= 0, not {value}")


@dataclass(frozen=True, slots=True)
class ServiceFloor:
    """
    Mean TTFT and TPOT that every stage must meet; a stage that would not is not a candidate. Unlimited by default.

    Raises:
        PlanError: A limit is not positive.
    """

    ttft_s: float = float("inf")
    tpot_s: float = float("inf")

    def __post_init__(self) -> None:
        """Check the limits."""
        if not (self.ttft_s > 0.0 and self.tpot_s > 0.0):
            raise PlanError(f"limits must be positive, not TTFT {self.ttft_s} s and TPOT {self.tpot_s} s")


@dataclass(frozen=True, slots=True, eq=False)
class PlanProblem:
    """
    A workload, the instances that serve it, and what to minimise.

    Attributes:
        histogram: Lengths of the requests.
        step_model: Cost of a step.
        capacity: Capacity of each instance; all are alike.
        rate_per_s: Requests per second of the whole workload.
        n_instances: Instances to place.
        objective: What to minimise.
        margin: Gain (in the objective's terms) that several stages must bring over one.
        stage_tolerance: A plan with fewer stages is preferred when its cost is within this share of the best.
        max_stages: Maximum number of stages.
        boundaries_per_octave: Candidate boundaries per doubling of length, before refinement.
        hand_over: Cost of a hand-over.
        floor: Limits on every stage.
        inputs: The same values in the form that the compiled code reads.

    Raises:
        PlanError: A value is out of range, or the longest request does not fit into an instance's KV cache.
    """

    histogram: LengthHistogram
    step_model: StepModel
    capacity: InstanceCapacity
    rate_per_s: float
    n_instances: int
    objective: Objective = field(default_factory=MeanNormalizedLatency)
    margin: float = DEFAULT_MARGIN
    stage_tolerance: float = DEFAULT_STAGE_TOLERANCE
    max_stages: int = DEFAULT_MAX_STAGES
    boundaries_per_octave: int = 2
    hand_over: HandOverCost = field(default_factory=HandOverCost)
    floor: ServiceFloor = field(default_factory=ServiceFloor)
    inputs: ServiceInputs = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Validate, and prepare what the compiled code reads."""
        self._check()
        capacity = self.capacity
        coefficients = self.step_model.coefficients()
        if not np.all(np.isfinite(coefficients)):
            raise PlanError(f"the step model has coefficients that are not finite: {self.step_model}")
        inputs = ServiceInputs(
            table=stage_table(self.histogram, self.objective, capacity.max_batched_tokens),
            edges=self.histogram.edges_tokens.astype(np.float64),
            coefficients=coefficients,
            rate_per_s=float(self.rate_per_s),
            limits=ServiceLimits(
                kv_tokens=float(capacity.kv_tokens),
                max_num_seqs=float(capacity.max_num_seqs),
                max_batched_tokens=float(capacity.max_batched_tokens),
                block_tokens=float(capacity.block_size_tokens),
                pause_s=float(self.hand_over.pause_s),
                pause_per_token_s=0.0 if self.hand_over.copied_ahead else float(self.hand_over.pause_per_token_s),
                hand_overs_per_s=float(self.hand_over.per_instance_per_s),
                ttft_limit_s=float(self.floor.ttft_s),
                tpot_limit_s=float(self.floor.tpot_s),
            ),
            terms=ObjectiveTerms(*(float(term) for term in self.objective.terms())),
            queued_weight=self._queued_weight(),
        )
        object.__setattr__(self, "inputs", inputs)

    def _queued_weight(self) -> float:
        """How much a token of a queued prompt adds to a price (`core/instance.py`), relative to one that is decoded."""
        prefix, model = self.histogram.prefix, self.step_model
        urgency = float(prefix[Column.STARTS_NL, -1] / prefix[Column.STARTS, -1])
        held_s = max(model.per_kv_token_s, _LEAST_S)
        return 1.0 + urgency * model.compute_per_prefill_token_s / held_s

    def _check(self) -> None:
        if not (np.isfinite(self.rate_per_s) and self.rate_per_s > 0.0):
            raise PlanError(f"the rate must be a positive number of requests per second, not {self.rate_per_s}")
        if self.n_instances < 1:
            raise PlanError(f"a plan needs at least one instance, not {self.n_instances}")
        if not 0.0 <= self.margin < 1.0:
            raise PlanError(f"the margin lies in [0, 1), not {self.margin}")
        if not 0.0 <= self.stage_tolerance < 1.0:
            raise PlanError(f"the stage tolerance lies in [0, 1), not {self.stage_tolerance}")
        if self.max_stages < 1 or self.boundaries_per_octave < 1:
            raise PlanError("max_stages and boundaries_per_octave must be at least 1")
        capacity = self.capacity
        if min(capacity.kv_blocks, capacity.block_size_tokens, capacity.max_num_seqs, capacity.max_batched_tokens) < 1:
            raise PlanError(f"an instance without capacity: {capacity}")
        shortest_of_longest = self._longest_at_least()
        if shortest_of_longest > capacity.kv_tokens:
            raise PlanError(
                f"requests of {shortest_of_longest} tokens or more do not fit into an instance's {capacity.kv_tokens} "
                "tokens of KV cache"
            )

    def _longest_at_least(self) -> int:
        """The lower edge of the last bucket in which a request ends."""
        occupied = np.flatnonzero(np.diff(self.histogram.prefix[Column.ENDS]) > 0.0)
        return int(self.histogram.edges_tokens[occupied[-1]])

    @property
    def edges(self) -> NDArray[np.float64]:
        """Lengths in tokens at which a stage may begin or end.  # (n_edges,)"""
        return self.inputs.edges

    def with_rate(self, rate_per_s: float) -> "PlanProblem":
        """The same problem at another rate."""
        return replace(self, rate_per_s=rate_per_s)

    def candidates(self) -> NDArray[np.int64]:
        """Edges at which a stage may begin or end before refinement: log-spaced where the workload has tokens."""
        edges = self.histogram.edges_tokens
        prefix = self.histogram.prefix
        tokens = prefix[Column.STEPS] + prefix[Column.PROMPT]
        reads = prefix[Column.KV_STEPS] + prefix[Column.ATTENTION]
        inside = np.flatnonzero((tokens > _NEGLIGIBLE * tokens[-1]) & (reads < (1.0 - _NEGLIGIBLE) * reads[-1]))
        last = len(edges) - 1
        if len(inside) == 0:
            return np.array([0, last], dtype=np.int64)
        octaves = np.log2(edges[inside[[0, -1]]])
        steps = np.arange(
            np.ceil(octaves[0] * self.boundaries_per_octave), octaves[1] * self.boundaries_per_octave + 1e-9
        )
        wanted = 2.0 ** (steps / self.boundaries_per_octave)
        above = np.clip(np.searchsorted(edges, wanted), 1, last)
        nearest = np.where(wanted - edges[above - 1] <= edges[above] - wanted, above - 1, above)
        inner = np.unique(np.clip(nearest, inside[0], inside[-1]))
        return np.concatenate(([0], inner[(inner > 0) & (inner < last)], [last])).astype(np.int64)

    def service(self, first_edge: int, last_edge: int, n_instances: float) -> StageService:
        """The prediction for a stage between these edges (indices) on this many instances."""
        predicted: StageService = range_service(self.inputs, first_edge, last_edge, float(n_instances))
        return predicted

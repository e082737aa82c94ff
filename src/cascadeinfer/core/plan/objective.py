"""
What a plan minimises: pluggable objectives, each a set of weights on the histogram's columns.

Every objective is a mean over requests that can be split over stages: a wait counts where the request starts, a decode
step where it runs, a hand-over where the boundary is crossed. `rows` gives the weights as sums per bucket, `terms` the
scalars for missed limits. Lower is better for all of them; `describe` adds the unit.
"""

from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cascadeinfer.core.cost.histogram import Column, LengthHistogram
from cascadeinfer.core.cost.qoe import DEMAND_ROWS, WEIGHT_ROWS, ObjectiveTerms
from cascadeinfer.core.errors import PlanError

Rows = NDArray[np.float64]

_TIE_BREAK = 1e-3
"""Weight of the normalised latency in `SloAttainment`: 1 s per token counts as 0.1 % of requests, a mere tie-break."""


BALANCE: Final = 0.25
"""Share of the normalised latency in `BalancedLatency`; docs/planning.md says what other shares do."""


class Objective(Protocol):
    """A mean over requests that the planner minimises."""

    def rows(self, histogram: LengthHistogram, max_batched_tokens: int) -> Rows:
        """
        Prefix sums of the weights: rows `W_WAIT` to `W_ATTAIN_STEPS` of `core/cost/qoe.py`, in order.

        Args:
            histogram: The workload.
            max_batched_tokens: Token budget of a step; it determines how many steps a prefill takes.

        Returns:
            One column per edge.  # (WEIGHT_ROWS, n_edges)
        """
        ...

    def terms(self) -> ObjectiveTerms:
        """The objective's scalars."""
        ...

    def gain(self, one_stage: float, other: float) -> float:
        """The gain of a layout with value `other` over one stage; the margin applies to it."""
        ...

    def describe(self, value: float) -> str:
        """The value in words, with its unit."""
        ...


@dataclass(frozen=True, slots=True)
class MeanNormalizedLatency:
    """
    Mean over requests of (end-to-end latency, TTFT included) / (output tokens), in seconds per
    token. The default.
    """

    def rows(self, histogram: LengthHistogram, max_batched_tokens: int) -> Rows:
        """See `Objective.rows`."""
        p = histogram.prefix
        return np.stack(
            (
                p[Column.STARTS_NL],
                p[Column.PROMPT_NL],
                p[Column.ATTENTION_NL],
                _chunks(histogram, p[Column.STARTS_NL], max_batched_tokens),
                p[Column.STEPS_NL],
                p[Column.DECODING_STARTS_NL],
                p[Column.LAST_STEPS_NL],
                p[Column.STEPS_TPOT],
            )
        )

    def terms(self) -> ObjectiveTerms:
        """See `Objective.terms`."""
        return ObjectiveTerms(0.0, np.inf, np.inf)

    def gain(self, one_stage: float, other: float) -> float:
        """The share of the one-stage value that is saved; 1 when one stage cannot carry the load."""
        return relative_gain(one_stage, other)

    def describe(self, value: float) -> str:
        """In milliseconds per token."""
        return f"{1e3 * value:.2f} ms per output token"


@dataclass(frozen=True, slots=True)
class BalancedLatency:
    """
    `normalised_share` x the mean over requests of (end-to-end latency) / (output tokens), and the rest x all latency /
    all output tokens, in seconds per token, TTFT included.

    In the first part a request counts by 1 / (its output tokens), so that those with few count most; in the second all
    count alike, by 1 / (mean output tokens), as in the mean end-to-end latency. The default of plans with roles.

    Raises:
        PlanError: The share is not in [0, 1].
    """

    normalised_share: float = BALANCE

    def __post_init__(self) -> None:
        """Check the share."""
        if not 0.0 <= self.normalised_share <= 1.0:
            raise PlanError(f"the share of the normalised latency lies in [0, 1], not {self.normalised_share}")

    def rows(self, histogram: LengthHistogram, max_batched_tokens: int) -> Rows:
        """See `Objective.rows`."""
        p = histogram.prefix
        one_token = p[Column.STARTS] - p[Column.DECODING_STARTS]  # their last step is where they start
        plain = np.stack(
            (
                p[Column.STARTS],
                p[Column.PROMPT],
                p[Column.ATTENTION],
                _chunks(histogram, p[Column.STARTS], max_batched_tokens),
                p[Column.STEPS],
                p[Column.DECODING_STARTS],
                p[Column.LAST_STEPS] - one_token,
                p[Column.STEPS_TPOT],
            )
        )
        normalised = MeanNormalizedLatency().rows(histogram, max_batched_tokens)
        rows = self.normalised_share * normalised
        rows += (1.0 - self.normalised_share) / histogram.mean_output_tokens * plain
        rows[-1] = p[Column.STEPS_TPOT]
        return rows

    def terms(self) -> ObjectiveTerms:
        """See `Objective.terms`."""
        return ObjectiveTerms(0.0, np.inf, np.inf)

    def gain(self, one_stage: float, other: float) -> float:
        """The share of the one-stage value that is saved; 1 when one stage cannot carry the load."""
        return relative_gain(one_stage, other)

    def describe(self, value: float) -> str:
        """In milliseconds per token."""
        return f"{1e3 * value:.2f} ms per output token ({self.normalised_share:.0%} by request, the rest by token)"


@dataclass(frozen=True, slots=True)
class WeightedLatency:
    """
    `ttft_weight` x mean TTFT + `tpot_weight` x mean TPOT, in weighted seconds.

    Raises:
        PlanError: A weight is negative or not finite, or both are zero.
    """

    ttft_weight: float = 1.0
    tpot_weight: float = 10.0

    def __post_init__(self) -> None:
        """Check the weights."""
        weights = (self.ttft_weight, self.tpot_weight)
        if not (all(np.isfinite(w) and w >= 0.0 for w in weights) and sum(weights) > 0.0):
            raise PlanError(f"weights of TTFT and TPOT must be >= 0 and not both zero, not {weights}")

    def rows(self, histogram: LengthHistogram, max_batched_tokens: int) -> Rows:
        """See `Objective.rows`."""
        p = histogram.prefix
        return np.stack(
            (
                self.ttft_weight * p[Column.STARTS],
                self.ttft_weight * p[Column.PROMPT],
                self.ttft_weight * p[Column.ATTENTION],
                self.ttft_weight * _chunks(histogram, p[Column.STARTS], max_batched_tokens),
                self.tpot_weight * p[Column.STEPS_TPOT],
                self.tpot_weight * p[Column.STARTS_TPOT],
                self.tpot_weight * p[Column.LAST_STEPS_TPOT],
                p[Column.STEPS_TPOT],
            )
        )

    def terms(self) -> ObjectiveTerms:
        """See `Objective.terms`."""
        return ObjectiveTerms(0.0, np.inf, np.inf)

    def gain(self, one_stage: float, other: float) -> float:
        """The share of the one-stage value that is saved; 1 when one stage cannot carry the load."""
        return relative_gain(one_stage, other)

    def describe(self, value: float) -> str:
        """In weighted seconds."""
        return f"{value:.4f} s ({self.ttft_weight:g} x TTFT + {self.tpot_weight:g} x TPOT)"


@dataclass(frozen=True, slots=True)
class SloAttainment:
    """
    Share of requests that miss their TTFT or TPOT limit (union bound: the two shares are added); attainment is 1 minus
    this.

    Raises:
        PlanError: A limit is not positive.
    """

    ttft_slo_s: float
    tpot_slo_s: float

    def __post_init__(self) -> None:
        """Check the limits."""
        if not (self.ttft_slo_s > 0.0 and self.tpot_slo_s > 0.0):
            raise PlanError(f"SLO limits must be positive, not {self.ttft_slo_s} s and {self.tpot_slo_s} s")

    def rows(self, histogram: LengthHistogram, max_batched_tokens: int) -> Rows:
        """See `Objective.rows`; the normalised latency breaks ties."""
        rows = _TIE_BREAK * MeanNormalizedLatency().rows(histogram, max_batched_tokens)
        rows[-1] = histogram.prefix[Column.STEPS_TPOT]
        return rows

    def terms(self) -> ObjectiveTerms:
        """See `Objective.terms`."""
        return ObjectiveTerms(1.0, self.ttft_slo_s, self.tpot_slo_s)

    def gain(self, one_stage: float, other: float) -> float:
        """The increase of attainment, as a share of all requests; 1 when one stage cannot carry the load."""
        return max(0.0, min(1.0, one_stage) - min(1.0, other)) if np.isfinite(one_stage) else 1.0

    def describe(self, value: float) -> str:
        """In per cent of requests."""
        return (
            f"{100.0 * max(0.0, 1.0 - value):.1f} % of requests within TTFT {self.ttft_slo_s:g} s and TPOT "
            f"{self.tpot_slo_s:g} s"
        )


BuiltInObjective: TypeAlias = MeanNormalizedLatency | BalancedLatency | WeightedLatency | SloAttainment
"""The objectives that can be serialised (into an event log)."""


def relative_gain(one_stage: float, other: float) -> float:
    """The share of `one_stage` that `other` saves; 1 when only `other` is finite, 0 when it saves nothing."""
    if not np.isfinite(other):
        return 0.0
    return max(0.0, 1.0 - other / one_stage) if np.isfinite(one_stage) and one_stage > 0.0 else float(other < one_stage)


def stage_table(histogram: LengthHistogram, objective: Objective, max_batched_tokens: int) -> Rows:
    """The table that `stage_service` reads: demand, weights, and nobody pushed.  # (TABLE_ROWS, n_edges)"""
    rows = objective.rows(histogram, max_batched_tokens)
    if rows.shape != (WEIGHT_ROWS, len(histogram.edges_tokens)) or not np.all(np.isfinite(rows)):
        raise PlanError(f"objective {objective!r} gives weights of shape {rows.shape}, or not finite ones")
    nobody = np.zeros((1, len(histogram.edges_tokens)))
    return np.ascontiguousarray(np.concatenate((histogram.prefix[:DEMAND_ROWS], rows, nobody)))


def _chunks(histogram: LengthHistogram, starts: Rows, max_batched_tokens: int) -> Rows:
    """Prefix sums of start weight x steps per prefill, computed from each bucket's mean prompt."""
    p = histogram.prefix
    counts = np.diff(p[Column.STARTS])
    prompts = np.diff(p[Column.PROMPT])
    mean_prompt = np.divide(prompts, counts, out=np.ones_like(counts), where=counts > 0.0)
    chunks = np.ceil(np.maximum(mean_prompt, 1.0) / max_batched_tokens - 1e-9)
    return np.concatenate(([0.0], np.cumsum(np.diff(starts) * chunks)))

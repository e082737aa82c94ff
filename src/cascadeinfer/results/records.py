"""
Records of a run, in columns: one row per request, per migration, per instance sample.

The simulator and the load generator for live servers both fill them; `results/summary.py` reads them. Times are seconds
on the run's clock, NaN where something never happened. Definitions: `docs/metrics.md`.
"""

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

FloatColumn = NDArray[np.float64]
IntColumn = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class RequestRecords:
    """
    One row per request of the trace, in its order.

    Attributes:
        arrival_s: When the request arrived.
        dispatched_s: When the policy first placed it.
        scheduled_s: When it first ran.
        first_token_s: When its first output token came.
        finish_s: When its last output token came; NaN when it did not finish.
        prompt_tokens: Length of the prompt.
        output_tokens: Output it would produce.
        produced_tokens: Output it has produced.
        migrations: Completed moves.
        preemptions: Times it lost its KV cache for lack of blocks.
        recomputed_tokens: Tokens computed more than once, after preemption, loss or a failed move.
        prefix_hit_tokens: Tokens not computed, because they were cached.
        rejected: Whether the policy refused it.
        aborted: Whether its client left.
    """

    arrival_s: FloatColumn
    dispatched_s: FloatColumn
    scheduled_s: FloatColumn
    first_token_s: FloatColumn
    finish_s: FloatColumn
    prompt_tokens: IntColumn
    output_tokens: IntColumn
    produced_tokens: IntColumn
    migrations: IntColumn
    preemptions: IntColumn
    recomputed_tokens: IntColumn
    prefix_hit_tokens: IntColumn
    rejected: NDArray[np.bool_]
    aborted: NDArray[np.bool_]

    def __len__(self) -> int:
        """Number of requests."""
        return len(self.arrival_s)

    @property
    def finished(self) -> NDArray[np.bool_]:
        """Whether each produced all its output."""
        return np.isfinite(self.finish_s)

    @property
    def ttft_s(self) -> FloatColumn:
        """Time to first token, from the arrival."""
        return self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> FloatColumn:
        """Time per output token after the first; NaN for outputs of one token."""
        gaps = np.where(self.output_tokens > 1, self.output_tokens - 1, np.nan)
        return np.asarray((self.finish_s - self.first_token_s) / gaps)

    @property
    def e2e_s(self) -> FloatColumn:
        """End-to-end latency: from arrival to last token."""
        return self.finish_s - self.arrival_s

    @property
    def normalised_latency_s(self) -> FloatColumn:
        """End-to-end latency per output token."""
        return self.e2e_s / self.output_tokens

    @property
    def queueing_s(self) -> FloatColumn:
        """Seconds from arrival until it first ran."""
        return self.scheduled_s - self.arrival_s

    def rows(self, which: NDArray[np.bool_] | IntColumn) -> "RequestRecords":
        """These rows only."""
        return RequestRecords(**{f.name: getattr(self, f.name)[which] for f in fields(self)})

    def arrived_in(self, start_s: float, end_s: float) -> "RequestRecords":
        """Requests that arrived in `[start_s, end_s)`: excludes warm-up and cool-down."""
        return self.rows((self.arrival_s >= start_s) & (self.arrival_s < end_s))


@dataclass(frozen=True, slots=True, eq=False)
class MigrationRecords:
    """
    One row per migration, in order of their end.

    Attributes:
        started_s: When the policy asked for it.
        cut_s: When the source stopped decoding; NaN without a cut.
        ended_s: When it was over; for a completed move, when the target's first token came.
        row: Row of the request in the trace.
        source: Number of the instance.
        target: Number of the instance.
        tokens: Sequence length at the cut, 0 without one.
        pulled_tokens: Tokens whose KV went over the network.
        outcome: `MigrationOutcome` values.
        reason: `MigrationReason` values.
        detail: Why it ended as it did; empty for a plain move.
    """

    started_s: FloatColumn
    cut_s: FloatColumn
    ended_s: FloatColumn
    row: IntColumn
    source: IntColumn
    target: IntColumn
    tokens: IntColumn
    pulled_tokens: IntColumn
    outcome: tuple[str, ...]
    reason: tuple[str, ...]
    detail: tuple[str, ...]

    def __len__(self) -> int:
        """Number of migrations."""
        return len(self.started_s)

    @property
    def pause_s(self) -> FloatColumn:
        """Seconds from the last token at the source to the first at the target; NaN without a cut."""
        return self.ended_s - self.cut_s


@dataclass(frozen=True, slots=True, eq=False)
class InstanceSamples:
    """
    One row per report of an instance, in order of time.

    Attributes:
        time_s: Time of the report.
        instance: Number of the instance.
        stage: Index of its stage in the layout in force, -1 without one.
        running: Running requests.
        waiting: Requests in its queue.
        running_tokens: Sum of the lengths of the running requests.
        kv_use: Share of its blocks in use.
        step_s: Mean step time since its last report, 0.0 when it did not step.
    """

    time_s: FloatColumn
    instance: IntColumn
    stage: IntColumn
    running: IntColumn
    waiting: IntColumn
    running_tokens: IntColumn
    kv_use: FloatColumn
    step_s: FloatColumn

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.time_s)

    @property
    def mean_tokens(self) -> FloatColumn:
        """Mean length of the running requests; NaN when there are none."""
        return np.asarray(self.running_tokens / np.where(self.running > 0, self.running, np.nan))

    def of_instance(self, number: int) -> "InstanceSamples":
        """The timeline of one instance."""
        which = self.instance == number
        return InstanceSamples(**{f.name: getattr(self, f.name)[which] for f in fields(self)})

"""Collects a run's records row by row and turns them into columns (`results/records.py`)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cascadeinfer.core.events import InstanceReport, MigrationEnded
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.types import InstanceId
from cascadeinfer.results.records import FloatColumn, InstanceSamples, IntColumn, MigrationRecords, RequestRecords
from cascadeinfer.sim.instance import SimInstance
from cascadeinfer.sim.migrations import Move
from cascadeinfer.sim.requests import Phase, SimRequest
from cascadeinfer.workload.trace import Trace


class Recorder:
    """
    Rows so far.

    Attributes:
        layouts: Stage layouts with the time from which each was in force.
        shared_s: When a backlog sent a request to another place than its stage's.
    """

    def __init__(self) -> None:
        self.layouts: list[tuple[float, StageLayout]] = []
        self.shared_s: list[float] = []
        self._samples: list[tuple[float, int, int, int, int, int, float, float]] = []
        self._moves: list[tuple[float, float, float, int, int, int, int, int, str, str, str]] = []

    def sample(self, now_s: float, instance: SimInstance, stage: int, report: InstanceReport) -> None:
        """Keep an instance's report."""
        self._samples.append(
            (
                now_s,
                instance.number,
                stage,
                len(report.running_ids),
                len(report.waiting_ids),
                sum(report.running_tokens),
                report.kv_blocks_used / instance.capacity.kv_blocks,
                report.step_s,
            )
        )

    def migration(self, move: Move, ended: MigrationEnded, numbers: Mapping[InstanceId, int]) -> None:
        """Keep a migration that is over."""
        effect = move.migration.effect
        self._moves.append(
            (
                move.started_s,
                move.cut_s,
                move.ended_s,
                move.request.row,
                numbers[effect.source_id],
                numbers[effect.target_id],
                move.tokens,
                move.pulled_tokens + ended.copied_tokens,
                ended.outcome.value,
                effect.reason.value,
                ended.detail,
            )
        )

    def samples(self) -> InstanceSamples:
        """All samples in columns."""
        columns = _columns(self._samples, 8)
        return InstanceSamples(
            time_s=_floats(columns[0]),
            instance=_ints(columns[1]),
            stage=_ints(columns[2]),
            running=_ints(columns[3]),
            waiting=_ints(columns[4]),
            running_tokens=_ints(columns[5]),
            kv_use=_floats(columns[6]),
            step_s=_floats(columns[7]),
        )

    def migrations(self) -> MigrationRecords:
        """All migrations in columns."""
        columns = _columns(self._moves, 11)
        return MigrationRecords(
            started_s=_floats(columns[0]),
            cut_s=_floats(columns[1]),
            ended_s=_floats(columns[2]),
            row=_ints(columns[3]),
            source=_ints(columns[4]),
            target=_ints(columns[5]),
            tokens=_ints(columns[6]),
            pulled_tokens=_ints(columns[7]),
            outcome=columns[8],
            reason=columns[9],
            detail=columns[10],
        )


def request_records(trace: Trace, requests: Sequence[SimRequest]) -> RequestRecords:
    """One row per request of the trace; those that never arrived (the run was stopped) have produced nothing."""
    n = len(trace)

    def times(name: str) -> FloatColumn:
        column = np.full(n, np.nan)
        column[: len(requests)] = [getattr(request, name) for request in requests]
        return column

    def counts(name: str) -> IntColumn:
        column = np.zeros(n, dtype=np.int64)
        column[: len(requests)] = [getattr(request, name) for request in requests]
        return column

    def ended(phase: Phase) -> NDArray[np.bool_]:
        column = np.zeros(n, dtype=np.bool_)
        column[: len(requests)] = [request.phase is phase for request in requests]
        return column

    return RequestRecords(
        arrival_s=trace.arrival_s,
        dispatched_s=times("dispatched_s"),
        scheduled_s=times("scheduled_s"),
        first_token_s=times("first_token_s"),
        finish_s=times("finish_s"),
        prompt_tokens=trace.prompt_tokens,
        output_tokens=trace.output_tokens,
        produced_tokens=counts("produced"),
        migrations=counts("migrations"),
        preemptions=counts("preemptions"),
        recomputed_tokens=counts("recomputed_tokens"),
        prefix_hit_tokens=counts("prefix_hit_tokens"),
        rejected=ended(Phase.REJECTED),
        aborted=ended(Phase.ABORTED),
    )


def _floats(column: Sequence[float]) -> FloatColumn:
    return np.array(column, dtype=np.float64)


def _ints(column: Sequence[int]) -> IntColumn:
    return np.array(column, dtype=np.int64)


def _columns(rows: Sequence[tuple[Any, ...]], width: int) -> list[tuple[Any, ...]]:
    return list(zip(*rows, strict=True)) if rows else [()] * width

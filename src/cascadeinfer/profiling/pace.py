"""How long a kind of batch will take, from the steps measured so far."""

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from cascadeinfer.core.cost.latency import BatchFeatures
from cascadeinfer.profiling.grid import BatchKind, Room
from cascadeinfer.profiling.log import BatchRun, MeasuredStep

CAUTION: Final = 1.3
"""A kind beyond what has been measured takes longer than a straight line predicts."""
STEPS_KEPT: Final = 4000


class Pace:
    """
    A linear step time, fitted anew after every run.

    It serves only to plan the measurement: quick and rough. The time of a run beyond its steps (requests on their way,
    the end of the batch) is in `overhead_s`.
    """

    def __init__(self, room: Room) -> None:
        """Start without knowledge: everything takes no time."""
        self._room = room
        self._rows: list[tuple[float, ...]] = []
        self._coefficients: NDArray[np.float64] = np.zeros(5)
        self._overheads: list[float] = []

    def learn(self, run: BatchRun, taken_s: float) -> None:
        """Take a run into account; `taken_s` is its whole time, including clean-up."""
        self._rows += [_row(step) for step in run.steps if step.step_s > 0.0]
        del self._rows[:-STEPS_KEPT]
        self._overheads.append(max(0.0, taken_s - sum(step.step_s for step in run.steps)))
        table = np.array(self._rows)
        if len(table):
            # relative residuals, so that one long step does not outweigh all short ones
            self._coefficients, _ = nnls(table[:, :5] / table[:, 5:], np.ones(len(table)))

    def seconds(self, kind: BatchKind) -> float:
        """Expected seconds of one run."""
        steps_s = sum(count * float(self._coefficients @ _features(batch)) for batch, count in self._room.steps(kind))
        overhead_s = float(np.median(self._overheads)) if self._overheads else 0.0
        return CAUTION * steps_s + overhead_s

    def total_s(self, kinds: Iterable[BatchKind]) -> float:
        """Expected seconds of a run of each."""
        return sum(self.seconds(kind) for kind in kinds)


def _row(step: MeasuredStep) -> tuple[float, ...]:
    return 1.0, step.n_decode, step.kv_tokens, step.prefill_tokens, step.prefill_attention_tokens, step.step_s


def _features(batch: BatchFeatures) -> Sequence[float] | NDArray[np.float64]:
    return np.array(
        [1.0, batch.n_decode, batch.decode_kv_tokens, batch.prefill_tokens, batch.prefill_attention_tokens],
    )

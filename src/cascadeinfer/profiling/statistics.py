"""
Reduces steps to samples: the median of like steps, without the outliers, which are counted.

Like steps are steps of one kind of batch with the same requests decoding and the same prompt tokens, in a window in
which their KV cache hardly grows. Repetitions of the grid are pooled, so that a disturbance of one of them is averaged
out. A step far longer than its like is an outlier, caused for example by a compilation or by another process on the
processor. A step without like steps cannot be recognised as an outlier here; `fitting.py` checks those again.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cascadeinfer.core.cost.fit import RegionError, StepSamples
from cascadeinfer.profiling.log import BatchRun, MeasuredStep

WINDOW_STEPS: Final = 12
"""Decode steps pooled into one sample."""
OUTLIER_FACTOR: Final = 2.0
"""Threshold for outliers over the median; an outlier must also be above the spread of the others."""
OUTLIER_DEVIATIONS: Final = 6.0
NORMAL_OF_MAD: Final = 1.4826
"""Ratio of standard deviation to median absolute deviation of a normal distribution."""
MAX_RAMP_SAMPLES: Final = 8
"""Samples taken from the ramp of one kind of batch, which has as many steps as its prompts have chunks."""
REPEATS: Final = "the same batch in another round"
"""Name of the error that is due to the machine itself."""

Key = tuple[str, int, int, int]


@dataclass(frozen=True, slots=True)
class Points:
    """
    The data that the model is fitted to.

    Attributes:
        samples: Medians of like steps.
        kind_of: For each sample, its kind of batch.
        counts: For each sample, the number of steps behind the median.
        spread: For each sample, half the interquartile range of its steps over their median; 0 for a single step.
        steps: Number of steps seen.
        outliers: Number of steps left out.
        repeats: How far the medians of single rounds are from the pooled ones; None with one round.
    """

    samples: StepSamples
    kind_of: tuple[str, ...]
    counts: NDArray[np.int64]
    spread: NDArray[np.float64]
    steps: int
    outliers: int
    repeats: RegionError | None


def points_of(runs: Sequence[BatchRun]) -> Points:
    """Reduce runs to samples."""
    groups = _groups(runs)
    rows: list[tuple[float, ...]] = []
    kinds: list[str] = []
    counts: list[int] = []
    spreads: list[float] = []
    deviations: list[float] = []
    outliers = 0
    for key, members in groups.items():
        table = np.array([step for _, step in members], dtype=np.float64)
        kept = inliers(table[:, -1])
        outliers += int((~kept).sum())
        inside = table[kept]
        median = float(np.median(inside[:, -1]))
        quartiles = np.quantile(inside[:, -1], (0.25, 0.75))
        rows.append((*inside[:, :-1].mean(axis=0), median))
        kinds.append(key[0])
        counts.append(len(inside))
        spreads.append(float(quartiles[1] - quartiles[0]) / 2.0 / median)
        rounds = np.array([number for number, _ in members])[kept]
        if len(set(rounds.tolist())) > 1:
            deviations += [
                float(np.median(inside[rounds == r, -1])) / median - 1.0 for r in sorted(set(rounds.tolist()))
            ]
    columns = np.array(rows, dtype=np.float64).reshape(-1, 6).T.copy()
    return Points(
        StepSamples(*columns),
        tuple(kinds),
        np.array(counts, dtype=np.int64),
        np.array(spreads, dtype=np.float64),
        sum(len(run.steps) for run in runs),
        outliers,
        _repeats(deviations),
    )


def inliers(seconds: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Mask of the like steps that are not outliers; at least half of them."""
    median = np.median(seconds)
    deviation = NORMAL_OF_MAD * np.median(np.abs(seconds - median))
    kept: NDArray[np.bool_] = seconds <= np.maximum(OUTLIER_FACTOR * median, median + OUTLIER_DEVIATIONS * deviation)
    return kept


def step_share(runs: Iterable[BatchRun]) -> float:
    """
    Sum of the step times over the wall time of their runs: 1 if the engine did nothing but these steps.

    Prompts alone count only if there is nothing else, because between two of them the engine waits for the client.
    """
    runs = list(runs)
    busy = [run for run in runs if any(step.n_decode for step in run.steps)] or runs
    return sum(step.step_s for run in busy for step in run.steps) / sum(run.wall_s for run in busy)


def _groups(runs: Sequence[BatchRun]) -> dict[Key, list[tuple[int, MeasuredStep]]]:
    """Like steps, each with the round it belongs to."""
    groups: dict[Key, list[tuple[int, MeasuredStep]]] = defaultdict(list)
    for run in runs:
        seen: dict[tuple[int, int], int] = defaultdict(int)
        for step in run.steps:
            shape = step.n_decode, step.prefill_tokens
            if step.step_s <= 0.0 or not any(shape):
                continue
            if step.prefill_tokens:
                groups[run.kind, *shape, round(step.prefill_attention_tokens)].append((run.round, step))
            else:
                groups[run.kind, *shape, seen[shape] // WINDOW_STEPS].append((run.round, step))
                seen[shape] += 1
    return _thinned(groups)


def _thinned(groups: dict[Key, list[tuple[int, MeasuredStep]]]) -> dict[Key, list[tuple[int, MeasuredStep]]]:
    """Limit the ramp samples of each kind: keep those with the most steps, then evenly spaced ones."""
    ramps: dict[str, list[Key]] = defaultdict(list)
    for key in groups:
        ramps[key[0]].append(key)
    kept: set[Key] = set()
    for keys in ramps.values():
        single = [key for key in keys if len(groups[key]) == 1]
        kept.update(key for key in keys if len(groups[key]) > 1)
        stride = max(1, -(-len(single) // MAX_RAMP_SAMPLES))
        kept.update(single[::stride])
    return {key: members for key, members in groups.items() if key in kept}


def _repeats(deviations: Sequence[float]) -> RegionError | None:
    if not deviations:
        return None
    table = np.array(deviations)
    absolute = np.abs(table)
    return RegionError(
        REPEATS,
        len(table),
        float(np.median(absolute)),
        float(np.quantile(absolute, 0.9)),
        float(np.median(table)),
    )

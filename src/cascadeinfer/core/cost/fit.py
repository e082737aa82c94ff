"""
Fitting a step model to measured steps.

`fit_step_model` finds the non-negative coefficients that minimise a robust loss of the *relative* residual, so that a 5
ms step and a 500 ms step count alike and a few disturbed measurements do not distort the rest. A non-negative linear
least-squares fit gives the start (scipy.optimize.nnls); bounded trust-region least squares with the soft-L1 loss does
the rest (scipy.optimize.least_squares), because the straggler's maximum and the knee of the dense layers make the model
piecewise linear. The knee has several local optima, so it is started from a grid.

The caller chooses the free coefficients: structure (split rules) comes from the backend, and a component measured
separately (one layer's attention, the matrix products) fits its own coefficients. A coefficient that no sample depends
on is an error, not a guess. Error bars are standard errors from the Gauss-Newton covariance at the solution.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy.optimize import OptimizeResult, least_squares, nnls

from cascadeinfer.core.cost.latency import FIELDS, BatchFeatures, StepModel, step_time_s
from cascadeinfer.core.errors import ProfileError

Column = NDArray[np.float64]

BENT: Final = frozenset({"straggler_per_kv_token_s", "dense_knee_tokens"})
"""Coefficients in which the step time is not linear; the linear start leaves them out."""

KNEE_STARTS_TOKENS: Final = (16.0, 48.0, 96.0, 160.0, 256.0, 400.0, 800.0, 1600.0, 3200.0)
"""
Knees of dense models lie between 30 tokens (H20, by arithmetic) and 400, those of mixtures of experts up to a few
thousand.
"""

STRAGGLER_STARTS: Final = (1.0, 0.75, 1.25, 1.6)
"""Starting factors on the caller's straggler coefficient: where it is too small, the maximum hides it."""

REFINED_STARTS: Final = 4
"""Number of starts that are refined: the best of the grid after the linear fit."""

INLIER_RESIDUAL: Final = 0.05
"""Relative residual up to which the loss is quadratic."""

DIFFERENCE: Final = 1e-6
"""Step of the forward differences, in unknowns scaled so that a change of one changes a step by its own length."""

NEGLIGIBLE: Final = 1e-6
"""A contribution below this share of a step counts as none."""

INSEPARABLE: Final = 1e-6
"""
Ratio of singular values below which coefficients occur only together; forward differences are exact to about 1e-9.
"""

SPARE_SAMPLES: Final = 3
"""Samples needed beyond the number of free coefficients."""


@dataclass(frozen=True, slots=True)
class StepSamples:
    """
    Measured steps as columns of one length.

    Attributes:
        n_decode, kv_tokens, kv_tokens_max, prefill_tokens, prefill_attention_tokens: As in `BatchFeatures`.
        step_s: Measured seconds, > 0.

    Raises:
        ProfileError: Columns of different lengths, a non-finite or negative number, a step of no time.
    """

    n_decode: Column
    kv_tokens: Column
    kv_tokens_max: Column
    prefill_tokens: Column
    prefill_attention_tokens: Column
    step_s: Column

    def __post_init__(self) -> None:
        """Refuse what cannot be fitted."""
        for name in self.__slots__:
            column = getattr(self, name)
            if column.shape != self.step_s.shape or column.ndim != 1:
                raise ProfileError(f"samples: {name} has shape {column.shape}, step_s {self.step_s.shape}")
            bad = np.flatnonzero(~np.isfinite(column) | (column < 0.0))
            if len(bad):
                raise ProfileError(f"samples: {name} of sample {bad[0]} is {column[bad[0]]}, not a number >= 0")
        if (self.step_s <= 0.0).any():
            raise ProfileError(f"samples: step_s of sample {int(np.argmin(self.step_s))} is zero")

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.step_s)

    @classmethod
    def of(cls, batches: Iterable[BatchFeatures], step_s: Iterable[float]) -> "StepSamples":
        """Columns from records."""
        rows = [
            (b.n_decode, b.decode_kv_tokens, b.decode_kv_tokens_max, b.prefill_tokens, b.prefill_attention_tokens)
            for b in batches
        ]
        table = np.asarray(rows, dtype=np.float64).reshape(-1, 5)
        columns = table.T.copy()
        measured = np.asarray(list(step_s), dtype=np.float64)
        return cls(columns[0], columns[1], columns[2], columns[3], columns[4], measured)

    def where(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> "StepSamples":
        """Some of the samples, by mask or index."""
        return StepSamples(*(getattr(self, name)[chosen] for name in self.__slots__))


@dataclass(frozen=True, slots=True)
class RegionError:
    """
    Relative error of predictions over a part of the samples.

    Attributes:
        median: Median of the absolute relative error.
        p90: Its 90th percentile.
        bias: Median of the signed error; positive when predictions are too long.
    """

    name: str
    samples: int
    median: float
    p90: float
    bias: float


@dataclass(frozen=True, slots=True)
class FitResult:
    """
    A fitted model.

    Attributes:
        errors: Standard error of each free coefficient, in its unit.
        regions: Residuals on the samples it was fitted to; the first is all of them.
    """

    model: StepModel
    errors: dict[str, float]
    regions: tuple[RegionError, ...]


@njit(cache=True)
def _predict(
    coefficients: Column, n_decode: Column, kv: Column, kv_max: Column, prefill: Column, attention: Column
) -> Column:
    predicted = np.empty(len(n_decode))
    for i in range(len(n_decode)):
        predicted[i] = step_time_s(coefficients, n_decode[i], kv[i], kv_max[i], prefill[i], attention[i])
    return predicted


def predict_s(model: StepModel, samples: StepSamples) -> Column:
    """Predicted step times of the samples' batches, in seconds."""
    return _predict_with(model.coefficients(), samples)


def _predict_with(coefficients: Column, samples: StepSamples) -> Column:
    predicted: Column = _predict(
        coefficients,
        samples.n_decode,
        samples.kv_tokens,
        samples.kv_tokens_max,
        samples.prefill_tokens,
        samples.prefill_attention_tokens,
    )
    return predicted


def _region(name: str, error: Column) -> RegionError:
    absolute = np.abs(error)
    return RegionError(
        name, len(error), float(np.median(absolute)), float(np.quantile(absolute, 0.9)), float(np.median(error))
    )


def residuals(model: StepModel, samples: StepSamples) -> tuple[RegionError, ...]:
    """
    Relative errors on samples (those the model was fitted to, or held-out ones): all, then each region that occurs.

    Raises:
        ProfileError: There are no samples.
    """
    return regions_of(samples, predict_s(model, samples))


def regions_of(samples: StepSamples, predicted_s: Column) -> tuple[RegionError, ...]:
    """
    Like `residuals`, for predictions made in any other way, e.g. each by a model that has not seen the sample.

    Raises:
        ProfileError: There are no samples.
    """
    if not len(samples):
        raise ProfileError("no samples to compare with")
    error = predicted_s / samples.step_s - 1.0
    regions = region_masks(samples)
    return (_region("all", error), *(_region(name, error[mask]) for name, mask in regions.items() if mask.any()))


def region_masks(samples: StepSamples) -> dict[str, NDArray[np.bool_]]:
    """Masks of the samples in each region of batches; every sample is in exactly one."""
    decode, prefill = samples.n_decode > 0, samples.prefill_tokens > 0
    mixed = samples.kv_tokens_max * samples.n_decode > 1.5 * samples.kv_tokens
    return {
        "decode, like lengths": decode & ~prefill & ~mixed,
        "decode, mixed lengths": decode & ~prefill & mixed,
        "prefill": prefill & ~decode,
        "decode with prefill": prefill & decode,
    }


def _cost(coefficients: Column, samples: StepSamples) -> float:
    """The robust loss of all samples (soft L1, as in `_refine`)."""
    residual = _predict_with(coefficients, samples) / samples.step_s - 1.0
    return float(np.sum(np.sqrt(1.0 + (residual / INLIER_RESIDUAL) ** 2) - 1.0))


def _linear_start(start: Column, free: Sequence[int], samples: StepSamples) -> Column:
    """
    Non-negative least squares over the free coefficients in which the model is linear; the non-linear ones keep their
    start.
    """
    guess = start.copy()
    linear = [i for i in free if FIELDS[i] not in BENT]
    guess[linear] = 0.0
    straggler = FIELDS.index("straggler_per_kv_token_s")
    without = guess.copy()
    without[straggler] = 0.0
    rest = _predict_with(without, samples)
    columns = []
    for index in linear:
        unit = without.copy()
        unit[index] = 1.0
        columns.append((_predict_with(unit, samples) - rest) / samples.step_s)
    if columns:
        guess[linear], _ = nnls(np.stack(columns, axis=1), 1.0 - rest / samples.step_s)
    if straggler in free and guess[straggler] == 0.0:
        guess[straggler] = 2.0 * guess[FIELDS.index("per_kv_token_s")]
    return guess


def _refine(start: Column, free: Sequence[int], samples: StepSamples) -> OptimizeResult:
    """Robust relative least squares from a full start; unknowns are scaled to their typical contribution."""
    guess = start.copy()
    scale = np.empty(len(free))
    for position, index in enumerate(free):
        bumped = guess.copy()
        bumped[index] += max(abs(guess[index]), 1e-12)
        effect = np.abs(_predict_with(bumped, samples) - _predict_with(guess, samples)) / samples.step_s
        slope = float(np.max(effect)) / (bumped[index] - guess[index])
        scale[position] = 1.0 / slope if slope > 0.0 else max(abs(guess[index]), 1e-12)

    def residual(unknowns: Column) -> Column:
        coefficients = guess.copy()
        coefficients[list(free)] = unknowns * scale
        return _predict_with(coefficients, samples) / samples.step_s - 1.0

    def slopes(unknowns: Column) -> NDArray[np.float64]:  # (samples, free)
        at = residual(unknowns)
        steps = DIFFERENCE * np.eye(len(unknowns))
        return np.stack([(residual(unknowns + step) - at) / DIFFERENCE for step in steps], axis=1)

    solved = least_squares(
        residual,
        np.maximum(guess[list(free)] / scale, NEGLIGIBLE),
        jac=slopes,
        bounds=(0.0, np.inf),
        loss="soft_l1",
        f_scale=INLIER_RESIDUAL,
    )
    solved.x = np.where(solved.x < NEGLIGIBLE, 0.0, solved.x) * scale
    solved.jac = solved.jac / scale
    return solved


def fit_step_model(samples: StepSamples, *, start: StepModel, free: Sequence[str]) -> FitResult:
    """
    Fit the free coefficients of a step model; the others keep their values from `start`.

    Args:
        samples: Measured steps.
        start: Structure of the model, and the values of the coefficients that are not free.
        free: Names of `StepModel` fields to fit.

    Returns:
        The model, error bars and residuals per region.

    Raises:
        ProfileError: Unknown coefficient, too few samples, or a coefficient that the samples do not determine.
    """
    unknown = sorted(set(free) - set(FIELDS))
    if unknown or not free:
        raise ProfileError(f"cannot fit {unknown or 'nothing'}: coefficients are {', '.join(FIELDS)}")
    if len(samples) < len(free) + SPARE_SAMPLES:
        raise ProfileError(f"{len(samples)} samples for {len(free)} coefficients: need {len(free) + SPARE_SAMPLES}")
    indices = [FIELDS.index(name) for name in dict.fromkeys(free)]
    starts = [_linear_start(begin, indices, samples) for begin in _starts(start, indices)]
    starts.sort(key=lambda begin: _cost(begin, samples))
    solutions = [_refine(begin, indices, samples) for begin in starts[:REFINED_STARTS]]
    found = [solution for solution in solutions if not _undetermined(solution, indices)] or solutions
    best = min(found, key=lambda solution: float(solution.cost))
    if problem := _undetermined(best, indices):
        raise ProfileError(f"{problem}: measure more kinds of batch, or hold it fixed")
    model = replace(start, **{FIELDS[i]: float(value) for i, value in zip(indices, best.x, strict=True)})
    norms = np.linalg.norm(best.jac, axis=0)
    variance = 2.0 * float(best.cost) / (len(samples) - len(indices))
    covariance = np.linalg.inv((best.jac / norms).T @ (best.jac / norms)) * variance
    deviation = np.sqrt(np.diag(covariance)) / norms
    errors = {FIELDS[i]: float(value) for i, value in zip(indices, deviation, strict=True)}
    return FitResult(model, errors, residuals(model, samples))


def _starts(start: StepModel, indices: Sequence[int]) -> list[Column]:
    """Where to start from: a grid over those free coefficients that have several optima."""
    knee, straggler = FIELDS.index("dense_knee_tokens"), FIELDS.index("straggler_per_kv_token_s")
    starts = []
    for tokens in KNEE_STARTS_TOKENS if knee in indices else (start.dense_knee_tokens,):
        for factor in STRAGGLER_STARTS if straggler in indices else (1.0,):
            begin = start.coefficients()
            begin[knee] = tokens
            begin[straggler] *= factor
            starts.append(begin)
    return starts


def _undetermined(solution: OptimizeResult, indices: Sequence[int]) -> str:
    """Why a solution is undetermined: some coefficients affect no sample, or occur only together; else empty."""
    norms = np.linalg.norm(solution.jac, axis=0)
    silent = [FIELDS[i] for i, norm in zip(indices, norms, strict=True) if norm == 0.0]
    if silent:
        return f"the samples do not determine {', '.join(silent)}"
    strengths = np.linalg.svd(solution.jac / norms, compute_uv=False)
    if strengths[-1] < INSEPARABLE * strengths[0]:
        return f"the samples do not separate the coefficients {', '.join(FIELDS[i] for i in indices)}"
    return ""

"""
Step times learnt while serving: a cost model that follows the engine it runs on.

The time of a step has five parts (`PARTS`): the empty step, its decoding requests, their attention, the dense layers of
prompts, and the prompts' attention. A start model, from a profile, says how each part depends on the batch. One factor
per part is learnt, so that a device that is slower, shared or configured differently is followed without measuring a
grid. Without a start model the parts are linear in the batch and the factors are the coefficients.

Factors are non-negative least squares of the *relative* residual, as in `fit.py`, over sums that fade with time; a step
ten times as long as any other (compilation, a disturbance) then hardly counts. Where steps of the same batch differ,
such a fit lies below their mean (by twice the square of their coefficient of variation), but load is a sum of step
times. One more factor for all parts therefore makes predicted and measured time equal in total, outliers aside. A start
model counts like `LearningSettings.prior_steps` steps that agree with it: parts that no step exercises keep their
values, and no factor leaves its bounds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp
from typing import Final

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy.optimize import lsq_linear

from cascadeinfer.core.cost.fit import StepSamples, predict_s
from cascadeinfer.core.cost.latency import StepModel, decode_attention_s, dense_layers_s
from cascadeinfer.core.cost.samples import StepSample

PARTS: Final = ("step", "decodes", "decode attention", "prompts", "prompt attention")
_UNIT: Final = StepModel(
    base_s=1.0, per_decode_s=1.0, per_kv_token_s=1.0, per_prefill_token_s=1.0, per_prefill_attention_s=1.0
)
"""What the factors multiply when nothing is known."""
MOST_WAITING: Final = 8192
"""Steps kept between two updates; more add no information."""
LEAST_SHARE: Final = 1e-3
"""A part that makes up less of a step than this is not learnt; it keeps its start value."""
OUTLIER_FACTOR: Final = 3.0
"""Steps longer than fitted by this factor do not count in the total."""
PROMPT_STEPS: Final = 10.0
"""Steps with prompt tokens, and steps without, that must have been seen before a model without a start is trusted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningSettings:
    """
    How a model follows its engine.

    Attributes:
        interval_s: Time between two updates.
        memory_s: Time constant with which steps fade.
        prior_steps: Number of steps that the start model counts for.
        most_change: Upper bound of every factor; its reciprocal is the lower bound.
        tolerance: A new model is adopted when its predictions for the recent steps differ by this much (mean relative
            difference).
        min_steps: Fewest steps to learn a model without a start from.
        most_error: Largest mean relative error at which such a model is adopted.
    """

    interval_s: float = 10.0
    memory_s: float = 600.0
    prior_steps: float = 50.0
    most_change: float = 5.0
    tolerance: float = 0.02
    min_steps: int = 300
    most_error: float = 0.3


class StepLearner:
    """
    Learns from the steps of identical instances.

    Attributes:
        model: The model to use now; None while too little has been seen without a start.
        error: Mean relative error of `model` (or, before there is one, of the candidate) on the steps of the last
            update; NaN before the first.
    """

    def __init__(self, start: StepModel | None, settings: LearningSettings | None = None) -> None:
        """
        Args:
            start: Model from a profile; None to learn from nothing.
            settings: How to learn.
        """
        self.model = start
        self.error = float("nan")
        self._settings = settings or LearningSettings()
        self._reference = start or _UNIT
        self._candidate: StepModel | None = None
        self._gram = np.zeros((len(PARTS), len(PARTS)))
        self._aim = np.zeros(len(PARTS))
        self._measured_s = 0.0
        self._modelled_s = np.zeros(len(PARTS))
        self._factors = np.ones(len(PARTS))
        self._steps = 0.0
        self._prompt_steps = 0.0
        self._waiting: list[StepSample] = []
        self._next_s: float | None = None
        self._updated_s = 0.0

    def observe(self, steps: Sequence[StepSample]) -> None:
        """Record steps; the next update learns from them."""
        if len(self._waiting) < MOST_WAITING:
            self._waiting.extend(steps)

    def is_due(self, now_s: float) -> bool:
        """Whether `update` should be called; first true one interval after the first call."""
        if self._next_s is None:
            self._next_s = now_s + self._settings.interval_s
            self._updated_s = now_s
        return now_s >= self._next_s

    def update(self, now_s: float) -> bool:
        """
        Learn from what was recorded.

        Returns:
            Whether `model` has changed.
        """
        settings = self._settings
        self._next_s = now_s + settings.interval_s
        steps = [step for step in self._waiting if step.step_s > 0.0]
        self._waiting.clear()
        if not steps:
            return False
        samples = StepSamples.of([step.batch for step in steps], [step.step_s for step in steps])
        judged = self.model or self._candidate
        if judged is not None:
            self.error = _mean_error(judged, samples)
        self._take_in(samples, exp(-max(0.0, now_s - self._updated_s) / settings.memory_s))
        self._updated_s = now_s
        found = _scaled(self._reference, self._factors)
        if self.model is None:
            trusted = self._candidate is not None and self._seen_enough() and self.error <= settings.most_error
            self._candidate = found
            self.model = found if trusted else None
            return trusted
        if _difference(self.model, found, samples) < settings.tolerance:
            return False
        self.model = found
        return True

    @property
    def _is_start_known(self) -> bool:
        return self._reference is not _UNIT

    def _seen_enough(self) -> bool:
        plain = self._steps - self._prompt_steps
        return self._steps >= self._settings.min_steps and min(self._prompt_steps, plain) >= PROMPT_STEPS

    def _take_in(self, samples: StepSamples, fade: float) -> None:
        """Add steps to the fading sums and solve for the factors again."""
        parts_s = _parts(
            self._reference.coefficients(),
            samples.n_decode,
            samples.kv_tokens,
            samples.kv_tokens_max,
            samples.prefill_tokens,
            samples.prefill_attention_tokens,
        )
        shares = parts_s / samples.step_s[:, None]
        self._gram = fade * self._gram + shares.T @ shares
        self._aim = fade * self._aim + shares.sum(axis=0)
        self._steps = fade * self._steps + len(samples)
        self._prompt_steps = fade * self._prompt_steps + float(np.count_nonzero(samples.prefill_tokens))
        factors = self._solve()
        usual = samples.step_s <= OUTLIER_FACTOR * (parts_s @ factors)
        self._measured_s = fade * self._measured_s + float(samples.step_s[usual].sum())
        self._modelled_s = fade * self._modelled_s + parts_s[usual].sum(axis=0)
        correction = self._correction(float(self._modelled_s @ factors))
        is_shown = self._shown() >= LEAST_SHARE**2
        self._factors = self._within_bounds(np.where(is_shown, correction * factors, factors))

    def _shown(self) -> NDArray[np.float64]:
        """Mean square of each part's share of a step."""
        shares: NDArray[np.float64] = np.diag(self._gram) / self._steps
        return shares

    def _correction(self, modelled_s: float) -> float:
        """Measured over modelled time; here too a start model counts like steps that agree with it."""
        if modelled_s <= 0.0:
            return 1.0
        agreeing_s = self._settings.prior_steps * modelled_s / self._steps if self._is_start_known else 0.0
        return (self._measured_s + agreeing_s) / (modelled_s + agreeing_s)

    def _within_bounds(self, factors: NDArray[np.float64]) -> NDArray[np.float64]:
        most = self._settings.most_change
        return np.clip(factors, 1.0 / most, most) if self._is_start_known else factors

    def _solve(self) -> NDArray[np.float64]:
        """The factors that fit best within their bounds."""
        known = self._is_start_known
        weight = (
            self._settings.prior_steps * np.maximum(self._shown(), LEAST_SHARE**2)
            if known
            else 1e-9 * np.diag(self._gram)
        )
        gram = self._gram + np.diag(np.maximum(weight, 1e-300))
        aim = self._aim + (weight if known else 0.0)
        scale = np.sqrt(np.diag(gram))
        root = np.linalg.cholesky(gram / np.outer(scale, scale) + 1e-12 * np.eye(len(PARTS)))
        most = self._settings.most_change
        bounds = (scale / most, scale * most) if known else (0.0, np.inf)
        factors: NDArray[np.float64] = lsq_linear(root.T, np.linalg.solve(root, aim / scale), bounds=bounds).x / scale
        return factors


@njit(cache=True)
def _parts(
    coefficients: NDArray[np.float64],
    n_decode: NDArray[np.float64],
    kv: NDArray[np.float64],
    kv_max: NDArray[np.float64],
    prefill: NDArray[np.float64],
    attention: NDArray[np.float64],
) -> NDArray[np.float64]:  # (samples, 5)
    """Time of each part of each step by a model, in seconds; the parts add up to `step_time_s`."""
    parts = np.empty((len(n_decode), 5))
    for i in range(len(n_decode)):
        parts[i, 0] = coefficients[0]
        parts[i, 1] = coefficients[1] * n_decode[i]
        if n_decode[i] > 0.0:
            parts[i, 2] = decode_attention_s(coefficients, n_decode[i], kv[i], kv_max[i], prefill[i], attention[i])
        else:
            parts[i, 2] = 0.0
        parts[i, 3] = dense_layers_s(coefficients, n_decode[i] + prefill[i]) + coefficients[3] * prefill[i]
        parts[i, 4] = coefficients[4] * attention[i]
    return parts


def _scaled(reference: StepModel, factors: NDArray[np.float64]) -> StepModel:
    step, decodes, attention, prompts, prompt_attention = (float(factor) for factor in factors)
    return replace(
        reference,
        base_s=reference.base_s * step,
        per_decode_s=reference.per_decode_s * decodes,
        per_kv_token_s=reference.per_kv_token_s * attention,
        straggler_per_kv_token_s=reference.straggler_per_kv_token_s * attention,
        split_s=reference.split_s * attention,
        per_prefill_token_s=reference.per_prefill_token_s * prompts,
        per_dense_token_s=reference.per_dense_token_s * prompts,
        experts_s=reference.experts_s * prompts,
        per_prefill_attention_s=reference.per_prefill_attention_s * prompt_attention,
    )


def _mean_error(model: StepModel, samples: StepSamples) -> float:
    """Mean relative error, each at most 1."""
    return float(np.minimum(np.abs(predict_s(model, samples) / samples.step_s - 1.0), 1.0).mean())


def _difference(model: StepModel, other: StepModel, samples: StepSamples) -> float:
    """Mean relative difference of the two models' predictions for these batches."""
    return float(np.abs(predict_s(other, samples) / predict_s(model, samples) - 1.0).mean())

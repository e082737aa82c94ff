"""Fitting recovers the model behind the samples, despite noise and outliers, and refuses what it cannot know."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascadeinfer.core.cost.fit import FitResult, StepSamples, fit_step_model, predict_s, residuals
from cascadeinfer.core.cost.latency import FIELDS, BatchFeatures, StepModel
from cascadeinfer.core.errors import ProfileError

TRUTH = StepModel(
    base_s=6e-3,
    per_decode_s=2e-5,
    per_kv_token_s=4e-8,
    per_prefill_token_s=2e-6,
    per_prefill_attention_s=2e-10,
    straggler_per_kv_token_s=5e-7,
    dense_knee_tokens=300.0,
    per_dense_token_s=2e-5,
)
FREE = [
    "base_s",
    "per_decode_s",
    "per_kv_token_s",
    "per_prefill_token_s",
    "per_prefill_attention_s",
    "straggler_per_kv_token_s",
    "dense_knee_tokens",
    "per_dense_token_s",
]
START = StepModel(
    base_s=0.0,
    per_decode_s=0.0,
    per_kv_token_s=0.0,
    per_prefill_token_s=0.0,
    per_prefill_attention_s=0.0,
    straggler_per_kv_token_s=4e-7,
)


def batches(seed: int = 0, count: int = 240) -> list[BatchFeatures]:
    """Decode batches of like and mixed lengths, prompts, and both, on a random grid."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        n = int(rng.choice([0, 1, 4, 16, 64, 200])) if i % 3 else 0
        mean = int(rng.choice([200, 1_000, 4_000]))
        longest = min(mean * n, int(mean * rng.choice([1, 1, 8, 40]))) if n else 0
        prefill = int(rng.choice([64, 256, 700, 2_048])) if n == 0 or i % 4 == 0 else 0
        found.append(BatchFeatures(n, mean * n, longest, prefill, prefill * (prefill + 1) / 2 + 3_000 * prefill))
    return found


def measured(model: StepModel, *, noise: float, seed: int = 1) -> StepSamples:
    """Step times of the grid with relative noise."""
    rng = np.random.default_rng(seed)
    grid = batches()
    return StepSamples.of(grid, [model.step_s(b) * (1 + noise * rng.standard_normal()) for b in grid])


def fitted(samples: StepSamples) -> FitResult:
    """The fit with every coefficient of TRUTH free."""
    return fit_step_model(samples, start=START, free=FREE)


def test_exact_samples_give_the_model_back() -> None:
    """Without noise each coefficient is recovered to a thousandth, and the residuals vanish."""
    found = fitted(measured(TRUTH, noise=0.0))
    for name in FREE:
        assert getattr(found.model, name) == pytest.approx(getattr(TRUTH, name), rel=1e-3), name
    assert found.regions[0].p90 < 1e-3


def test_noise_is_within_the_error_bars() -> None:
    """With 3 % noise, coefficients lie within four standard errors of the truth, and the residual is the noise's."""
    found = fitted(measured(TRUTH, noise=0.03))
    for name in FREE:
        assert abs(getattr(found.model, name) - getattr(TRUTH, name)) < 4 * found.errors[name], name
    assert found.regions[0].median == pytest.approx(0.67 * 0.03, rel=0.3)
    assert found.errors["base_s"] < 0.02 * TRUTH.base_s


def test_outliers_do_not_bend_the_fit() -> None:
    """One step in ten measured three times too long moves the coefficients by a few percent only."""
    samples = measured(TRUTH, noise=0.01)
    disturbed = samples.step_s.copy()
    disturbed[::10] *= 3.0
    found = fitted(replace(samples, step_s=disturbed))
    for name in ("base_s", "per_kv_token_s", "per_dense_token_s", "straggler_per_kv_token_s"):
        assert getattr(found.model, name) == pytest.approx(getattr(TRUTH, name), rel=0.1), name


def test_held_out_steps_are_predicted() -> None:
    """A model fitted to four fifths of the samples predicts the rest; the two sets are disjoint and complete."""
    samples = measured(TRUTH, noise=0.02)
    held = np.random.default_rng(3).permutation(len(samples)) < len(samples) // 5
    train, test = samples.where(~held), samples.where(held)
    assert len(train) + len(test) == len(samples)
    assert sorted([*train.step_s, *test.step_s]) == sorted(samples.step_s)
    assert residuals(fitted(train).model, test)[0].median < 0.03


def test_regions_are_told_apart() -> None:
    """The residual report separates like from mixed decode batches, prompts, and both together."""
    regions = {r.name: r for r in residuals(TRUTH, measured(TRUTH, noise=0.0))}
    assert set(regions) == {"all", "decode, like lengths", "decode, mixed lengths", "prefill", "decode with prefill"}
    assert sum(r.samples for name, r in regions.items() if name != "all") == regions["all"].samples
    blind = residuals(replace(TRUTH, straggler_per_kv_token_s=0.0), measured(TRUTH, noise=0.0))
    by_name = {r.name: r for r in blind}
    assert by_name["decode, mixed lengths"].bias < -0.05
    assert by_name["prefill"].median < 1e-9


def test_fixed_coefficients_stay() -> None:
    """A coefficient that is not free keeps its initial value."""
    fixed = replace(START, per_prefill_token_s=9e-6, split_slots=5.0, dense_knee_tokens=300.0, per_dense_token_s=2e-5)
    free = [n for n in FREE if n not in {"per_prefill_token_s", "dense_knee_tokens", "per_dense_token_s"}]
    found = fit_step_model(measured(TRUTH, noise=0.0), start=fixed, free=free)
    assert found.model.per_prefill_token_s == 9e-6
    assert found.model.split_slots == 5.0
    assert set(found.errors) == set(free)


@settings(max_examples=15)
@given(st.floats(1e-3, 5e-2), st.floats(0, 1e-4), st.floats(1e-9, 1e-7), st.floats(1e-6, 1e-4), st.floats(1e-11, 1e-8))
def test_any_linear_model_is_recovered(base: float, decode: float, kv: float, token: float, pair: float) -> None:
    """Five linear coefficients of any size predict their own samples after the fit, and none becomes negative."""
    truth = StepModel(
        base_s=base,
        per_decode_s=decode,
        per_kv_token_s=kv,
        per_prefill_token_s=token,
        per_prefill_attention_s=pair,
    )
    samples = measured(truth, noise=0.0)
    found = fit_step_model(samples, start=replace(START, straggler_per_kv_token_s=0.0), free=FREE[:5])
    assert np.abs(predict_s(found.model, samples) / samples.step_s - 1).max() < 1e-3
    assert (found.model.coefficients() >= 0).all()


def test_noise_never_makes_a_coefficient_negative() -> None:
    """A coefficient whose true value is zero stays at zero or above under noise."""
    found = fitted(measured(replace(TRUTH, per_decode_s=0.0, per_prefill_token_s=0.0), noise=0.1))
    assert (found.model.coefficients() >= 0).all()


def test_undetermined_coefficients_are_refused() -> None:
    """Decode-only samples do not determine the cost of a prompt token, nor equal lengths that of a straggler."""
    samples = measured(TRUTH, noise=0.0)
    decode = samples.where(samples.prefill_tokens == 0)
    with pytest.raises(ProfileError, match="do not determine per_prefill_token_s"):
        fit_step_model(decode, start=START, free=["base_s", "per_kv_token_s", "per_prefill_token_s"])
    same = StepSamples.of(
        [BatchFeatures(n, 500 * n, 500) for n in range(1, 30)], [5e-3 + 1e-5 * n for n in range(1, 30)]
    )
    with pytest.raises(ProfileError, match="do not separate"):
        fit_step_model(
            same,
            start=replace(START, straggler_per_kv_token_s=0.0),
            free=["base_s", "per_decode_s", "per_kv_token_s"],
        )


def test_too_few_samples_are_refused() -> None:
    """Eight coefficients need eleven samples."""
    with pytest.raises(ProfileError, match="10 samples for 8 coefficients: need 11"):
        fitted(measured(TRUTH, noise=0.0).where(np.arange(10)))
    with pytest.raises(ProfileError, match="no samples"):
        residuals(TRUTH, StepSamples.of([], []))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, 0.0])
def test_impossible_times_are_refused(bad: float) -> None:
    """A step time that is not a positive number is an error that names the sample."""
    with pytest.raises(ProfileError, match="step_s of sample 1 is"):
        StepSamples.of([BatchFeatures(1, 10, 10)] * 3, [1e-3, bad, 1e-3])


def test_impossible_features_are_refused() -> None:
    """A feature that is not finite, and columns of different lengths, are errors."""
    with pytest.raises(ProfileError, match="prefill_attention_tokens of sample 0 is nan"):
        StepSamples.of([BatchFeatures(1, 10, 10, 5, float("nan"))], [1e-3])
    column = np.ones(3)
    with pytest.raises(ProfileError, match="kv_tokens has shape"):
        StepSamples(column, np.ones(2), column, column, column, column)


def test_unknown_coefficients_are_refused() -> None:
    """A misspelt name is an error that lists the right ones."""
    with pytest.raises(ProfileError, match=r"'per_token'.*base_s"):
        fit_step_model(measured(TRUTH, noise=0.0), start=START, free=["per_token"])
    assert len(FIELDS) == len(TRUTH.coefficients())

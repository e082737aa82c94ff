"""Learning step times: it finds the truth, keeps the start where nothing is seen, and hardly counts disturbances."""

import math
from dataclasses import replace

import numpy as np
import pytest

from cascadeinfer.config.profiles import load_profile
from cascadeinfer.core.cost.latency import BatchFeatures, StepModel
from cascadeinfer.core.cost.learning import LearningSettings, StepLearner
from cascadeinfer.core.cost.samples import StepSample

TRUTH = StepModel(
    base_s=0.006, per_decode_s=3e-5, per_kv_token_s=7e-8, per_prefill_token_s=4e-5, per_prefill_attention_s=2e-10
)
SETTINGS = LearningSettings()


def batches(rng: np.random.Generator, n: int, *, prompts: bool = True) -> list[BatchFeatures]:
    """Steps as seen in serving: mostly decodes of several lengths, now and then with a prompt."""
    found = []
    for _ in range(n):
        n_decode = int(rng.integers(1, 64))
        lengths = rng.integers(100, 4000, n_decode)
        prefill = int(rng.integers(50, 2000)) if prompts and rng.random() < 0.2 else 0
        found.append(
            BatchFeatures(
                n_decode,
                int(lengths.sum()),
                int(lengths.max()),
                prefill,
                prefill * (prefill + 1) / 2 if prefill else 0.0,
            )
        )
    return found


def steps(
    model: StepModel, rng: np.random.Generator, n: int, *, noise: float = 0.05, prompts: bool = True
) -> list[StepSample]:
    """Steps that take as long as a model says, plus some noise."""
    return [
        StepSample(batch, model.step_s(batch) * float(rng.lognormal(0.0, noise)))
        for batch in batches(rng, n, prompts=prompts)
    ]


def worst_error(model: StepModel | None, truth: StepModel, rng: np.random.Generator) -> float:
    """The largest error of predictions for new batches."""
    assert model is not None
    return max(abs(model.step_s(batch) / truth.step_s(batch) - 1.0) for batch in batches(rng, 300))


def test_a_model_is_learnt_from_nothing() -> None:
    """After enough steps and a second, confirming look, new batches are predicted within 5 %, but never before."""
    rng = np.random.default_rng(0)
    learner = StepLearner(None)
    assert not learner.is_due(0.0)
    learner.observe(steps(TRUTH, rng, 200))
    assert learner.is_due(10.0)
    assert not learner.update(10.0)
    assert learner.model is None
    learner.observe(steps(TRUTH, rng, 200))
    assert learner.update(20.0)
    assert learner.error < 0.1
    assert worst_error(learner.model, TRUTH, rng) < 0.05


def test_decodes_alone_are_not_enough() -> None:
    """Without prompts among the steps, the cost of a prompt is unknown, and there is no model to plan with."""
    rng = np.random.default_rng(1)
    learner = StepLearner(None)
    for interval in range(1, 6):
        learner.observe(steps(TRUTH, rng, 500, prompts=False))
        assert not learner.update(10.0 * interval)
    assert learner.model is None


def test_steps_that_no_model_explains_are_not_trusted() -> None:
    """Step times that have nothing to do with the batches leave the learner without a model."""
    rng = np.random.default_rng(2)
    learner = StepLearner(None)
    for interval in range(1, 6):
        learner.observe(steps(TRUTH, rng, 500, noise=2.0))
        learner.update(10.0 * interval)
    assert learner.model is None
    assert learner.error > SETTINGS.most_error


@pytest.mark.parametrize("name", ["h100-llama-3.1-8b", "l40s-llama-3.1-8b", "h100-qwen3-30b-a3b"])
def test_a_profile_follows_an_engine_that_is_slower_in_parts(name: str) -> None:
    """Attention twice as slow, the rest 1.3 times: two minutes of steps take predictions from over 20 % off to 8 %."""
    rng = np.random.default_rng(3)
    start = load_profile(name).step_model
    truth = replace(
        start,
        base_s=1.3 * start.base_s,
        per_decode_s=1.3 * start.per_decode_s,
        per_kv_token_s=2.0 * start.per_kv_token_s,
        straggler_per_kv_token_s=2.0 * start.straggler_per_kv_token_s,
        split_s=2.0 * start.split_s,
        per_prefill_token_s=1.3 * start.per_prefill_token_s,
        per_dense_token_s=1.3 * start.per_dense_token_s,
        experts_s=1.3 * start.experts_s,
    )
    learner = StepLearner(start)
    assert worst_error(learner.model, truth, np.random.default_rng(9)) > 0.2
    changes = 0
    for interval in range(1, 13):
        learner.observe(steps(truth, rng, 400))
        changes += learner.update(10.0 * interval)
    assert changes >= 1
    assert worst_error(learner.model, truth, np.random.default_rng(9)) < 0.08


def test_an_engine_as_the_profile_says_changes_nothing() -> None:
    """Steps that agree with the start, apart from noise, give no new model, so that planning is not disturbed."""
    rng = np.random.default_rng(4)
    start = load_profile("h100-llama-3.1-8b").step_model
    learner = StepLearner(start)
    for interval in range(1, 20):
        learner.observe(steps(start, rng, 300))
        assert not learner.update(10.0 * interval)
    assert learner.model is start


def test_parts_that_no_step_shows_stay_as_they_were() -> None:
    """If there are only decodes, the profile's costs of prompts remain."""
    rng = np.random.default_rng(5)
    truth = replace(TRUTH, base_s=2 * TRUTH.base_s)
    learner = StepLearner(TRUTH)
    for interval in range(1, 6):
        learner.observe(steps(truth, rng, 500, prompts=False))
        learner.update(10.0 * interval)
    assert learner.model is not None
    assert learner.model.base_s == pytest.approx(truth.base_s, rel=0.05)
    assert learner.model.per_prefill_token_s == pytest.approx(TRUTH.per_prefill_token_s, rel=1e-3)
    assert learner.model.per_prefill_attention_s == pytest.approx(TRUTH.per_prefill_attention_s, rel=1e-3)


def test_disturbed_steps_hardly_count() -> None:
    """One step in fifty that takes fifty times as long moves no prediction by more than 6 %."""
    rng = np.random.default_rng(6)
    learner = StepLearner(TRUTH)
    for interval in range(1, 10):
        seen = steps(TRUTH, rng, 500)
        seen[::50] = [StepSample(step.batch, 50.0 * step.step_s) for step in seen[::50]]
        learner.observe(seen)
        learner.update(10.0 * interval)
    assert worst_error(learner.model, TRUTH, rng) < 0.06


@pytest.mark.parametrize("start", [None, TRUTH])
def test_total_time_is_right_when_like_steps_differ(start: StepModel | None) -> None:
    """Step times vary by 30 %: predictions add up to the measured total; a fit of relative errors is a sixth low."""
    rng = np.random.default_rng(8)
    learner = StepLearner(start)
    for interval in range(1, 6):
        learner.observe(steps(TRUTH, rng, 2000, noise=0.3))
        learner.update(10.0 * interval)
    assert learner.model is not None
    seen = steps(TRUTH, rng, 20_000, noise=0.3)
    predicted_s = sum(learner.model.step_s(step.batch) for step in seen)
    assert predicted_s == pytest.approx(sum(step.step_s for step in seen), rel=0.03)


def test_no_factor_leaves_its_bounds() -> None:
    """An engine a hundred times as slow as its profile is believed up to the bound."""
    rng = np.random.default_rng(7)
    slow = StepModel(
        **{
            name: 100.0 * getattr(TRUTH, name)
            for name in ("base_s", "per_decode_s", "per_kv_token_s", "per_prefill_token_s", "per_prefill_attention_s")
        }
    )
    learner = StepLearner(TRUTH)
    for interval in range(1, 10):
        learner.observe(steps(slow, rng, 500))
        learner.update(10.0 * interval)
    assert learner.model is not None
    assert learner.model.base_s <= SETTINGS.most_change * TRUTH.base_s * (1 + 1e-9)


def test_nothing_seen_is_nothing_learnt() -> None:
    """An idle interval, or steps that take no time, change nothing and raise nothing."""
    learner = StepLearner(TRUTH)
    assert not learner.update(10.0)
    learner.observe([StepSample(BatchFeatures(1, 10, 10), 0.0)])
    assert not learner.update(20.0)
    assert learner.model is TRUTH
    assert math.isnan(learner.error)


def test_what_waits_is_bounded() -> None:
    """A learner that is never updated keeps a bounded number of steps."""
    learner = StepLearner(TRUTH)
    step = StepSample(BatchFeatures(1, 10, 10), 0.01)
    for _ in range(200):
        learner.observe([step] * 100)
    assert len(learner._waiting) < 10_000

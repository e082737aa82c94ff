"""Step models by kind: who is priced by which, what is learnt from whom, what a plan is made with."""

from dataclasses import replace

import numpy as np
import pytest

from cascadeinfer.core.adapt.step_models import StepModels
from cascadeinfer.core.cost.latency import BatchFeatures, StepModel
from cascadeinfer.core.cost.learning import LearningSettings
from cascadeinfer.core.cost.samples import StepSample
from cascadeinfer.core.errors import PlanError
from cascadeinfer.core.kind import InstanceKind
from cascadeinfer.core.types import InstanceCapacity

FAST = StepModel(
    base_s=0.007, per_decode_s=2e-5, per_kv_token_s=4e-8, per_prefill_token_s=2e-5, per_prefill_attention_s=1e-10
)
SLOW = StepModel(
    base_s=0.028, per_decode_s=8e-5, per_kv_token_s=16e-8, per_prefill_token_s=8e-5, per_prefill_attention_s=4e-10
)
LARGE = InstanceCapacity(kv_blocks=4096, block_size_tokens=16, max_num_seqs=64, max_batched_tokens=2048)
HALF = replace(LARGE, kv_blocks=2048, max_num_seqs=128)
ONE, OTHER = InstanceKind(LARGE), InstanceKind(HALF, "slow")


def steps_of(model: StepModel, n: int, seed: int = 0) -> tuple[StepSample, ...]:
    """Steps that take what the model says."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(n):
        lengths = rng.integers(50, 3000, int(rng.integers(1, 30)))
        prefill = int(rng.integers(20, 500)) if number % 4 == 0 else 0
        batch = BatchFeatures(
            len(lengths), int(lengths.sum()), int(lengths.max()), prefill, prefill * (prefill + 1) / 2
        )
        found.append(StepSample(batch, model.step_s(batch)))
    return tuple(found)


def test_each_key_has_its_own_model() -> None:
    """The default model prices instances of which nothing is said, a named one those of its key."""
    models = StepModels(FAST, {"slow": SLOW})
    models.follow([ONE, OTHER])
    assert models.pricing("") is FAST
    assert models.pricing("slow") is SLOW


def test_prices_are_in_one_unit() -> None:
    """While an instance that is there has no model nobody is priced by one, and never by another key's."""
    models = StepModels(FAST)
    assert not models.follow([ONE])
    assert models.pricing("") is FAST
    assert models.follow([ONE, OTHER])
    assert (models.pricing(""), models.pricing("slow")) == (None, None)
    assert models.of("") is FAST
    assert models.follow([ONE])
    assert models.pricing("") is FAST


def test_each_key_learns_from_its_own_instances() -> None:
    """Two kinds that report steps of their own get two models; before both are known, none is used for prices."""
    models = StepModels(learning=LearningSettings(interval_s=1.0))
    models.follow([ONE, OTHER])
    assert not models.is_due(0.0)
    models.observe("", steps_of(FAST, 400))
    assert models.is_due(1.0)
    assert not models.update(1.0)
    models.observe("", steps_of(FAST, 400, 1))
    assert models.update(2.0)
    assert models.of("") is not None
    assert models.pricing("") is None
    models.observe("slow", steps_of(SLOW, 400, 2))
    models.update(3.0)
    models.observe("slow", steps_of(SLOW, 400, 3))
    assert models.update(4.0)
    for key, truth in (("", FAST), ("slow", SLOW)):
        learnt = models.pricing(key)
        assert learnt is not None
        assert learnt.base_s == pytest.approx(truth.base_s, rel=0.05)
        assert learnt.per_kv_token_s == pytest.approx(truth.per_kv_token_s, rel=0.05)


def test_a_plan_is_made_with_the_weakest() -> None:
    """The slowest model and the smallest of each capacity, wherever they come from; with one kind exactly that one."""
    models = StepModels(FAST, {"slow": SLOW})
    for kinds in ((ONE, OTHER), (OTHER, ONE)):
        assert models.weakest(kinds) == (SLOW, replace(HALF, max_num_seqs=64))
    assert models.weakest((ONE, ONE)) == (FAST, LARGE)


def test_no_plan_with_a_kind_that_has_no_model() -> None:
    """A kind that will never have a model is named as the plan's failure; without any model, there is no plan yet."""
    with pytest.raises(PlanError, match="no step model for the instances of 'slow'"):
        StepModels(FAST).weakest((ONE, OTHER))
    assert StepModels(FAST, learning=LearningSettings()).weakest((ONE, OTHER))[0] is None
    assert StepModels().weakest((ONE, OTHER))[0] is None

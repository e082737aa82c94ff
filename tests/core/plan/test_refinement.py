"""Local improvement of partitions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascadeinfer.core.cost.histogram import LengthHistogram
from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.plan.problem import PlanProblem
from cascadeinfer.core.plan.refinement import improve
from cascadeinfer.core.types import InstanceCapacity

MODEL = StepModel(
    base_s=0.007,
    per_decode_s=1.2e-5,
    per_kv_token_s=4e-8,
    per_prefill_token_s=2e-5,
    per_prefill_attention_s=7e-10,
)
CAPACITY = InstanceCapacity(kv_blocks=25_000, block_size_tokens=16, max_num_seqs=512, max_batched_tokens=8192)
RNG = np.random.default_rng(3)
HISTOGRAM = LengthHistogram.from_requests(
    np.minimum(RNG.lognormal(6.0, 1.4, 3000).astype(int) + 1, 30_000), RNG.geometric(1 / 250, 3000)
)
PROBLEM = PlanProblem(HISTOGRAM, MODEL, CAPACITY, 90.0, 16)


def cost_of(bounds: np.ndarray, instances: np.ndarray) -> float:
    """Sum of the stages' costs."""
    return sum(PROBLEM.service(bounds[s], bounds[s + 1], instances[s]).cost for s in range(len(instances)))


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), n_stages=st.integers(1, 5), shift=st.sampled_from([1, 4]))
def test_a_partition_is_only_improved(seed: int, n_stages: int, shift: int) -> None:
    """From any partition, the result has the same instances, the stated cost, and a cost no higher than before."""
    rng = np.random.default_rng(seed)
    last = len(PROBLEM.edges) - 1
    inner = np.sort(rng.choice(np.arange(60, 240), n_stages - 1, replace=False))
    bounds = np.concatenate(([0], inner, [last])).astype(np.int64)
    cuts = np.sort(rng.choice(np.arange(1, 16), n_stages - 1, replace=False))
    instances = np.diff(np.concatenate(([0], cuts, [16]))).astype(np.int64)
    before = cost_of(bounds, instances)
    cost = improve(PROBLEM.inputs, bounds, instances, 8, shift)
    assert cost <= before * (1.0 + 1e-9)
    assert instances.sum() == 16
    assert instances.min() >= 1
    assert (bounds[0], bounds[-1]) == (0, last)
    assert np.all(np.diff(bounds) > 0)
    assert cost == pytest.approx(cost_of(bounds, instances))


def test_an_infeasible_partition_is_made_feasible() -> None:
    """One instance for nearly all requests carries nothing; instances move to where they are needed."""
    last = len(PROBLEM.edges) - 1
    middle = HISTOGRAM.nearest_edge(64)
    bounds = np.array([0, middle, last], dtype=np.int64)
    instances = np.array([15, 1], dtype=np.int64)
    assert not np.isfinite(cost_of(bounds, instances))
    cost = improve(PROBLEM.inputs, bounds, instances, 8, 1)
    assert np.isfinite(cost)

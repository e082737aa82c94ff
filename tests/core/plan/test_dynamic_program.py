"""The dynamic program against exhaustive search."""

from collections.abc import Iterator
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascadeinfer.core.cost.histogram import LengthHistogram
from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.plan import dynamic_program, planner
from cascadeinfer.core.plan.dynamic_program import best_partitions, stage_costs
from cascadeinfer.core.plan.objective import (
    BalancedLatency,
    MeanNormalizedLatency,
    Objective,
    SloAttainment,
    WeightedLatency,
)
from cascadeinfer.core.plan.problem import PlanProblem
from cascadeinfer.core.types import InstanceCapacity

CAPACITY = InstanceCapacity(kv_blocks=20_000, block_size_tokens=16, max_num_seqs=256, max_batched_tokens=4096)


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write `total` as a sum of `parts` numbers >= 1."""
    for cuts in combinations(range(1, total), parts - 1):
        edges = (0, *cuts, total)
        yield tuple(b - a for a, b in pairwise(edges))


def exhaustive(costs: np.ndarray, stages: int) -> float:
    """The lowest cost with exactly this many stages, by trying all."""
    n, _, units = costs.shape
    best = np.inf
    for inner in combinations(range(1, n - 1), stages - 1):
        bounds = (0, *inner, n - 1)
        for placed in compositions(units - 1, stages):
            best = min(best, sum(costs[bounds[s], bounds[s + 1], placed[s]] for s in range(stages)))
    return best


@settings(max_examples=300)
@given(
    seed=st.integers(0, 2**32 - 1),
    n_candidates=st.integers(2, 7),
    n_units=st.integers(1, 6),
    infinite_share=st.sampled_from([0.0, 0.3, 0.8]),
)
def test_best_partitions_are_the_exhaustive_ones(
    seed: int, n_candidates: int, n_units: int, infinite_share: float
) -> None:
    """For any stage costs, even infinite ones, each stage count's value equals exhaustive search's and is attained."""
    rng = np.random.default_rng(seed)
    costs = rng.exponential(size=(n_candidates, n_candidates, n_units + 1))
    costs[rng.random(costs.shape) < infinite_share] = np.inf
    max_stages = min(n_candidates - 1, n_units)
    values, bounds, units = best_partitions(costs, max_stages)
    for stages in range(1, max_stages + 1):
        expected = exhaustive(costs, stages)
        assert values[stages - 1] == pytest.approx(expected)
        if np.isfinite(expected):
            b, u = bounds[stages - 1, : stages + 1], units[stages - 1, :stages]
            assert b[0] == 0
            assert b[-1] == n_candidates - 1
            assert u.sum() == n_units
            assert sum(costs[b[s], b[s + 1], u[s]] for s in range(stages)) == pytest.approx(expected)


objectives = st.sampled_from(
    [
        MeanNormalizedLatency(),
        BalancedLatency(),
        WeightedLatency(1.0, 20.0),
        SloAttainment(ttft_slo_s=0.5, tpot_slo_s=0.02),
    ]
)
workloads = st.lists(st.tuples(st.integers(1, 8000), st.integers(1, 800)), min_size=1, max_size=10)
models = st.builds(
    StepModel,
    base_s=st.floats(0.002, 0.03),
    per_decode_s=st.floats(1e-6, 1e-4),
    per_kv_token_s=st.floats(1e-9, 2e-7),
    per_prefill_token_s=st.floats(1e-6, 1e-4),
    per_prefill_attention_s=st.floats(0.0, 1e-8),
    straggler_per_kv_token_s=st.sampled_from([0.0, 3e-7, 1e-6]),
)


@settings(max_examples=200)
@given(workload=workloads, model=models, rate=st.floats(0.1, 40.0), n=st.integers(1, 5), objective=objectives)
def test_plan_of_a_workload_is_the_exhaustive_one(
    workload: list[tuple[int, int]], model: StepModel, rate: float, n: int, objective: Objective
) -> None:
    """For random workloads, models, rates and objectives, the coarse program equals exhaustive search over its grid."""
    histogram = LengthHistogram.from_requests(*zip(*workload, strict=True))
    problem = PlanProblem(histogram, model, CAPACITY, rate, n, objective=objective, boundaries_per_octave=1)
    candidates = problem.candidates()[:: max(1, len(problem.candidates()) // 5)]
    candidates = np.unique(np.append(candidates, len(problem.edges) - 1))
    costs = np.full((len(candidates), len(candidates), n + 1), np.inf)
    for a in range(len(candidates)):
        for b in range(a + 1, len(candidates)):
            for k in range(1, n + 1):
                costs[a, b, k] = problem.service(candidates[a], candidates[b], k).cost
    assert np.allclose(stage_costs(problem.inputs, candidates, n, 1.0), costs, rtol=1e-12)
    max_stages = min(n, len(candidates) - 1)
    values, _, _ = best_partitions(costs, max_stages)
    for stages in range(1, max_stages + 1):
        assert values[stages - 1] == pytest.approx(exhaustive(costs, stages))


@pytest.mark.parametrize("load", [0.4, 0.8])
def test_more_instances_than_units_lose_little(load: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 192 instances, the program in units of several instances is within 0.5 % of the exact one."""
    rng = np.random.default_rng(7)
    prompts = np.minimum(rng.lognormal(6.0, 1.5, 4000).astype(int) + 1, 60_000)
    outputs = rng.geometric(1 / 300, 4000)
    histogram = LengthHistogram.from_requests(prompts, outputs)
    model = StepModel(
        base_s=0.008,
        per_decode_s=2e-5,
        per_kv_token_s=4e-8,
        per_prefill_token_s=2e-5,
        per_prefill_attention_s=8e-10,
        straggler_per_kv_token_s=3e-7,
    )
    n = 192
    rate = load * planner.capacity_rate(histogram, model, CAPACITY, n)
    problem = PlanProblem(histogram, model, CAPACITY, rate, n, stage_tolerance=0.0)
    assert n > dynamic_program.MAX_UNITS
    approximate = planner.solve(problem)
    monkeypatch.setattr(planner, "MAX_UNITS", n)
    exact = planner.solve(problem)
    assert len(exact.stages) > 1
    assert approximate.cost <= exact.cost * 1.005

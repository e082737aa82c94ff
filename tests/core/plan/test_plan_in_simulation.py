"""The planner's predictions, simulated: one stage and the planned cascade on the same arrivals."""

from dataclasses import replace

import numpy as np
import pytest

from cascadeinfer.core.cost.histogram import LengthHistogram
from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.layout import Proposal, StageLayout
from cascadeinfer.core.plan.planner import capacity_rate, plan, predict
from cascadeinfer.core.plan.problem import PlanProblem
from cascadeinfer.core.policies.cascade import Cascade
from cascadeinfer.core.types import InstanceCapacity
from cascadeinfer.sim.run import simulate
from cascadeinfer.sim.settings import SimConfig, instance_ids
from cascadeinfer.workload.trace import Trace

MODEL = StepModel(
    base_s=0.007,
    per_decode_s=1.2e-5,
    per_kv_token_s=4e-8,
    per_prefill_token_s=2e-5,
    per_prefill_attention_s=7e-10,
    straggler_per_kv_token_s=2e-7,
)
CAPACITY = InstanceCapacity(kv_blocks=25_000, block_size_tokens=16, max_num_seqs=512, max_batched_tokens=8192)
N_INSTANCES = 6
N_REQUESTS = 8000


def workload(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Prompts and outputs."""
    prompts = np.minimum(rng.lognormal(5.8, 1.3, N_REQUESTS).astype(int) + 1, 20_000)
    return prompts, np.minimum(rng.geometric(1 / 150, N_REQUESTS), 600)


def simulated(
    trace: Trace, capacity: InstanceCapacity, layout: StageLayout | None, model: StepModel = MODEL
) -> tuple[float, float]:
    """Mean normalised latency and TTFT of the cascade with these ranges in the middle of the run, in seconds."""
    config = SimConfig(
        instances=N_INSTANCES,
        capacity=capacity,
        step_model=model,
        kv_bytes_per_token=131_072.0,
        context_tokens=32_768,
    )
    policy = Cascade(layout=layout, step_model=model, refine=False, replan=False)
    counted = simulate(trace, policy, config).requests.arrived_in(0.25 * trace.duration_s, 0.85 * trace.duration_s)
    return float(np.mean(counted.normalised_latency_s)), float(np.mean(counted.ttft_s))


@pytest.mark.parametrize("load", [0.4, 0.75])
def test_prediction_and_order_hold_in_simulation(load: float) -> None:
    """Both predictions are within 15 % of simulation, and the planned stages gain at least half of the prediction."""
    rng = np.random.default_rng(2)
    prompts, outputs = workload(rng)
    histogram = LengthHistogram.from_requests(prompts, outputs)
    rate = load * capacity_rate(histogram, MODEL, CAPACITY, N_INSTANCES)
    planned = plan(histogram, MODEL, CAPACITY, rate, N_INSTANCES)
    assert len(planned.stages) > 1
    trace = Trace.from_columns(prompts, outputs, np.cumsum(rng.exponential(1.0 / rate, len(prompts))))
    one, _ = simulated(trace, CAPACITY, None)
    cascade, _ = simulated(trace, CAPACITY, planned.layout(instance_ids(N_INSTANCES)))
    assert planned.one_stage_cost == pytest.approx(one, rel=0.15)
    assert planned.cost == pytest.approx(cascade, rel=0.15)
    assert 1.0 - cascade / one > 0.5 * planned.gain


def test_small_chunks_are_predicted_too() -> None:
    """
    With chunks of 512 tokens prompts take most of the time. The price sees queued prompts, so that they wait much less
    than where the least KV tokens decide.
    """
    rng = np.random.default_rng(3)
    prompts, outputs = workload(rng)
    histogram = LengthHistogram.from_requests(prompts, outputs)
    capacity = CAPACITY.with_token_budget(512)
    rate = 0.85 * capacity_rate(histogram, MODEL, capacity, N_INSTANCES)
    one = predict(PlanProblem(histogram, MODEL, capacity, rate, N_INSTANCES), Proposal((), (N_INSTANCES,)))
    trace = Trace.from_columns(prompts, outputs, np.cumsum(rng.exponential(1.0 / rate, len(prompts))))
    norm_s, ttft_s = simulated(trace, capacity, None)
    assert one.cost == pytest.approx(norm_s, rel=0.1)
    assert one.stages[0].service.ttft_s == pytest.approx(ttft_s, rel=0.35)


@pytest.mark.parametrize("until_tokens", [0.0, 512.0])
def test_decodes_beside_prompts_are_predicted_by_the_rule(until_tokens: float) -> None:
    """
    Where a prompt beside a decode makes attention several times as expensive, the prediction is within 15 % of the
    simulation; without the rule it is lower.
    """
    rng = np.random.default_rng(4)
    prompts, outputs = workload(rng)
    histogram = LengthHistogram.from_requests(prompts, outputs)
    alone = replace(
        MODEL,
        straggler_per_kv_token_s=5e-7,
        split_slots=15.0,
        split_by_share=1.0,
        split_cap=32.0,
        split_until_requests=993.0,
    )
    ruled = replace(alone, mixed_split_tokens=until_tokens, mixed_share_per_request=0.15, mixed_overlap=1.0)
    rate = 0.7 * capacity_rate(histogram, ruled, CAPACITY, N_INSTANCES)
    costs = [
        predict(PlanProblem(histogram, model, CAPACITY, rate, N_INSTANCES), Proposal((), (N_INSTANCES,))).cost
        for model in (alone, ruled)
    ]
    trace = Trace.from_columns(prompts, outputs, np.cumsum(rng.exponential(1.0 / rate, len(prompts))))
    norm_s, _ = simulated(trace, CAPACITY, None, ruled)
    assert costs[1] == pytest.approx(norm_s, rel=0.15)
    assert costs[0] < 0.9 * costs[1]

"""The planner's predictions, simulated: one stage and the planned cascade on the same arrivals."""

import numpy as np
import pytest

from cascadeinfer.core.cost.histogram import LengthHistogram
from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.plan.planner import capacity_rate, plan
from cascadeinfer.core.policies.least_loaded import LeastLoaded
from cascadeinfer.core.policies.static_stages import StaticStages
from cascadeinfer.core.policy import Policy
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


@pytest.mark.parametrize("load", [0.4, 0.75])
def test_prediction_and_order_hold_in_simulation(load: float) -> None:
    """Both predictions are within 15 % of simulation, and the planned stages gain at least half of the prediction."""
    rng = np.random.default_rng(2)
    prompts = np.minimum(rng.lognormal(5.8, 1.3, N_REQUESTS).astype(int) + 1, 20_000)
    outputs = np.minimum(rng.geometric(1 / 150, N_REQUESTS), 600)
    histogram = LengthHistogram.from_requests(prompts, outputs)
    rate = load * capacity_rate(histogram, MODEL, CAPACITY, N_INSTANCES)
    planned = plan(histogram, MODEL, CAPACITY, rate, N_INSTANCES)
    assert len(planned.stages) > 1
    trace = Trace.from_columns(prompts, outputs, np.cumsum(rng.exponential(1.0 / rate, len(prompts))))

    def simulated_s(policy: Policy) -> float:
        config = SimConfig(
            instances=N_INSTANCES,
            capacity=CAPACITY,
            step_model=MODEL,
            kv_bytes_per_token=131_072.0,
            context_tokens=32_768,
        )
        result = simulate(trace, policy, config)
        counted = result.requests.arrived_in(0.25 * trace.duration_s, 0.85 * trace.duration_s)
        return float(np.mean(counted.normalised_latency_s))

    one = simulated_s(LeastLoaded())
    cascade = simulated_s(StaticStages(layout=planned.layout(instance_ids(N_INSTANCES))))
    assert planned.one_stage_cost == pytest.approx(one, rel=0.15)
    assert planned.cost == pytest.approx(cascade, rel=0.15)
    assert 1.0 - cascade / one > 0.5 * planned.gain

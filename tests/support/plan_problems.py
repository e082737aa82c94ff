"""Planning problems of widely spread lengths, for tests of plans with roles."""

import numpy as np

from cascadeinfer.core.cost.histogram import LengthHistogram
from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.plan.planner import capacity_rate
from cascadeinfer.core.plan.problem import PlanProblem
from cascadeinfer.core.types import InstanceCapacity

CAPACITY = InstanceCapacity(kv_blocks=20_000, block_size_tokens=16, max_num_seqs=256, max_batched_tokens=4096)
MODEL = StepModel(
    base_s=0.012,
    per_decode_s=3e-5,
    per_kv_token_s=8e-8,
    per_prefill_token_s=5e-5,
    per_prefill_attention_s=3e-9,
    straggler_per_kv_token_s=1e-6,
)


def mixed_lengths(n: int = 2000) -> LengthHistogram:
    """Prompts around a thousand tokens, outputs around two hundred, both spread widely."""
    rng = np.random.default_rng(5)
    prompts = np.clip(np.exp(rng.normal(6.8, 1.1, n)), 4, 20_000).astype(int)
    outputs = np.clip(np.exp(rng.normal(5.0, 0.8, n)), 2, 2_000).astype(int)
    return LengthHistogram.from_requests(prompts, outputs, max_tokens=32_768)


def problem_at(load: float, n_instances: int, histogram: LengthHistogram | None = None) -> PlanProblem:
    """A problem at a share of the one-stage capacity."""
    lengths = mixed_lengths() if histogram is None else histogram
    rate = load * capacity_rate(lengths, MODEL, CAPACITY, n_instances)
    return PlanProblem(lengths, MODEL, CAPACITY, rate, n_instances)

"""Small results to draw, made up: their values are known, so that what is drawn can be compared with them."""

from collections.abc import Sequence

import numpy as np

from cascadeinfer.core.cost.fit import StepSamples
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.results.records import InstanceSamples, RequestRecords
from cascadeinfer.results.summary import RunSummary


def run_summary(e2e_s: float, within: float = 1.0) -> RunSummary:
    """A run whose latencies all follow from its mean end-to-end latency."""
    return RunSummary(
        requests=100,
        unfinished=0,
        ttft_s_mean=0.1 * e2e_s,
        ttft_s_p99=0.2 * e2e_s,
        tpot_s_mean=0.01 * e2e_s,
        tpot_s_p99=0.02 * e2e_s,
        normalised_latency_s_mean=0.01 * e2e_s,
        normalised_latency_s_p99=0.02 * e2e_s,
        e2e_s_mean=e2e_s,
        e2e_s_p50=e2e_s,
        e2e_s_p99=2.0 * e2e_s,
        throughput_rps=10.0,
        throughput_tokens_per_s=1000.0,
        slo_attainment=within,
        goodput_rps=10.0,
        migrations=0,
        preemptions=0,
    )


def requests(e2e_s: Sequence[float]) -> RequestRecords:
    """Requests of 100 output tokens with these end-to-end latencies; NaN: it did not finish."""
    n = len(e2e_s)
    ends = np.asarray(e2e_s, dtype=np.float64)
    zeros = np.zeros(n, dtype=np.int64)
    return RequestRecords(
        arrival_s=np.zeros(n),
        dispatched_s=np.zeros(n),
        scheduled_s=np.zeros(n),
        first_token_s=0.1 * ends,
        finish_s=ends,
        prompt_tokens=zeros + 50,
        output_tokens=zeros + 100,
        produced_tokens=np.where(np.isfinite(ends), 100, 0),
        migrations=zeros,
        preemptions=zeros,
        recomputed_tokens=zeros,
        prefix_hit_tokens=zeros,
        rejected=np.zeros(n, dtype=np.bool_),
        aborted=np.zeros(n, dtype=np.bool_),
    )


def instance_samples(n: int = 200) -> InstanceSamples:
    """Two stages that report in turn; stage 1 steps in every second report only, for 20 ms."""
    numbers = np.arange(n)
    stage = numbers % 2
    steps = np.where(stage == 0, 0.01, np.where(numbers % 4 == 1, 0.02, 0.0))
    return InstanceSamples(
        time_s=numbers / 10.0,
        instance=stage,
        stage=stage,
        running=np.full(n, 10),
        waiting=np.zeros(n, dtype=np.int64),
        running_tokens=np.full(n, 5000),
        kv_use=np.full(n, 0.25),
        step_s=steps,
    )


LAYOUTS = (
    (0.0, StageLayout.from_boundaries((500,), (("a", "b"), ("c", "d")))),
    (10.0, StageLayout.from_boundaries((700, 3000), (("a", "b"), ("c",), ("d",)))),
)


def step_samples(n: int = 120) -> StepSamples:
    """Decode steps of three batch sizes, and prefills."""
    rng = np.random.default_rng(1)
    n_decode = np.where(np.arange(n) % 4 < 3, np.array([1, 8, 64])[np.arange(n) % 3], 0).astype(np.float64)
    lengths = rng.integers(100, 4000, n).astype(np.float64)
    prefill = np.where(n_decode == 0, lengths, 0.0)
    step_s = 0.005 + 1e-7 * n_decode * lengths + 1e-5 * prefill
    return StepSamples(
        n_decode, n_decode * lengths, np.where(n_decode > 0, lengths, 0.0), prefill, prefill * lengths, step_s
    )

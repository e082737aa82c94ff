"""The fast form of the split rules against the simulation, on mixed batches from traces."""

import csv
import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cascadeinfer.core.cost.heterogeneity import decode_features, reduce_kernel, reduction_error
from cascadeinfer.core.cost.splitkv import AttentionKernel, SplitRule, fa2_splits, kernel_s

TRACES = Path(__file__).parents[2] / "data" / "traces"
H100 = AttentionKernel(SplitRule.FA3, 132, 1, 3.15e12, 26e9, 11e-6, 5.5e-6, 1.2e-6, split_cap=32)
A100 = AttentionKernel(SplitRule.FA2, 108, 2, 1.62e12, 15.5e9, 15e-6, 6e-6, 1.2e-6)
FLASHINFER = replace(
    H100, rule=SplitRule.FLASHINFER_TENSOR_CORE, blocks_per_sm=2, block_bandwidth_bytes_s=14e9, split_cap=None
)
KERNELS = {
    "fa3-h100": H100,
    "fa3-h100-cap16": replace(H100, split_cap=16),
    "fa2-a100": A100,
    "fa2-l40s": AttentionKernel(SplitRule.FA2, 142, 1, 0.73e12, 15.5e9, 11e-6, 3e-6, 1e-6),
    "flashinfer-tensor-core": FLASHINFER,
    "flashinfer-cuda-core": replace(FLASHINFER, rule=SplitRule.FLASHINFER_CUDA_CORE),
    "trtllm-b200": AttentionKernel(SplitRule.TRTLLM, 148, 2, 7.2e12, 60e9, 10e-6, 0.0, 1e-6),
}


def trace_batches() -> list[NDArray[np.int64]]:
    """Decode batches of 4 to 256 requests from a chat, a long-context and a reasoning trace."""
    rng, batches = np.random.default_rng(7), []
    for name in ("azure_2023_conv", "mooncake_synthetic", "servegen_deepseek_r1_1h"):
        with gzip.open(TRACES / f"{name}.csv.gz", "rt", newline="") as stream:
            rows = np.array([(int(r["prompt_tokens"]), int(r["output_tokens"])) for r in csv.DictReader(stream)])
        weight = rows[:, 1] / rows[:, 1].sum()
        for size in (4, 8, 16, 24, 32, 48, 64, 96, 128, 256):
            for _ in range(3):
                chosen = rows[rng.choice(len(rows), size, p=weight)]
                lengths = chosen[:, 0] + (chosen[:, 1] * rng.random(size)).astype(np.int64)
                batches.append(np.clip(lengths, 1, 131_072))
    return [batch for batch in batches if batch.sum() <= 1_000_000]


BATCHES = trace_batches()


@pytest.mark.parametrize("kv_heads", [8, 2, 1])
@pytest.mark.parametrize("name", list(KERNELS))
def test_fast_form_follows_the_simulation_on_mixed_batches(name: str, kv_heads: int) -> None:
    """On batches from traces the median error is below 12 %, p90 below 25 %, and the term explains most of it."""
    error = reduction_error(KERNELS[name], BATCHES, kv_heads=kv_heads)
    assert error.batches > 70
    assert error.median < 0.12
    assert error.p90 < 0.25
    assert error.median < error.median_without


@pytest.mark.parametrize("name", list(KERNELS))
def test_one_long_request_costs_what_the_simulation_says(name: str) -> None:
    """For the batch that mixing hurts most (31 x 1K + 1 x 128K) the fast form is within 20 % of the simulation."""
    lengths = np.array([1024] * 31 + [131_072])
    for kv_heads in (8, 1):
        fast = reduce_kernel(KERNELS[name], kv_heads=kv_heads, layers=1).step_s(decode_features(lengths))
        assert fast == pytest.approx(kernel_s(lengths, kv_heads, KERNELS[name]), rel=0.2)


def test_fa2_hurts_and_fa3_does_not() -> None:
    """One long request among 63 short ones costs much under FA2 and little under FA3, also in the fast form."""
    mixed, equal = np.array([2048] * 63 + [65_536]), np.full(64, (63 * 2048 + 65_536) // 64)
    for kernel, low, high in ((A100, 2.5, 8.0), (H100, 0.95, 1.15)):
        model = reduce_kernel(kernel, kv_heads=8, layers=1)
        ratio = model.step_s(decode_features(mixed)) / model.step_s(decode_features(equal))
        assert low < ratio < high


def test_split_count_of_fa2_is_the_heuristics_count() -> None:
    """Where a batch is split, the fast form's count for it is FA2's own or next to it."""
    model = reduce_kernel(replace(A100, bandwidth_bytes_s=1e15, block_bandwidth_bytes_s=1e9), kv_heads=8, layers=1)
    model = replace(model, per_kv_token_s=0.0)
    for n in range(1, 22):
        tokens = 65_536
        batch = decode_features(np.array([1] * (n - 1) + [tokens]))
        straggler_s = model.step_s(batch) - model.base_s - model.per_decode_s * n - model.split_s
        counted = tokens * model.straggler_per_kv_token_s / straggler_s
        assert counted == pytest.approx(fa2_splits(n, tokens // 128, 8, 108), rel=0.12), n


def test_layers_scale_the_seconds_only() -> None:
    """Thirty-two layers cost 32 times one; the split structure is the same."""
    one, many = (reduce_kernel(A100, kv_heads=8, layers=n) for n in (1, 32))
    lengths = np.array([900] * 30 + [40_000])
    assert many.step_s(decode_features(lengths)) == pytest.approx(32 * one.step_s(decode_features(lengths)))
    assert many.split_slots == one.split_slots


def test_bandwidth_is_bounded_by_the_blocks() -> None:
    """A device whose blocks together stream less than its memory (H20 under FA3) is limited by them."""
    h20 = replace(H100, sms=78, bandwidth_bytes_s=3.68e12, block_bandwidth_bytes_s=29.6e9)
    assert reduce_kernel(h20, kv_heads=8, layers=1).per_kv_token_s == pytest.approx(8 * 512 / (78 * 29.6e9))

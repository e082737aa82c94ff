"""Split-KV rules against the reference simulator's recorded output, against measurements, and on their own."""

import csv
import gzip
import re
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cascadeinfer.core.cost.splitkv import (
    AttentionKernel,
    SplitRule,
    fa2_splits,
    fa3_split_bound,
    flashinfer_chunk_tokens,
    kernel_s,
    makespan_s,
    plan_pieces,
)

DATA = Path(__file__).parents[2] / "data"
OUTPUT = (DATA / "gpu" / "splitkv_sim_output.txt").read_text()

# The kernels of the reference simulation, under the names of its output (tests/data/README.md).
H100 = AttentionKernel(SplitRule.FA3, 132, 1, 3.15e12, 26e9, 11e-6, 5.5e-6, 1.2e-6)
A100 = AttentionKernel(SplitRule.FA2, 108, 2, 1.68e12, 8.7e9, 15e-6, 6e-6, 1.2e-6)
FLASHINFER = replace(H100, rule=SplitRule.FLASHINFER_TENSOR_CORE, blocks_per_sm=2, block_bandwidth_bytes_s=14e9)
KERNELS = {
    "h100_fa3": H100,
    "h200_fa3": replace(H100, bandwidth_bytes_s=4.42e12, block_bandwidth_bytes_s=37e9),
    "h100_fa3_cap16(vLLM graphs)": replace(H100, split_cap=16),
    "h100_fa3_cap32": replace(H100, split_cap=32),
    "h100_flashinfer(occ2)": FLASHINFER,
    "h20_fa3(derived r, unmeasured)": replace(H100, sms=78, bandwidth_bytes_s=3.76e12, block_bandwidth_bytes_s=14.9e9),
    "a100_fa2": A100,
    "l40s_fa2": AttentionKernel(SplitRule.FA2, 142, 1, 0.73e12, 10e9, 11e-6, 3e-6, 1e-6),
}
FIXED_BATCHES = {
    "31x1K+1x128K": [1024] * 31 + [131072],
    "63x2K+1x64K": [2048] * 63 + [65536],
    "60x2K+4x32K": [2048] * 60 + [32768] * 4,
    "127x1K+1x32K": [1024] * 127 + [32768],
}
L2_BYTES = {"h100_fa3": 50e6, "h200_fa3": 50e6, "a100_fa2": 40e6, "l40s_fa2": 96e6}
TABLES = {
    "h100_fa3": "h100_sxm_vllm_0.24.0",
    "h200_fa3": "h200_sxm_vllm_0.24.0",
    "a100_fa2": "a100_sxm_vllm_0.14.0",
    "l40s_fa2": "l40s_vllm_0.24.0",
}
LENGTHS = st.lists(st.integers(1, 131_072), min_size=1, max_size=40).map(lambda x: np.array(x, dtype=np.int64))
RULES = st.sampled_from(list(SplitRule))
KV_HEADS = st.sampled_from([1, 2, 4, 8])


def lengths_of(values: list[int]) -> NDArray[np.int64]:
    """KV lengths as an array."""
    return np.array(values, dtype=np.int64)


def recorded_ratios(kv_heads: int, kernel: str) -> dict[str, float]:
    """Mixed over equal lengths as the reference printed it: batch name -> ratio."""
    section = OUTPUT.split(f"kv heads per GPU = {kv_heads}\n")[1].split("\n\n")[0]
    line = next(line for line in section.splitlines() if line[:34].strip() == kernel)
    return {name.strip(): float(value) for name, value in re.findall(r"([^:]+?): x([\d.]+) \(ideal[^)]*\)", line[34:])}


def mixed_over_equal(lengths: NDArray[np.int64], kv_heads: int, kernel: AttentionKernel) -> float:
    """Kernel time of a batch over one of equal lengths with the same count and (rounded down) total."""
    equal = np.full(len(lengths), int(lengths.sum()) // len(lengths))
    return kernel_s(lengths, kv_heads, kernel) / kernel_s(equal, kv_heads, kernel)


@pytest.mark.parametrize("kv_heads", [8, 1])
@pytest.mark.parametrize("name", [n for n in KERNELS if n != "h200_fa3"])
def test_ratio_of_mixed_to_equal_is_the_references(name: str, kv_heads: int) -> None:
    """For the four fixed batches the price of mixing is what the reference simulator recorded, to its two decimals."""
    recorded = recorded_ratios(kv_heads, name)
    for batch, lengths in FIXED_BATCHES.items():
        ours = mixed_over_equal(lengths_of(lengths), kv_heads, KERNELS[name])
        assert ours == pytest.approx(recorded[batch], abs=0.0051), batch


@pytest.mark.parametrize("name", ["a100_fa2", "l40s_fa2", "h100_flashinfer(occ2)"])
def test_ratio_on_trace_batches_is_the_references(name: str) -> None:
    """On the 20 Azure batches that the reference drew first, with its seed, the mean ratio is the recorded one."""
    with gzip.open(DATA / "traces" / "azure_2023_conv.csv.gz", "rt", newline="") as stream:
        rows = [(int(r["prompt_tokens"]), int(r["output_tokens"])) for r in csv.DictReader(stream)]
    random = Random(1)
    pool = [length for length in (p + int(o * random.random()) for p, o in rows) if 0 < length <= 131_072]
    batches = [lengths_of([random.choice(pool) for _ in range(64)]) for _ in range(20)]
    ours = float(np.mean([mixed_over_equal(b, 8, KERNELS[name]) for b in batches]))
    assert ours == pytest.approx(recorded_ratios(8, name)["azure_conv b64"], abs=0.0051)


@pytest.mark.parametrize("name", list(TABLES))
def test_error_on_measured_equal_lengths_is_the_references(name: str) -> None:
    """Beyond the L2 cache, median and p90 errors against measured cells are those of the reference simulation."""
    kernel, errors = KERNELS[name], []
    with gzip.open(DATA / "gpu" / f"aic_decode_attn_{TABLES[name]}.csv.gz", "rt", newline="") as stream:
        for row in csv.DictReader(stream):
            heads = int(row["num_heads"]), int(row["num_key_value_heads"])
            batch, length = int(row["batch_size"]), int(row["kv_len"])
            if heads not in {(32, 8), (8, 1), (16, 4), (8, 2)} or length < 1024 or batch > 256:
                continue
            if batch * length * heads[1] * 512 >= 1.5 * L2_BYTES[name]:
                simulated_us = 1e6 * kernel_s(np.full(batch, length), heads[1], kernel)
                errors.append(abs(simulated_us / float(row["latency_us"]) - 1.0))
    recorded = re.search(rf"^{name} cells (\d+) median \|err\| ([\d.]+) p90 ([\d.]+)", OUTPUT, re.MULTILINE)
    assert recorded is not None
    assert len(errors) == int(recorded[1])
    assert np.sort(errors)[len(errors) // 2] == pytest.approx(float(recorded[2]), abs=0.0006)
    assert np.sort(errors)[int(len(errors) * 0.9)] == pytest.approx(float(recorded[3]), abs=0.0006)


def test_flashinfer_on_a800_is_near_the_measurements() -> None:
    """With A100's numbers the CUDA-core rule is within 4 % (median) of Llama-2-7B's decode attention on A800."""
    a800 = AttentionKernel(SplitRule.FLASHINFER_CUDA_CORE, 108, 4, 1.75e12, 15.5e9, 10e-6, 6e-6, 1e-6)
    errors = []
    with gzip.open(DATA / "gpu" / "frontier_a800_flashinfer_llama2-7b_decode.csv.gz", "rt", newline="") as stream:
        for row in list(csv.DictReader(stream)):
            batch, length = int(row["batch_size"]), int(row["kv_cache_size"])
            if length >= 512 and batch * length * 32 * 512 >= 1.5 * 40e6:
                simulated_us = 1e6 * kernel_s(np.full(batch, length), 32, a800)
                errors.append(abs(simulated_us / float(row["latency_us"]) - 1.0))
    assert len(errors) > 200
    assert np.median(errors) < 0.04


def test_lone_block_rate_of_a100_follows_from_a_partial_wave() -> None:
    """With 15.5 GB/s for a lone block the A100 simulation is closer to measurements than with the documented 8.7."""
    cells = [(32, 4096, 8, 418.9), (32, 8192, 8, 816.4), (64, 4096, 8, 682.0), (64, 4096, 4, 419.9)]
    faster = replace(A100, block_bandwidth_bytes_s=15.5e9, bandwidth_bytes_s=1.62e12)
    for kernel, most in ((faster, 0.06), (A100, 0.28)):
        errors = [1e6 * kernel_s(np.full(b, n), h, kernel) / us - 1 for b, n, h, us in cells]
        assert max(np.abs(errors)) < most
    assert abs(1e6 * kernel_s(np.full(32, 8192), 8, A100) / 816.4 - 1) > 0.2


def test_fa2_stops_splitting_at_the_documented_batch() -> None:
    """On A100 with 8 KV heads a batch of 21 is split and one of 22 is not (173 tiles); on L40S 28 and 29."""
    assert fa2_splits(21, 1024, 8, 108) > 1
    assert fa2_splits(22, 1024, 8, 108) == 1
    assert fa2_splits(28, 1024, 8, 142) > 1
    assert fa2_splits(29, 1024, 8, 142) == 1


def test_fa2_takes_its_split_count_from_the_longest() -> None:
    """A short request beside a long one is one piece, and the long one's pieces are equal."""
    pieces = plan_pieces(lengths_of([500, 65_536]), 8, A100)
    assert pieces.is_split
    assert pieces.tokens[0] == 512
    assert len(set(pieces.tokens[1:-1].tolist())) == 1
    assert pieces.tokens[1:].sum() == 65_536


def test_fa3_bound_for_short_and_long() -> None:
    """FA3 never splits four blocks or fewer, and bounds a long request of 8 heads at 15 pieces on 132 SMs."""
    assert fa3_split_bound(4, 8, 132) == 1
    assert fa3_split_bound(1024, 8, 132) == 15
    assert fa3_split_bound(1024, 106, 132) == 1


def test_fa3_cap_limits_the_pieces_of_a_long_request() -> None:
    """With one KV head, the longest request takes as many pieces as the engine's cap allows; without a cap, more."""
    lengths = lengths_of([1024] * 31 + [131_072])
    longest = [int(plan_pieces(lengths, 1, replace(H100, split_cap=cap)).tokens.max()) for cap in (16, 32, None)]
    assert longest[0] == 131_072 // 16
    assert longest[1] == 131_072 // 32
    assert longest[2] < longest[1]


def test_fa3_leaves_a_huge_batch_whole() -> None:
    """Above 992 requests FA3 splits nothing."""
    lengths = lengths_of([128] * 991 + [131_072])
    assert plan_pieces(lengths, 1, H100).is_split
    assert not plan_pieces(np.append(lengths, 128), 1, H100).is_split


def test_flashinfer_budgets_of_its_two_paths() -> None:
    """33 requests x 8 heads fill the tensor-core budget (2 x 132 / 8), the last to be split; CUDA cores stop there."""
    cuda = replace(FLASHINFER, rule=SplitRule.FLASHINFER_CUDA_CORE)
    assert flashinfer_chunk_tokens(lengths_of([4096] * 32), 8, FLASHINFER) == 4096
    assert flashinfer_chunk_tokens(lengths_of([4096] * 34), 8, FLASHINFER) is None
    assert flashinfer_chunk_tokens(lengths_of([4096] * 33), 8, cuda) is None
    assert flashinfer_chunk_tokens(lengths_of([4096] * 3), 8, cuda) == 384


@given(LENGTHS, KV_HEADS, RULES)
def test_pieces_cover_every_token(lengths: NDArray[np.int64], kv_heads: int, rule: SplitRule) -> None:
    """By every rule a batch's pieces add up to its tokens, rounded up to blocks at most, one or more per request."""
    pieces = plan_pieces(lengths, kv_heads, replace(A100, rule=rule))
    assert (pieces.tokens > 0).all()
    assert lengths.sum() <= pieces.tokens.sum() <= (-(-lengths // 128) * 128).sum()
    assert len(pieces.tokens) >= len(lengths)
    assert pieces.is_split or len(pieces.tokens) == len(lengths)


@given(LENGTHS, KV_HEADS, RULES)
def test_kernel_is_never_faster_than_its_bounds(lengths: NDArray[np.int64], kv_heads: int, rule: SplitRule) -> None:
    """No schedule beats the device's bandwidth or its longest piece, nor exceeds Graham's bound for list scheduling."""
    kernel = replace(A100, rule=rule)
    pieces = plan_pieces(lengths, kv_heads, kernel)
    work = np.repeat(pieces.tokens, kv_heads) * 512.0
    rates = kernel.bandwidth_bytes_s, kernel.block_bandwidth_bytes_s
    spent = makespan_s(work, np.zeros(len(work)), kernel.slots, *rates)
    shared = min(kernel.bandwidth_bytes_s / kernel.slots, kernel.block_bandwidth_bytes_s)
    least = max(work.sum() / kernel.bandwidth_bytes_s, work.max() / kernel.block_bandwidth_bytes_s)
    assert least * (1 - 1e-9) <= spent <= (work.sum() / kernel.slots + work.max()) / shared * (1 + 1e-9)


def test_makespan_of_hand_made_schedules() -> None:
    """Two slots, three equal pieces: two share the bandwidth, the last runs alone at the rate of a block."""
    work = np.array([6.0, 6.0, 6.0])
    none = np.zeros(3)
    assert makespan_s(work, none, 2, 4.0, 3.0) == pytest.approx(6 / 2 + 6 / 3)
    assert makespan_s(work, none, 3, 100.0, 2.0) == pytest.approx(3.0)
    assert makespan_s(work[:0], none[:0], 3, 100.0, 2.0) == 0.0

"""
The fast form of a split rule: attention coefficients of the step model from a kernel, and their error against
simulation.

`kernel_s` (splitkv.py) costs up to a millisecond per batch, the step model some ten nanoseconds; the planner and the
simulator need the latter. All that survives of a rule is the size of the longest piece, because a kernel ends with the
later of two things: all bytes at the bandwidth of the device, or the longest piece at the bandwidth of a thread block.

    rule         longest piece                                         unsplit from
    FA2          kv_max / s, s = fewest splits with nearly full waves  0.8 x 2 SMs / kv_heads requests
    FA3          1.1 x kv_sum x kv_heads / SMs, >= kv_max / bound      993 requests
    FlashInfer   kv_sum / (grid / kv_heads - (n - 1) / 2), but         grid / kv_heads requests
                 >= kv_max / (grid / kv_heads - (n - 1))
    trtllm-gen   kv_max x n x kv_heads / slots                         half of slots / kv_heads requests

FlashInfer's (n - 1) / 2: each request's last piece is half full on average, which takes half a place in the grid; a
request much shorter than a piece takes a whole one. Kernels that serve requests in batch order (all but FA3) start the
longest one, once the batch exceeds one wave, on average half-way through what does not fit into the first wave:
`overlap_max` = 1/2. The form leaves out the rounding of lengths to blocks and FA3's wave quantisation at 1-2 waves (a
batch of 17 equal requests x 8 KV heads on 132 SMs takes two waves; mixed lengths smooth this).

Steps with prompts (`varlen.py`; sizes in tokens):

    rule    split as alone up to   a prompt fills the device    share per request     overlap
    FA2     never                  (nothing is split)           query heads / slots   1
    FA3     graph_tokens           SMs x 128 / query heads      (bandwidth)           0
    other   always

FA2 takes one head after another, so the longest request's block of the last head starts when nearly all else is done:
its time adds to the rest. FA3 starts the longest first. FA2's query heads each read the KV of their group; they are
taken to find it in the L2 cache, so that only the rate of the thread blocks limits them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from cascadeinfer.core.cost.latency import SEPARATE_CALLS_TOKENS, BatchFeatures, StepModel
from cascadeinfer.core.cost.splitkv import (
    BLOCK_TOKENS,
    FA3_IMBALANCE,
    FA3_MAX_REQUESTS,
    FA3_UNSPLIT_BLOCKS,
    FULL_SHARE,
    MAX_SPLITS,
    MIN_EFFICIENCY,
    AttentionKernel,
    SplitRule,
    fa3_split_bound,
    kernel_s,
)
from cascadeinfer.core.cost.varlen import FA3_TILE_ROWS, GRAPH_TOKENS, Chunk, Heads, mixed_kernel_s

LONG_CONTEXT_TOKENS = 131_072
"""FA3's own bound grows with the longest length; the fast form takes the bound of a long one, where it matters."""

IN_ORDER_OVERLAP = 0.5
"""Mean start of the longest request among those after the first wave, as a share of the run."""


def mixed_rule(kernel: AttentionKernel, heads: Heads, *, graph_tokens: int = GRAPH_TOKENS) -> dict[str, float]:
    """
    The step model's coefficients of steps with prompts; empty for a backend with separate calls.

    Args:
        kernel: Backend and device.
        heads: Attention heads per device.
        graph_tokens: Tokens of a step up to which the engine uses CUDA graphs; 0 without.
    """
    match kernel.rule:
        case SplitRule.FA2:
            return {
                "mixed_split_tokens": 0.0,
                "mixed_share_per_request": heads.query / kernel.slots,
                "mixed_overlap": 1.0,
            }
        case SplitRule.FA3:
            fill = kernel.sms * FA3_TILE_ROWS / heads.query
            return {"mixed_split_tokens": float(graph_tokens), "mixed_fill_tokens": fill}
        case _:
            return {}


def reduce_kernel(
    kernel: AttentionKernel,
    *,
    kv_heads: int,
    layers: int,
    query_heads: int | None = None,
    graph_tokens: int = GRAPH_TOKENS,
) -> StepModel:
    """
    The attention part of a step model: base, per-request, per-token and straggler coefficients, and the split rule's
    numbers.

    Args:
        kernel: Backend and device.
        kv_heads: KV heads per device, >= 1.
        layers: Attention layers of the model; each runs the kernel once.
        query_heads: Heads of queries per device; None for a model of steps without prompts.
        graph_tokens: As for `mixed_rule`.
    """
    mixed = {} if query_heads is None else mixed_rule(kernel, Heads(query_heads, kv_heads), graph_tokens=graph_tokens)
    two_per_sm = 2.0 * kernel.sms / kv_heads
    resident = kernel.slots / kv_heads
    streamed_bytes_s = min(kernel.bandwidth_bytes_s, kernel.slots * kernel.block_bandwidth_bytes_s)
    split_slots, slots_per_request, by_share, until, cap = resident, 0.0, 0.0, 0.0, float(MAX_SPLITS)
    efficiency, overlap, unsplit = 0.0, IN_ORDER_OVERLAP, BLOCK_TOKENS
    match kernel.rule:
        case SplitRule.FA2:
            split_slots, until, efficiency = two_per_sm, FULL_SHARE * two_per_sm, MIN_EFFICIENCY
        case SplitRule.FA3:
            split_slots, by_share, until = kernel.sms / (FA3_IMBALANCE * kv_heads), 1.0, FA3_MAX_REQUESTS + 1.0
            bound = kernel.split_cap or fa3_split_bound(LONG_CONTEXT_TOKENS // BLOCK_TOKENS, kv_heads, kernel.sms)
            cap, overlap, unsplit = float(bound), 0.0, FA3_UNSPLIT_BLOCKS * BLOCK_TOKENS
        case SplitRule.FLASHINFER_CUDA_CORE:
            slots_per_request, by_share, until, cap = 0.5, 1.0, resident, resident
        case SplitRule.FLASHINFER_TENSOR_CORE:
            split_slots, slots_per_request, by_share, until, cap = two_per_sm, 0.5, 1.0, two_per_sm + 1.0, two_per_sm
        case SplitRule.TRTLLM:
            until = resident / 2.0
    return StepModel(
        base_s=layers * (kernel.launch_s + kernel.wave_s),
        per_decode_s=layers * kernel.wave_s * kv_heads / kernel.slots,
        per_kv_token_s=layers * kv_heads * kernel.kv_head_bytes_per_token / streamed_bytes_s,
        per_prefill_token_s=0.0,
        per_prefill_attention_s=0.0,
        straggler_per_kv_token_s=layers * kernel.kv_head_bytes_per_token / kernel.block_bandwidth_bytes_s,
        split_s=layers * kernel.split_s,
        split_slots=split_slots,
        split_slots_per_request=slots_per_request,
        split_by_share=by_share,
        split_until_requests=until,
        split_cap=max(cap, 1.0),
        overlap_max=overlap,
        wave_requests=resident,
        split_efficiency=efficiency,
        split_above_tokens=float(unsplit),
        **mixed,
    )


@dataclass(frozen=True, slots=True)
class ReductionError:
    """
    Relative error of the fast form against the simulation of the same kernel.

    Attributes:
        median: Median of the absolute relative error.
        p90: Its 90th percentile.
        bias: Median of the signed error; negative when the fast form is too short.
        median_without: Median absolute error of the same model without any heterogeneity term.
    """

    batches: int
    median: float
    p90: float
    bias: float
    median_without: float


def decode_features(lengths: NDArray[np.int64]) -> BatchFeatures:
    """Features of a decode-only batch with these KV lengths."""
    return BatchFeatures(len(lengths), int(lengths.sum()), int(lengths.max()))


def reduction_error(
    kernel: AttentionKernel, batches: Sequence[NDArray[np.int64]], *, kv_heads: int, model: StepModel | None = None
) -> ReductionError:
    """
    Compare the fast form with the simulation on decode-only batches.

    Args:
        kernel: Backend and device.
        batches: KV lengths of each batch, in batch order.
        kv_heads: KV heads per device.
        model: The fast form of one layer; `reduce_kernel`'s if None.
    """
    fast = model or reduce_kernel(kernel, kv_heads=kv_heads, layers=1)
    simulated_s = np.array([kernel_s(lengths, kv_heads, kernel) for lengths in batches])
    features = [decode_features(lengths) for lengths in batches]
    error = np.array([fast.step_s(f) for f in features]) / simulated_s - 1.0
    balanced_s = np.array(
        [fast.base_s + fast.per_decode_s * f.n_decode + fast.per_kv_token_s * f.decode_kv_tokens for f in features]
    )
    return ReductionError(
        batches=len(batches),
        median=float(np.median(np.abs(error))),
        p90=float(np.quantile(np.abs(error), 0.9)),
        bias=float(np.median(error)),
        median_without=float(np.median(np.abs(balanced_s / simulated_s - 1.0))),
    )


@dataclass(frozen=True, slots=True)
class MixedStep:
    """The attention of a step with prompts: KV lengths of the decoding requests, in batch order, and the chunks."""

    lengths: NDArray[np.int64]
    chunks: tuple[Chunk, ...]

    @property
    def features(self) -> BatchFeatures:
        """What the step model sees of it."""
        decode = decode_features(self.lengths)
        return replace(
            decode,
            prefill_tokens=sum(chunk.tokens for chunk in self.chunks),
            prefill_attention_tokens=sum(chunk.pairs for chunk in self.chunks),
        )


@dataclass(frozen=True, slots=True)
class MixedError(ReductionError):
    """
    Relative error of the fast form on steps with prompts; `batches` counts steps, and `median_without` is the error of
    the same form without the rule for such steps.

    Attributes:
        bias_without: Median of the signed error without the rule.
        uncached: Median of the simulated time without a cache that keeps what another query head has read, over the one
            with it.
    """

    bias_without: float
    uncached: float


def mixed_reduction_error(
    kernel: AttentionKernel,
    steps: Sequence[MixedStep],
    heads: Heads,
    *,
    pair_s: float,
    graph_tokens: int = GRAPH_TOKENS,
) -> MixedError:
    """
    Compare the fast form with the simulation on steps with prompts.

    Args:
        kernel: Backend and device.
        steps: The steps; at least one.
        heads: Attention heads per device.
        pair_s: Time of the whole device per (token, context token) pair and query head of a prompt.
        graph_tokens: As for `mixed_rule`.
    """
    fast = replace(
        reduce_kernel(kernel, kv_heads=heads.kv, layers=1, query_heads=heads.query, graph_tokens=graph_tokens),
        per_prefill_attention_s=pair_s * heads.query,
    )
    alone = replace(fast, mixed_split_tokens=SEPARATE_CALLS_TOKENS)
    call = partial(mixed_kernel_s, heads=heads, kernel=kernel, pair_s=pair_s, graph_tokens=graph_tokens)
    simulated_s = np.array([call(step.lengths, step.chunks) for step in steps])
    uncached_s = simulated_s
    if kernel.rule is SplitRule.FA2:
        uncached_s = np.array([call(step.lengths, step.chunks, cache_keeps=False) for step in steps])
    error, without = (
        np.array([model.step_s(step.features) for step in steps]) / simulated_s - 1.0 for model in (fast, alone)
    )
    return MixedError(
        batches=len(steps),
        median=float(np.median(np.abs(error))),
        p90=float(np.quantile(np.abs(error), 0.9)),
        bias=float(np.median(error)),
        median_without=float(np.median(np.abs(without))),
        bias_without=float(np.median(without)),
        uncached=float(np.median(uncached_s / simulated_s)),
    )

"""
How decode-attention backends cut a batch's KV cache into thread blocks, and the time the kernel then takes.

One layer, one query token per request, grouped-query attention: all query heads of a KV head share a tile, so the unit
of work is (request, KV head, piece of its KV). `plan_pieces` restates each backend's rule; `kernel_s` puts the pieces
on the device.

*Rules* (../shared/data/kernels.md, section 3, has the sources line by line):

- FA2 (FlashAttention-2, `flash_api.cpp: num_splits_heuristic`, `flash_fwd_kernel.h`): ONE split count for the batch,
  from tiles = requests x KV heads and the longest length; piece size = longest / splits, so a short request is one
  piece.
- FA3 (`hopper/heuristics.h`, `flash_prepare_scheduler.cu`): a split count per request, so that no piece exceeds 1.1 x
  the mean load of an SM, up to a bound: the heuristic's for a batch of one, or the one the engine passes (vLLM under
  CUDA graphs: 16, later 32). Pieces are served longest first.
- FlashInfer (`scheduler.cuh`): the smallest common piece size whose pieces fit the grid; none if the requests alone
  fill it. The CUDA-core path compares with occupancy x SMs, the tensor-core path ("decode as prefill") has a budget of
  2 x SMs / KV heads.
- TRTLLM (trtllm-gen on SM100, closed source; kernels.md 3c and flashinfer issue 4832): pieces per request from one wave
  and the longest length, in batch order. APPROXIMATE: only this one sentence is published.

*Device*: a fluid model. `slots` thread blocks run at once; each streams at the lower of its own limit and its share of
the device's bandwidth; a free slot takes the next piece in order. Times are in seconds, sizes in tokens until
`kernel_s` multiplies by bytes.
"""

import enum
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

BLOCK_TOKENS = 128
"""kBlockN at head_dim 128: FA2 `flash_api.cpp` (128), FA3 `tile_size.h` (paged without TMA: 128)."""

FLASHINFER_PAGE_TOKENS = 16
"""vLLM's and SGLang's page size for FlashInfer."""

FLASHINFER_MIN_CHUNK_TOKENS = 128
"""`scheduler.cuh`: no piece is shorter."""

MAX_SPLITS = 128
"""Largest split count that FA2 and FA3 consider."""

MIN_EFFICIENCY = 0.85
"""FA2 and FA3 take the smallest split count whose wave efficiency reaches this share of the best."""

FULL_SHARE = 0.8
"""FA2 and FA3 do not split once the tiles fill this share of the slots."""

FA3_MAX_REQUESTS = 992
"""`flash_prepare_scheduler.cu`: a larger batch is not split."""

FA3_IMBALANCE = 1.1
"""`flash_prepare_scheduler.cu`: a piece may exceed the mean load of an SM by this factor."""

FA3_UNSPLIT_BLOCKS = 4
"""`hopper/heuristics.h`: sequences up to this many blocks are never split."""


class SplitRule(enum.StrEnum):
    """Attention backends with their own split rule."""

    FA2 = "fa2"
    FA3 = "fa3"
    FLASHINFER_CUDA_CORE = "flashinfer-cuda-core"
    FLASHINFER_TENSOR_CORE = "flashinfer-tensor-core"
    TRTLLM = "trtllm-gen"


@dataclass(frozen=True, slots=True)
class AttentionKernel:
    """
    A decode-attention kernel on a device.

    Attributes:
        rule: Its split rule.
        sms: Streaming multiprocessors of the device.
        blocks_per_sm: Thread blocks that run at once on one SM.
        bandwidth_bytes_s: Bandwidth of all blocks together.
        block_bandwidth_bytes_s: Bandwidth of one block when the others are idle.
        launch_s: Floor of a call.
        split_s: Added when any request is split (combining the pieces).
        wave_s: Added each time a slot is filled (prologue and epilogue of a block).
        split_cap: Bound on FA3's splits that the engine passes; None for FA3's own heuristic.
        kv_head_bytes_per_token: K and V of one token and one KV head (head_dim 128, 16 bit: 512).
    """

    rule: SplitRule
    sms: int
    blocks_per_sm: int
    bandwidth_bytes_s: float
    block_bandwidth_bytes_s: float
    launch_s: float
    split_s: float
    wave_s: float
    split_cap: int | None = None
    kv_head_bytes_per_token: int = 512

    @property
    def slots(self) -> int:
        """Thread blocks that run at once."""
        return self.sms * self.blocks_per_sm


@dataclass(frozen=True, slots=True)
class Pieces:
    """
    A kernel's work for ONE KV head, in the order in which the device takes it; the heads' pieces follow one another.

    Attributes:
        tokens: KV tokens of each piece, > 0.
        is_split: Whether any request has more than one.
    """

    tokens: NDArray[np.int64]  # (pieces,)
    is_split: bool


def smallest_efficient_split(tiles: int, slots: int, candidates: Sequence[int]) -> int:
    """The smallest of the split counts whose last wave is nearly as full as the best one's (FA2 and FA3)."""
    efficiency_of = {s: (tiles * s / slots) / math.ceil(tiles * s / slots) for s in candidates}
    needed = MIN_EFFICIENCY * max(efficiency_of.values())
    return min(s for s, efficiency in efficiency_of.items() if efficiency >= needed)


def fa2_splits(n_requests: int, longest_blocks: int, kv_heads: int, sms: int) -> int:
    """FlashAttention-2's split count for a batch; it assumes two blocks per SM."""
    tiles = n_requests * kv_heads
    if tiles >= FULL_SHARE * 2 * sms:
        return 1
    most = min(MAX_SPLITS, 2 * sms, longest_blocks)
    candidates = [s for s in range(1, most + 1) if s == 1 or -(-longest_blocks // s) != -(-longest_blocks // (s - 1))]
    return smallest_efficient_split(tiles, 2 * sms, candidates)


def fa3_split_bound(longest_blocks: int, kv_heads: int, sms: int) -> int:
    """FlashAttention-3's own bound on a request's splits; with variable lengths it assumes a batch of one."""
    if kv_heads >= FULL_SHARE * sms or longest_blocks <= FA3_UNSPLIT_BLOCKS:
        return 1
    return smallest_efficient_split(kv_heads, sms, range(1, min(MAX_SPLITS, sms, longest_blocks) + 1))


def flashinfer_chunk_tokens(lengths: NDArray[np.int64], kv_heads: int, kernel: AttentionKernel) -> int | None:
    """FlashInfer's common piece size for a batch, or None where it does not split."""
    if kernel.rule is SplitRule.FLASHINFER_CUDA_CORE:
        budget = kernel.slots // kv_heads
        if len(lengths) * kv_heads >= kernel.slots:
            return None
    else:
        budget = max(2 * kernel.sms // kv_heads, 1)
        if len(lengths) > budget:
            return None
    pages = -(-lengths // FLASHINFER_PAGE_TOKENS)
    low = FLASHINFER_MIN_CHUNK_TOKENS // FLASHINFER_PAGE_TOKENS
    high = max(int(pages.max()), low)
    while low < high:
        middle = (low + high) // 2
        if int((-(-pages // middle)).sum()) > budget:
            low = middle + 1
        else:
            high = middle
    return low * FLASHINFER_PAGE_TOKENS


def cut(sizes: NDArray[np.int64], piece: NDArray[np.int64] | int) -> NDArray[np.int64]:
    """Cut each size into pieces of the given size, the last one shorter; in order."""
    counts = -(-sizes // piece)
    owner = np.repeat(np.arange(len(sizes)), counts)
    index = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    whole = np.broadcast_to(np.asarray(piece, dtype=np.int64), sizes.shape)[owner]
    return np.minimum(whole, sizes[owner] - index * whole)


def _fa3_pieces(lengths: NDArray[np.int64], kv_heads: int, kernel: AttentionKernel) -> Pieces:
    blocks = -(-lengths // BLOCK_TOKENS)
    bound = kernel.split_cap or fa3_split_bound(int(blocks.max()), kv_heads, kernel.sms)
    if bound == 1 or len(lengths) > FA3_MAX_REQUESTS:
        splits = np.ones_like(blocks)
    else:
        per_sm = math.ceil(int(blocks.sum()) * FA3_IMBALANCE * kv_heads / kernel.sms)
        splits = np.clip(-(-blocks // per_sm), 1, bound)
    pieces = cut(blocks, -(-blocks // splits)) * BLOCK_TOKENS
    return Pieces(np.sort(pieces)[::-1].copy(), bool((splits > 1).any()))


def plan_pieces(lengths: NDArray[np.int64], kv_heads: int, kernel: AttentionKernel) -> Pieces:
    """
    Cut a batch as the kernel's backend does.

    Args:
        lengths: KV tokens of each decoding request, in batch order, all >= 1.
        kv_heads: KV heads per device (of the model, divided by the tensor-parallel degree), >= 1.
        kernel: Backend and device.
    """
    match kernel.rule:
        case SplitRule.FA3:
            return _fa3_pieces(lengths, kv_heads, kernel)
        case SplitRule.FA2:
            blocks = -(-lengths // BLOCK_TOKENS)
            longest = int(blocks.max())
            splits = fa2_splits(len(lengths), longest, kv_heads, kernel.sms)
            return Pieces(cut(blocks, -(-longest // splits)) * BLOCK_TOKENS, splits > 1)
        case SplitRule.FLASHINFER_CUDA_CORE | SplitRule.FLASHINFER_TENSOR_CORE:
            chunk = flashinfer_chunk_tokens(lengths, kv_heads, kernel)
            pieces = lengths.copy() if chunk is None else cut(lengths, chunk)
            return Pieces(pieces, len(pieces) > len(lengths))
        case SplitRule.TRTLLM:
            longest = int(lengths.max())
            splits = max(1, min(kernel.slots // (len(lengths) * kv_heads), -(-longest // BLOCK_TOKENS)))
            pieces = cut(lengths, -(-longest // splits))
            return Pieces(pieces, splits > 1)


@njit(cache=True)
def makespan_s(
    stream_bytes: NDArray[np.float64],
    compute_s: NDArray[np.float64],
    slots: int,
    bandwidth_bytes_s: float,
    block_bytes_s: float,
) -> float:
    """
    Time until the last block ends, when a free slot takes the next in order and those that stream share the bandwidth.

    All that stream do so at one rate, so one that starts when each has streamed v bytes ends at v + its size: plain
    list scheduling in v, and only the passage of time depends on their number. Blocks that stream nothing compute, and
    end at their own time. Complexity: O(blocks x log slots).
    """
    streaming = [0.0 for _ in range(0)]
    computing = [0.0 for _ in range(0)]
    upcoming = 0
    streamed = 0.0
    now_s = 0.0
    while True:
        while upcoming < len(stream_bytes) and len(streaming) + len(computing) < slots:
            if stream_bytes[upcoming] > 0.0:
                heapq.heappush(streaming, streamed + stream_bytes[upcoming])
            else:
                heapq.heappush(computing, now_s + compute_s[upcoming])
            upcoming += 1
        if len(streaming) == 0:
            if len(computing) == 0:
                return now_s
            now_s = heapq.heappop(computing)
            continue
        rate = min(block_bytes_s, bandwidth_bytes_s / len(streaming))
        end_s = now_s + (streaming[0] - streamed) / rate
        if len(computing) > 0 and computing[0] < end_s:
            streamed += (computing[0] - now_s) * rate
            now_s = heapq.heappop(computing)
        else:
            now_s = end_s
            streamed = heapq.heappop(streaming)


def kernel_s(lengths: NDArray[np.int64], kv_heads: int, kernel: AttentionKernel) -> float:
    """Simulated time of one layer's decode attention for these lengths, in seconds. Arguments as for `plan_pieces`."""
    pieces = plan_pieces(lengths, kv_heads, kernel)
    work_bytes = np.repeat(pieces.tokens, kv_heads) * float(kernel.kv_head_bytes_per_token)
    waves = -(-len(work_bytes) // kernel.slots)
    streaming_s = makespan_s(
        work_bytes,
        np.zeros(len(work_bytes)),
        kernel.slots,
        kernel.bandwidth_bytes_s,
        kernel.block_bandwidth_bytes_s,
    )
    return kernel.launch_s + (kernel.split_s if pieces.is_split else 0.0) + streaming_s + kernel.wave_s * waves

"""
One attention call for decoding requests and prompt chunks, simulated by thread blocks.

FlashAttention and Triton compute a step that has both in one call with sequences of various lengths ("varlen"), which
changes how decodes are cut (../shared/data/kernels.md, section 3e, has the sources line by line):

- FA2: one thread block per request and QUERY head: no request is split, and the query heads of a KV head read its KV
  separately. Grid: blocks of 64 query tokens, requests, heads; `mha_varlen_fwd` packs heads and splits only without
  prompts.
- FA3: query heads are packed into tiles of 128 rows. Up to the engine's limit for CUDA graphs, counted in tokens of the
  step, it passes the split bound of decode-only steps (vLLM: 32), and the split counts of `splitkv.py` hold with the
  chunks' tiles in the load. In larger steps the bound is the heuristic's for as many tiles as the largest chunk has:
  none once they fill 0.8 of the SMs.
- FlashInfer and trtllm-gen decode in a call of their own: the chunks' time is added.

*Device*: the fluid model of `splitkv.py`, in which a block of a prompt computes for a fixed time, and blocks that
stream share the bandwidth only among themselves. FA2 takes heads one after another, decodes first in each (vLLM's
order); FA3 takes the longest pieces first. `pair_s` is calibrated so that prompts alone take what was measured for
them.

*Left out*: FA2's empty blocks beside a long chunk (`max_seqlen_q / 64` per decode, all but one empty) and, unless
`cache_keeps` is false, misses of the L2 cache when a query head reads what its neighbour has read. Both make mixed
steps of FA2 dearer than simulated here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cascadeinfer.core.cost.splitkv import (
    BLOCK_TOKENS,
    FA3_IMBALANCE,
    FA3_MAX_REQUESTS,
    FA3_UNSPLIT_BLOCKS,
    FULL_SHARE,
    MAX_SPLITS,
    AttentionKernel,
    SplitRule,
    cut,
    kernel_s,
    makespan_s,
    smallest_efficient_split,
)

FA2_TILE_ROWS = 64
"""kBlockM of FA2's paged kernel (`flash_fwd_launch_template.h`); one query head."""

FA3_TILE_ROWS = 128
"""kBlockM of FA3 at head_dim 128 (`tile_size.h`); a query token has as many rows as query heads share a KV head."""

GRAPH_TOKENS = 512
"""vLLM's default for `max_cudagraph_capture_size`."""

GRAPH_SPLITS = 32
"""vLLM's bound on FA3's splits up to there (0.32, `flash_attn_max_num_splits_for_cuda_graph`)."""


@dataclass(frozen=True, slots=True)
class Heads:
    """Attention heads on one device: of the model, divided by the tensor-parallel degree. `kv` divides `query`."""

    query: int
    kv: int

    @property
    def per_kv(self) -> int:
        """Query heads that share a KV head."""
        return self.query // self.kv


@dataclass(frozen=True, slots=True)
class Chunk:
    """Prompt tokens computed in one step, >= 1, and those of the same prompt that were computed before."""

    tokens: int
    computed: int = 0

    @property
    def pairs(self) -> float:
        """(token, context token) pairs, as in `BatchFeatures.prefill_attention_tokens`."""
        return self.tokens * self.computed + self.tokens * (self.tokens + 1) / 2

    def pairs_of_tiles(self, tile_tokens: int) -> NDArray[np.float64]:  # (tiles,)
        """The pairs of each tile of so many of its tokens, in order."""
        edges = np.minimum(np.arange(-(-self.tokens // tile_tokens) + 1, dtype=np.float64) * tile_tokens, self.tokens)
        below: NDArray[np.float64] = edges * self.computed + edges * (edges + 1) / 2
        return np.diff(below)


@dataclass(frozen=True, slots=True)
class CallWork:
    """
    A call's thread blocks in the order in which the device takes them; each either streams or computes.

    Attributes:
        stream_bytes: KV that a block of a decode reads; 0 for a block of a prompt.
        compute_s: Time of a block of a prompt; 0 for a block of a decode.
        is_split: Whether anything is split.
    """

    stream_bytes: NDArray[np.float64]  # (blocks,)
    compute_s: NDArray[np.float64]  # (blocks,)
    is_split: bool


def _fa2_work(
    lengths: NDArray[np.int64], chunks: Sequence[Chunk], heads: Heads, kernel: AttentionKernel, block_pair_s: float
) -> CallWork:
    read = -(-lengths // BLOCK_TOKENS) * (BLOCK_TOKENS * float(kernel.kv_head_bytes_per_token))
    computed = np.concatenate([chunk.pairs_of_tiles(FA2_TILE_ROWS) * block_pair_s for chunk in chunks])
    stream = np.concatenate([read, np.zeros(len(computed))])
    compute = np.concatenate([np.zeros(len(read)), computed])
    return CallWork(np.tile(stream, heads.query), np.tile(compute, heads.query), is_split=False)


def fa3_mixed_bound(longest_blocks: int, chunks: Sequence[Chunk], heads: Heads, sms: int) -> int:
    """FA3's own bound on splits in a call with prompts: as for one sequence with the largest chunk's tiles."""
    tiles = heads.kv * max(-(-chunk.tokens * heads.per_kv // FA3_TILE_ROWS) for chunk in chunks)
    if tiles >= FULL_SHARE * sms or longest_blocks <= FA3_UNSPLIT_BLOCKS:
        return 1
    return smallest_efficient_split(tiles, sms, range(1, min(MAX_SPLITS, sms, longest_blocks) + 1))


def _fa3_work(
    lengths: NDArray[np.int64],
    chunks: Sequence[Chunk],
    heads: Heads,
    kernel: AttentionKernel,
    block_pair_s: float,
    graph_tokens: int,
) -> CallWork:
    blocks = np.concatenate(
        [-(-lengths // BLOCK_TOKENS), [-(-(chunk.computed + chunk.tokens) // BLOCK_TOKENS) for chunk in chunks]]
    ).astype(np.int64)
    tiles = np.ones_like(blocks)
    tiles[len(lengths) :] = [-(-chunk.tokens * heads.per_kv // FA3_TILE_ROWS) for chunk in chunks]
    in_graphs = len(lengths) + sum(chunk.tokens for chunk in chunks) <= graph_tokens
    bound = fa3_mixed_bound(int(blocks.max()), chunks, heads, kernel.sms)
    if in_graphs and kernel.split_cap is not None:
        bound = kernel.split_cap
    if len(blocks) > FA3_MAX_REQUESTS:
        bound = 1
    per_sm = math.ceil(int((tiles * blocks).sum()) * FA3_IMBALANCE * heads.kv / kernel.sms)
    splits = np.clip(-(-blocks // per_sm), 1, bound)
    piece = -(-blocks // splits)
    stream: list[NDArray[np.float64]] = []
    compute: list[NDArray[np.float64]] = []
    for i in np.argsort(-piece, kind="stable"):
        if i < len(lengths):
            tokens = cut(blocks[i : i + 1], int(piece[i])) * BLOCK_TOKENS
            stream.append(np.repeat(tokens * float(kernel.kv_head_bytes_per_token), heads.kv))
            compute.append(np.zeros(len(stream[-1])))
        else:
            tile_pairs = chunks[i - len(lengths)].pairs_of_tiles(FA3_TILE_ROWS // heads.per_kv)[::-1] * heads.per_kv
            compute.append(np.repeat(tile_pairs * block_pair_s / splits[i], splits[i] * heads.kv))
            stream.append(np.zeros(len(compute[-1])))
    return CallWork(np.concatenate(stream), np.concatenate(compute), bool((splits > 1).any()))


def mixed_kernel_s(
    lengths: NDArray[np.int64],
    chunks: Sequence[Chunk],
    heads: Heads,
    kernel: AttentionKernel,
    *,
    pair_s: float,
    graph_tokens: int = GRAPH_TOKENS,
    cache_keeps: bool = True,
) -> float:
    """
    Simulated time of one layer's attention in a step with decodes and prompt chunks, in seconds.

    Args:
        lengths: KV tokens of each decoding request, in batch order, all >= 1; at least one.
        chunks: The prompts' chunks; at least one.
        heads: Attention heads per device.
        kernel: Backend and device.
        pair_s: Time of the whole device per (token, context token) pair and query head of a prompt.
        graph_tokens: Tokens of a step up to which the engine passes FA3 its bound for CUDA graphs; 0 without graphs.
        cache_keeps: Whether FA2's query heads of a KV head find what another has read in the L2 cache; else each reads
            it at the bandwidth of the device.
    """
    bandwidth_bytes_s = kernel.bandwidth_bytes_s
    match kernel.rule:
        case SplitRule.FA2:
            work = _fa2_work(lengths, chunks, heads, kernel, pair_s * kernel.slots)
            bandwidth_bytes_s *= heads.per_kv if cache_keeps else 1
        case SplitRule.FA3:
            work = _fa3_work(lengths, chunks, heads, kernel, pair_s * kernel.slots, graph_tokens)
        case _:
            prompts_s = pair_s * heads.query * sum(chunk.pairs for chunk in chunks)
            return kernel_s(lengths, heads.kv, kernel) + prompts_s
    waves = -(-len(work.compute_s) // kernel.slots)
    spent_s = makespan_s(
        work.stream_bytes, work.compute_s, kernel.slots, bandwidth_bytes_s, kernel.block_bandwidth_bytes_s
    )
    return kernel.launch_s + (kernel.split_s if work.is_split else 0.0) + spent_s + kernel.wave_s * waves

"""
One layer's attention over a paged KV cache, by every kernel that this machine has.

`PagedBatch` lays a batch out as an engine would: pages of a pool in random order, a block table, one query token per
decoding request and, behind them, the tokens of one prompt chunk. It holds several copies of the batch in different
pages; calls take them in turn, so that no copy is still in the L2 cache when it is read again.

A kernel prepares a call for each copy; planning is done then and not timed. Engines plan once per step, for all layers.
Before a kernel is measured, its output for a small batch is compared with plain torch.
"""

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch

Call = Callable[[], torch.Tensor]
TOLERANCE: Final = 2e-2
"""Largest absolute difference from plain torch; outputs are means of unit normal values, rounded to bfloat16."""
FLASHINFER_WORKSPACE_BYTES: Final = 256 * 2**20
GRAPH_TOKENS: Final = 512
"""Tokens of a step up to which vLLM passes its bound on FA3's splits: `max_cudagraph_capture_size`."""
GRAPH_SPLITS: Final = 32
"""Bound on FA3's splits that vLLM 0.32 passes under full CUDA graphs (`flash_attn_max_num_splits_for_cuda_graph`)."""
TRITON_SEGMENTS: Final = 16
TRITON_GRID: Final = 128
"""`vllm/v1/attention/backends/triton_attn.py`: NUM_PAR_SOFTMAX_SEGMENTS, MIN_LAUNCH_GRID_SIZE_2D."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Heads of a layer and tokens of a page."""

    q_heads: int
    kv_heads: int
    page_tokens: int
    head_dim: int = 128


class PagedBatch:
    """
    A batch in a paged KV cache, in several copies.

    Attributes:
        lengths: KV tokens of each request; the prompt chunk last, if there is one.
        q: (tokens, q_heads, head_dim): one per decoding request, then the chunk's.
        k, v: (pages, page_tokens, kv_heads, head_dim).
        tables: Per copy (requests, pages of the longest): page numbers, int32.
        query_starts: (requests + 1,), int32.
        kv_lengths: (requests,), int32.
    """

    def __init__(
        self, decodes: Sequence[int], prompt_tokens: int, shape: Shape, *, device: str, copies: int, seed: int
    ) -> None:
        """
        Args:
            decodes: KV tokens of the decoding requests.
            prompt_tokens: Of a prompt computed beside them, all in this step; 0 for none.
            shape: Of the layer.
            device: torch's name of it.
            copies: Of the batch, in different pages.
            seed: Of contents and page order.
        """
        self.shape, self.device, self.n_decode, self.prompt_tokens = shape, device, len(decodes), prompt_tokens
        self.lengths = [*decodes, *([prompt_tokens] if prompt_tokens else [])]
        pages = [-(-length // shape.page_tokens) for length in self.lengths]
        generator = torch.Generator(device=device).manual_seed(seed)
        size = (copies * sum(pages), shape.page_tokens, shape.kv_heads, shape.head_dim)
        made = {"dtype": torch.bfloat16, "device": device, "generator": generator}
        self.k, self.v = torch.randn(size, **made), torch.randn(size, **made)
        tokens = self.n_decode + prompt_tokens
        self.q = torch.randn((tokens, shape.q_heads, shape.head_dim), **made)
        order = torch.randperm(copies * sum(pages), device=device, generator=generator).to(torch.int32)
        self.page_lists = [list(part.split(pages)) for part in order.split(sum(pages))]
        self.tables = [torch.nn.utils.rnn.pad_sequence(lists, batch_first=True) for lists in self.page_lists]
        queries = [1] * self.n_decode + ([prompt_tokens] if prompt_tokens else [])
        self.query_starts = self.integers([0, *torch.tensor(queries).cumsum(0).tolist()])
        self.kv_lengths = self.integers(self.lengths)
        self.longest_query = max(queries)

    def integers(self, values: Sequence[int]) -> torch.Tensor:
        """An int32 tensor on the batch's device."""
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    @property
    def scale(self) -> float:
        """Of the scores."""
        return 1.0 / math.sqrt(self.shape.head_dim)


@dataclass(frozen=True, slots=True)
class Kernel:
    """
    A way to compute a layer's attention.

    Attributes:
        prepare: Makes the calls, one per copy of a batch.
    """

    name: str
    prepare: Callable[[PagedBatch], list[Call]]


def plain_torch(batch: PagedBatch) -> list[Call]:
    """Request by request with torch's own attention: the reference, and the stand-in on a processor."""

    def call(lists: list[torch.Tensor]) -> torch.Tensor:
        out = torch.empty_like(batch.q)
        for number, (pages, length) in enumerate(zip(lists, batch.lengths, strict=True)):
            first, end = (int(at) for at in batch.query_starts[number : number + 2])
            q = batch.q[first:end].transpose(0, 1)[None]  # (1, q_heads, n, head_dim)
            k, v = (
                cache[pages].flatten(0, 1)[:length].transpose(0, 1)[None] for cache in (batch.k, batch.v)
            )  # (1, kv_heads, length, head_dim)
            causal = end - first > 1  # the chunk is a whole prompt, so its mask is square
            answer = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
            out[first:end] = answer[0].transpose(0, 1)
        return out

    return [partial(call, lists) for lists in batch.page_lists]


def flashinfer(batch: PagedBatch, *, tensor_cores: bool) -> list[Call]:
    """FlashInfer: one call for the decodes, one for the chunk, as vLLM's backend does."""
    import flashinfer as package  # noqa: PLC0415 - if installed

    shape, n = batch.shape, batch.n_decode
    sizes = (shape.q_heads, shape.kv_heads, shape.head_dim, shape.page_tokens)
    types = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
    workspaces = [torch.zeros(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=batch.device) for _ in range(2)]

    def pages_of(lists: list[torch.Tensor], lengths: Sequence[int]) -> tuple[torch.Tensor, ...]:
        counts = torch.tensor([0, *(len(pages) for pages in lists)]).cumsum(0).tolist()
        last = [(length - 1) % shape.page_tokens + 1 for length in lengths]
        return batch.integers(counts), torch.cat(lists), batch.integers(last)

    def make(lists: list[torch.Tensor]) -> Call:
        decode = package.BatchDecodeWithPagedKVCacheWrapper(workspaces[0], "NHD", use_tensor_cores=tensor_cores)
        decode.plan(*pages_of(lists[:n], batch.lengths[:n]), *sizes, **types)
        cache, out = (batch.k, batch.v), torch.empty_like(batch.q)
        if not batch.prompt_tokens:
            return lambda: decode.run(batch.q, cache, out=out)
        prefill = package.BatchPrefillWithPagedKVCacheWrapper(workspaces[1], "NHD")
        starts = batch.integers([0, batch.prompt_tokens])
        prefill.plan(starts, *pages_of(lists[n:], batch.lengths[n:]), *sizes, causal=True, **types)

        def both() -> torch.Tensor:
            decode.run(batch.q[:n], cache, out=out[:n])
            prefill.run(batch.q[n:], cache, out=out[n:])
            return out

        return both

    return [make(lists) for lists in batch.page_lists]


def flash_attention(batch: PagedBatch, *, version: int, graphs: bool) -> list[Call]:
    """FlashAttention as vLLM calls it: one call for decodes and chunk; `graphs`: as under full CUDA graphs."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata  # noqa: PLC0415 - imports vLLM

    shape, longest = batch.shape, max(batch.lengths)
    splits = GRAPH_SPLITS if graphs and len(batch.q) <= GRAPH_TOKENS else 0
    planned = None
    if version == 3:
        planned = get_scheduler_metadata(
            batch_size=len(batch.lengths), max_seqlen_q=batch.longest_query, max_seqlen_k=longest,
            num_heads_q=shape.q_heads, num_heads_kv=shape.kv_heads, headdim=shape.head_dim,
            cache_seqlens=batch.kv_lengths, qkv_dtype=torch.bfloat16, cu_seqlens_q=batch.query_starts,
            page_size=shape.page_tokens, causal=True, window_size=(-1, -1), num_splits=splits,
        )  # fmt: skip
    out = torch.empty_like(batch.q)

    def call(table: torch.Tensor) -> torch.Tensor:
        flash_attn_varlen_func(
            q=batch.q, k=batch.k, v=batch.v, out=out, cu_seqlens_q=batch.query_starts,
            max_seqlen_q=batch.longest_query, seqused_k=batch.kv_lengths, max_seqlen_k=longest,
            softmax_scale=batch.scale, causal=True, window_size=[-1, -1], block_table=table, softcap=0.0,
            scheduler_metadata=planned, fa_version=version, num_splits=splits,
        )  # fmt: skip
        return out

    return [partial(call, table) for table in batch.tables]


def triton_unified(batch: PagedBatch) -> list[Call]:
    """Attention by the Triton kernel of vLLM, for decodes and chunk together."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention  # noqa: PLC0415 - imports vLLM

    shape = batch.shape
    threshold = TRITON_GRID // shape.kv_heads
    pieces = (threshold, shape.q_heads, TRITON_SEGMENTS)
    float32 = {"dtype": torch.float32, "device": batch.device}
    output_parts = torch.empty((*pieces, shape.head_dim), **float32)
    largest, sums = torch.empty(pieces, **float32), torch.empty(pieces, **float32)
    one = torch.ones((len(batch.lengths), shape.kv_heads), **float32)
    out = torch.empty_like(batch.q)

    def call(table: torch.Tensor) -> torch.Tensor:
        unified_attention(
            q=batch.q, k=batch.k, v=batch.v, out=out, cu_seqlens_q=batch.query_starts,
            max_seqlen_q=batch.longest_query, seqused_k=batch.kv_lengths, max_seqlen_k=max(batch.lengths),
            softmax_scale=batch.scale, causal=True, window_size=(-1, -1), block_table=table, softcap=0.0,
            q_descale=None, k_descale=one, v_descale=one, seq_threshold_3D=threshold,
            num_par_softmax_segments=TRITON_SEGMENTS, softmax_segm_output=output_parts, softmax_segm_max=largest,
            softmax_segm_expsum=sums,
        )  # fmt: skip
        return out

    return [partial(call, table) for table in batch.tables]


def kernels_here(device: str) -> list[Kernel]:
    """The kernels whose packages are installed; plain torch on a processor."""
    if device == "cpu":
        return [Kernel("torch", plain_torch)]
    found = []
    if importlib.util.find_spec("flashinfer") is not None:
        found += [
            Kernel("FlashInfer", lambda batch: flashinfer(batch, tensor_cores=False)),
            Kernel("FlashInfer tensor-core", lambda batch: flashinfer(batch, tensor_cores=True)),
        ]
    if importlib.util.find_spec("vllm") is not None:
        try:
            found += flash_kernels()
        except (ImportError, AttributeError, TypeError) as error:
            found.append(Kernel("FlashAttention", partial(_not_callable, error)))
        found.append(Kernel("Triton unified", triton_unified))
    return found


def _not_callable(error: Exception, _: PagedBatch) -> list[Call]:
    """Stands for a kernel whose package could not be imported, so that it counts as one that fails."""
    raise error


def flash_kernels() -> list[Kernel]:
    """FlashAttention in the version that vLLM takes on this GPU; FA3 also as under CUDA graphs."""
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version  # noqa: PLC0415 - imports vLLM

    version: Any = get_flash_attn_version()
    if version is None:
        return []
    plain = Kernel(f"FA{version}", lambda batch: flash_attention(batch, version=version, graphs=False))
    if version != 3:
        return [plain]
    return [plain, Kernel("FA3 graphs", lambda batch: flash_attention(batch, version=version, graphs=True))]


def largest_error(kernel: Kernel, shape: Shape, prompt_tokens: int, device: str) -> float:
    """Largest absolute difference from plain torch on a small batch."""
    batch = PagedBatch((1, 7, 130, 2050), prompt_tokens, shape, device=device, copies=2, seed=1)
    pairs = zip(kernel.prepare(batch), plain_torch(batch), strict=True)
    return max(float((call().clone().float() - reference().float()).abs().max()) for call, reference in pairs)

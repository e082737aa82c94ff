"""
Step-time parts of a model on a device, each from its own table: dense layers, decode attention, prefill attention.

A part is sampled as whole-model seconds over batch features and fitted separately with `fit_step_model`; the step model
is the sum of the parts. The launch floor of an attention call counts once per layer, in the decode part: vLLM puts
decode and prefill into one call.
"""

from dataclasses import dataclass, replace

import numpy as np
from catalogue import (
    ELEMENTWISE_BANDWIDTH_SHARE,
    ELEMENTWISE_FLOOR_S,
    MOE_COMPUTE_SHARE,
    MOE_FLOOR_S,
    REQUEST_OVERHEAD_S,
    STEP_OVERHEAD_S,
    Device,
    Model,
)
from measured import (
    Column,
    DecodeCells,
    allreduce_s,
    decode_cells,
    gemm_bandwidth_bytes_s,
    gemm_rate_flops,
    gemm_s,
    gemm_tokens,
    prefill_cells,
)

from cascadeinfer.core.cost.fit import FitResult, StepSamples, fit_step_model
from cascadeinfer.core.cost.heterogeneity import reduce_kernel
from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.cost.splitkv import SplitRule, kernel_s

LINEAR = StepModel(
    base_s=0.0, per_decode_s=0.0, per_kv_token_s=0.0, per_prefill_token_s=0.0, per_prefill_attention_s=0.0
)


@dataclass(frozen=True)
class Setting:
    """
    One model on one device.

    Attributes:
        source: The device whose tables are read (itself, unless derived).
        prefill_source: The device whose prefill-attention table is read.
    """

    model: Model
    device: Device
    tensor_parallel: int
    source: Device
    prefill_source: Device

    @property
    def heads(self) -> tuple[int, int]:
        """Query and KV heads per device."""
        return self.model.q_heads // self.tensor_parallel, max(1, self.model.kv_heads // self.tensor_parallel)


def samples(
    step_s: Column,
    *,
    n_decode: Column | None = None,
    kv: Column | None = None,
    kv_max: Column | None = None,
    prefill: Column | None = None,
    attention: Column | None = None,
) -> StepSamples:
    """Samples in which omitted columns are zero."""
    none = np.zeros_like(step_s)
    columns = [
        none if c is None else np.asarray(c, dtype=np.float64) for c in (n_decode, kv, kv_max, prefill, attention)
    ]
    return StepSamples(columns[0], columns[1], columns[2], columns[3], columns[4], step_s)


def expert_layers_s(setting: Setting, tokens: Column) -> tuple[Column, float]:
    """
    Times of all layers' experts, derived: the longer of reading the picked experts and computing; and the read of all
    experts.
    """
    model, device, source = setting.model, setting.device, setting.source
    share = 3.0 * model.hidden * model.ffn / setting.tensor_parallel
    bandwidth = gemm_bandwidth_bytes_s(device, source, 65_536, model.hidden)
    all_s = model.layers * model.experts * share * 2.0 / bandwidth
    picked = 1.0 - (1.0 - model.experts_active / model.experts) ** tokens
    rate = MOE_COMPUTE_SHARE * gemm_rate_flops(device, source)
    compute_s = model.layers * tokens * model.experts_active * 2.0 * share / rate
    return np.maximum(all_s * picked, compute_s) + model.layers * MOE_FLOOR_S, all_s


def layers_s(setting: Setting, tokens: Column) -> Column:
    """Times of all layers without attention for this many tokens: products, elementwise, all-reduce."""
    model, device, tp = setting.model, setting.device, setting.tensor_parallel
    q_heads, kv_heads = setting.heads
    hidden, source = model.hidden, setting.source
    q_width = q_heads * model.head_dim
    shapes = [(q_width + 2 * kv_heads * model.head_dim, hidden), (hidden, q_width)]
    ffn = model.ffn // tp
    if model.experts:
        shapes.append((model.experts, hidden))
        ffn *= model.experts_active
    else:
        shapes += [(2 * ffn, hidden), (hidden, ffn)]
    products_s = sum(gemm_s(device, source, tokens, n, k) for n, k in shapes)
    touched = 2.0 * (8 * hidden + 3 * ffn + 2 * (q_heads + kv_heads) * model.head_dim)
    elementwise_s = np.maximum(
        ELEMENTWISE_FLOOR_S, tokens * touched / (ELEMENTWISE_BANDWIDTH_SHARE * device.bandwidth_bytes_s)
    )
    reduce_s = 2.0 * allreduce_s(device, tp, tokens * hidden * 2.0)
    experts_s = expert_layers_s(setting, tokens)[0] if model.experts else 0.0
    return np.asarray(model.layers * (products_s + elementwise_s + reduce_s) + experts_s)


def logits_s(setting: Setting, rows: Column) -> Column:
    """Time of the output projection for this many sequences."""
    columns = -(-setting.model.vocabulary // setting.tensor_parallel)
    return gemm_s(setting.device, setting.source, rows, columns, setting.model.hidden)


def dense_samples(setting: Setting) -> StepSamples:
    """Steps without attention: decode only, prefill only, and both, at the table's numbers of tokens."""
    device = setting.device
    grid = gemm_tokens(device.tables).astype(np.float64)
    decode, prefill = grid[grid <= device.max_num_seqs], grid[grid <= device.max_batched_tokens]
    both_decode, both_prefill = (a.ravel() for a in np.meshgrid([8.0, 32.0, 128.0], [256.0, 512.0, 1024.0, 1920.0]))
    n_decode = np.concatenate([decode, np.zeros_like(prefill), both_decode])
    n_prefill = np.concatenate([np.zeros_like(decode), prefill, both_prefill])
    step_s = layers_s(setting, n_decode + n_prefill) + logits_s(setting, n_decode + (n_prefill > 0))
    step_s += STEP_OVERHEAD_S + REQUEST_OVERHEAD_S * n_decode
    return samples(step_s, n_decode=n_decode, prefill=n_prefill)


def fit_dense(setting: Setting) -> FitResult:
    """Base, per-token coefficients and knee of everything but attention."""
    start = LINEAR
    free = ["base_s", "per_decode_s", "per_prefill_token_s", "dense_knee_tokens", "per_dense_token_s"]
    if setting.model.experts:
        miss = 1.0 - setting.model.experts_active / setting.model.experts
        start = replace(LINEAR, experts_s=expert_layers_s(setting, np.ones(1))[1], expert_miss=miss)
    return fit_step_model(dense_samples(setting), start=start, free=free)


def decode_attention_cells(setting: Setting) -> DecodeCells:
    """
    One layer's decode attention: measured, or simulated where the kernel was not measured and the tables cannot replace
    it.
    """
    device, (q_heads, kv_heads) = setting.device, setting.heads
    cells = decode_cells(device.tables, q_heads, kv_heads)
    chosen = cells.batch <= device.max_num_seqs
    cells = DecodeCells(cells.batch[chosen], cells.kv_len[chosen], cells.time_s[chosen])
    if not simulates_attention(device):
        return cells
    lengths = [np.full(int(b), int(t)) for b, t in zip(cells.batch, cells.kv_len, strict=True)]
    simulated = np.array([kernel_s(x, kv_heads, device.kernel) for x in lengths])
    return DecodeCells(cells.batch, cells.kv_len, simulated)


def simulates_attention(device: Device) -> bool:
    """Whether a derived device's decode attention differs from its source's (another kernel description)."""
    return device.scaled_from == "h200"


def beyond_cache(setting: Setting, cells: DecodeCells) -> np.ndarray:
    """Cells whose KV cannot stay in the L2 cache between the collector's repeats (gpu/README.md, warning 1)."""
    return np.asarray(cells.kv_bytes(setting.heads[1]) > 1.5 * setting.device.l2_bytes)


def attention_samples(setting: Setting) -> tuple[StepSamples, StepSamples]:
    """All layers' decode attention: cells beyond the L2 cache, and those with the launch floor (KV below a fifth)."""
    cells = decode_attention_cells(setting)
    layers, kv_heads = setting.model.layers, setting.heads[1]
    every = samples(layers * cells.time_s, n_decode=cells.batch, kv=cells.batch * cells.kv_len, kv_max=cells.kv_len)
    floor_s = setting.device.kernel.launch_s
    tiny = cells.kv_bytes(kv_heads) / setting.device.kernel.bandwidth_bytes_s < 0.2 * floor_s
    return every.where(beyond_cache(setting, cells)), every.where(tiny & (cells.batch <= 64))


BLOCK_RATES = (0.84, 0.88, 0.92, 0.96, 1.0, 1.04)
"""
Shares of FA3's rate per thread block to try. Its longest piece is 1.1 x the mean load of an SM in any batch of up to 15
requests x 8 heads, so the rate that closes the fast form on equal lengths is the one it needs on mixed lengths. The
maximum hides too high a rate from least squares, hence the scan.
"""


def fit_attention(setting: Setting) -> FitResult:
    """
    Attention coefficients: split rule, cost of splitting and straggler from the kernel; floor, per request and per
    token from the cells.
    """
    model, kernel = setting.model, setting.device.kernel
    large, tiny = attention_samples(setting)
    keep = np.linspace(0, len(tiny) - 1, min(len(tiny), max(8, len(large) // 4))).astype(np.int64)
    both = StepSamples(*(np.concatenate([getattr(large, c), getattr(tiny, c)[keep]]) for c in large.__slots__))
    free = ["base_s", "per_decode_s", "per_kv_token_s"]
    fits = []
    for share in BLOCK_RATES if kernel.rule is SplitRule.FA3 else (1.0,):
        slower = replace(kernel, block_bandwidth_bytes_s=share * kernel.block_bandwidth_bytes_s)
        query_heads, kv_heads = setting.heads
        start = reduce_kernel(slower, kv_heads=kv_heads, layers=model.layers, query_heads=query_heads)
        fits.append(fit_step_model(both, start=start, free=free))
    return min(fits, key=lambda fit: fit.regions[0].median + fit.regions[0].p90 / 3.0)


def prefill_samples(setting: Setting) -> StepSamples:
    """
    All layers' attention of whole prompts: those that fit into a step, and long single ones (a chunk's attention costs
    per pair).
    """
    batch, length, time_s = prefill_cells(setting.prefill_source.tables, *setting.heads)
    ratio = setting.prefill_source.flops_s / setting.device.flops_s
    floor_s = float(time_s.min())
    time_s = floor_s + (time_s - floor_s) * ratio
    tokens = batch * length
    chosen = (length >= 128) & ((tokens <= setting.device.max_batched_tokens) | (batch == 1))
    pairs = batch * length * (length + 1) / 2.0
    part = samples(setting.model.layers * time_s, prefill=tokens, attention=pairs)
    return part.where(chosen)


def fit_prefill(setting: Setting) -> FitResult:
    """Prefill attention per token and per pair; the floor is fitted too but belongs to the decode part."""
    free = ["base_s", "per_prefill_token_s", "per_prefill_attention_s"]
    return fit_step_model(prefill_samples(setting), start=LINEAR, free=free)


def assemble(dense: StepModel, attention: StepModel, prefill: StepModel) -> StepModel:
    """The step model of the three parts together."""
    return replace(
        attention,
        base_s=dense.base_s + attention.base_s,
        per_decode_s=dense.per_decode_s + attention.per_decode_s,
        per_prefill_token_s=dense.per_prefill_token_s + prefill.per_prefill_token_s,
        per_prefill_attention_s=prefill.per_prefill_attention_s,
        dense_knee_tokens=dense.dense_knee_tokens,
        per_dense_token_s=dense.per_dense_token_s,
        experts_s=dense.experts_s,
        expert_miss=dense.expert_miss,
    )


def composed_steps(setting: Setting) -> StepSamples:
    """
    Whole steps composed from the tables: decode batches beyond the L2 cache, prompts in one step, and prompts with 32
    decoding requests.

    Sums of measured (or, for derived parts, derived) components; no whole step was measured.
    """
    overhead = STEP_OVERHEAD_S
    large, _ = attention_samples(setting)
    n = large.n_decode
    decode_s = large.step_s + layers_s(setting, n) + logits_s(setting, n) + overhead + REQUEST_OVERHEAD_S * n
    decode = samples(decode_s, n_decode=n, kv=large.kv_tokens, kv_max=large.kv_tokens_max)
    prompts = prefill_samples(setting)
    prompts = prompts.where(prompts.prefill_tokens <= setting.device.max_batched_tokens)
    tokens = prompts.prefill_tokens
    prompt_s = prompts.step_s + layers_s(setting, tokens) + logits_s(setting, np.ones_like(tokens)) + overhead
    prompt = samples(prompt_s, prefill=tokens, attention=prompts.prefill_attention_tokens)
    return StepSamples(*(np.concatenate([getattr(decode, c), getattr(prompt, c)]) for c in decode.__slots__))

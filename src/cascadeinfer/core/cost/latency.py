"""
Step time of an instance from the features of its batch.

    tokens      = n_decode + prefill_tokens
    dense_s     = per_dense_token * max(0, tokens - dense_knee) + experts * (1 - expert_miss ** tokens)
    balanced_s  = per_kv_token * kv_sum                     all KV bytes at the bandwidth of the whole device
    straggler_s = straggler_per_kv_token * kv_max / splits  the longest piece at the bandwidth of one thread block
    attention_s = max(balanced_s, straggler_s) + overlap * min(balanced_s, straggler_s) + split [if the backend splits]
    step_s      = base + per_decode * n_decode + attention_s + dense_s
                  + per_prefill_token * prefill_tokens + per_prefill_attention * prefill_attention

*Dense layers.* Up to `dense_knee` tokens a matrix product costs the read of its weights, whatever the number of tokens
(that read is in `base`); above it each token costs compute. A mixture of experts reads only the experts its tokens
pick: with uniform routing, all tokens miss an expert with probability `expert_miss ** tokens`.

*Mixed lengths.* An attention kernel cuts a request's KV into `splits` pieces by the rules of its backend
(`splitkv.py`); no piece can be read faster than one thread block reads. The rules reduce to three numbers
(`heterogeneity.py` derives them and measures the reduction against the thread-block simulation):

    splits = 1                                             n_decode >= split_until_requests or kv_max <= split_above
           = clamp(slots / n_decode, 1, split_cap)         one split count for the batch (trtllm-gen)
           = the least count whose waves are nearly full   the same, as FA2 rounds it (`split_efficiency` > 0)
           = clamp(slots * kv_max / kv_sum, 1, split_cap)  one piece size for the batch (FA3, FlashInfer)
    slots  = split_slots - split_slots_per_request * (n_decode - 1)

With one piece size and a budget of pieces (FlashInfer), each of the other requests also takes one piece, however short:
`splits <= split_slots - 2 * split_slots_per_request * (n_decode - 1)`.

A kernel that takes requests in batch order needs a last, partial wave once the batch exceeds `wave_requests`. With
`alike = kv_sum / (n_decode * kv_max)` (1 for equal lengths) and `waves = n_decode / wave_requests`:

    overlap     = overlap_max * (1 - alike) * (1 - 1 / waves)  (the longest request starts at a random moment)
    balanced_s += alike ** 2 * max(0, straggler_s - (waves - floor(waves)) * wave_requests * per_kv_token * kv_max)

The second line is the time that a last wave of equal pieces takes beyond its share of the bandwidth (measured on A100:
32 requests x 8 heads = 1.19 waves take 1.26 times as long as 16 or 64 requests of the same total).

*Mixed steps.* FlashAttention and Triton compute prompt chunks and decoding requests in one call, whose thread blocks
share the device (`varlen.py`). If there are prompt tokens and more than `mixed_split_tokens` tokens in all, then

    work_s       = max(per_kv_token, mixed_share_per_request * straggler_per_kv_token) * kv_sum
                   + per_prefill_attention * prefill_attention
    splits       = 1                                             prefill_tokens >= 0.8 * mixed_fill_tokens
                 = min(as above, the least count with which the prompt's blocks nearly fill `mixed_fill_tokens`)
    attention_s  = max(work_s, straggler_s) + mixed_overlap * (1 - alike) * min(work_s, straggler_s) + split [if split]

takes the place of `attention_s` and of the prompt's attention in `step_s`: the two hide behind the longest request, or
hide it. Up to `mixed_split_tokens`, and where a backend has separate calls, they add up. `mixed_share_per_request` is
the share of the running thread blocks that one request takes: if its query heads have a block each, the KV is limited
by the blocks rather than by the bandwidth.

Engines run layers one after another, so that reading KV and computing prompts take turns. `mixed_hidden` is for the
question what if they did not: this share of the shorter of (decodes' attention, prompts' part of the step) is left out.

With only the first six coefficients the model is linear except for the straggler. `step_time_s` is the compiled form,
called by the simulator for every step and by the planner for every bucket; the order of `StepModel`'s fields is the
order of its coefficients. After editing this file, delete the numba caches (`*.nbi`) of its callers: numba checks only
the caller's own file.
"""

import math
from dataclasses import dataclass, fields
from typing import Final

import numpy as np
from numba import njit
from numpy.typing import NDArray

from cascadeinfer.core.cost.splitkv import FULL_SHARE, MIN_EFFICIENCY


@dataclass(frozen=True, slots=True)
class BatchFeatures:
    """
    The features of a batch that determine a step's cost.

    Attributes:
        n_decode: Requests that decode one token.
        decode_kv_tokens: Sum of their lengths.
        decode_kv_tokens_max: The longest of them.
        prefill_tokens: Prompt tokens computed in this step, all chunks together.
        prefill_attention_tokens: Sum over those tokens of the context each attends to: a chunk of c tokens after s
            computed ones adds c * s + c * (c + 1) / 2.
    """

    n_decode: int
    decode_kv_tokens: int
    decode_kv_tokens_max: int
    prefill_tokens: int = 0
    prefill_attention_tokens: float = 0.0


SEPARATE_CALLS_TOKENS = 1e9
"""`mixed_split_tokens` of a backend that decodes in a call of its own, and of profiles that say nothing of it."""

MAX_WAVES = 16
"""Waves tried for a split count; from 16 on every count fills its last wave to 0.94 or more."""


@njit(cache=True)
def _filling(slots: float, n: float, efficiency: float) -> float:
    """The least count of pieces of each of `n` that fills the last of its waves of `slots` to this share."""
    for waves in range(1, MAX_WAVES + 1):
        fewest = math.ceil(waves * efficiency * slots / n)
        if fewest * n <= waves * slots:
            return float(fewest)
    return slots / n


@njit(cache=True)
def _splits(coefficients: NDArray[np.float64], n_decode: float, kv_tokens: float, kv_tokens_max: float) -> float:
    """Pieces of the longest request, >= 1; not rounded where the rule's rounding hardly matters."""
    lost = coefficients[12] * (n_decode - 1.0)
    slots = coefficients[11] - lost
    if coefficients[13] > 0.0:
        splits = min(slots * kv_tokens_max / kv_tokens, slots - lost)
        return float(max(1.0, min(splits, coefficients[15])))
    splits = _filling(slots, n_decode, coefficients[18]) if coefficients[18] > 0.0 else slots / n_decode
    return float(max(1.0, min(splits, coefficients[15])))


@njit(cache=True)
def _longest_piece_s(
    coefficients: NDArray[np.float64], n_decode: float, kv_tokens: float, kv_tokens_max: float, most: float
) -> tuple[float, float]:
    """Time to read the longest request's longest piece, of `most` at most, and to combine its pieces; in seconds."""
    straggler_s = coefficients[5] * kv_tokens_max
    if most > 1.0 and 0.0 < n_decode < coefficients[14] and kv_tokens_max > coefficients[19]:
        splits = min(_splits(coefficients, n_decode, kv_tokens, kv_tokens_max), most)
        if splits > 1.0:
            return straggler_s / splits, coefficients[10]
    return straggler_s, 0.0


@njit(cache=True)
def _own_call_s(coefficients: NDArray[np.float64], n_decode: float, kv_tokens: float, kv_tokens_max: float) -> float:
    """Time to read the decoding requests' KV in a call without prompts, in seconds."""
    balanced_s = coefficients[2] * kv_tokens
    straggler_s, split_s = _longest_piece_s(coefficients, n_decode, kv_tokens, kv_tokens_max, math.inf)
    if coefficients[16] > 0.0 and n_decode > coefficients[17]:
        alike = kv_tokens / (n_decode * kv_tokens_max)
        hidden = 1.0
        if coefficients[17] > 0.0:
            waves = n_decode / coefficients[17]
            hidden = 1.0 - 1.0 / waves
            last = waves - math.floor(waves)
            if last > 0.0:
                idle = max(0.0, straggler_s - last * coefficients[17] * coefficients[2] * kv_tokens_max)
                balanced_s += alike * alike * idle
        overlap = coefficients[16] * (1.0 - alike) * hidden
        return float(max(balanced_s, straggler_s) + overlap * min(balanced_s, straggler_s) + split_s)
    return float(max(balanced_s, straggler_s) + split_s)


@njit(cache=True)
def _mixed_call_s(
    coefficients: NDArray[np.float64],
    n_decode: float,
    kv_tokens: float,
    kv_tokens_max: float,
    prefill_tokens: float,
    prefill_s: float,
) -> float:
    """Time of one call for decoding requests and prompt chunks, whose own attention takes `prefill_s`; in seconds."""
    work_s = max(coefficients[2], coefficients[22] * coefficients[5]) * kv_tokens + prefill_s
    fill = coefficients[21]
    most = _filling(fill, prefill_tokens, MIN_EFFICIENCY) if prefill_tokens < FULL_SHARE * fill else 1.0
    straggler_s, split_s = _longest_piece_s(coefficients, n_decode, kv_tokens, kv_tokens_max, most)
    overlap = coefficients[23] * (1.0 - kv_tokens / (n_decode * kv_tokens_max))
    return float(max(work_s, straggler_s) + overlap * min(work_s, straggler_s) + split_s)


@njit(cache=True)
def dense_layers_s(coefficients: NDArray[np.float64], tokens: float) -> float:
    """Time that the dense layers take for so many tokens beyond the read of their weights, in seconds."""
    dense_s = coefficients[7] * max(0.0, tokens - coefficients[6])
    if coefficients[8] > 0.0:
        dense_s += coefficients[8] * (1.0 - coefficients[9] ** tokens)
    return float(dense_s)


@njit(cache=True)
def decode_attention_s(
    coefficients: NDArray[np.float64],
    n_decode: float,
    kv_tokens: float,
    kv_tokens_max: float,
    prefill_tokens: float,
    prefill_attention_tokens: float,
) -> float:
    """
    Time that attention takes because requests decode, in seconds: beyond the prompt chunks' own attention, without the
    launch floor and the work per request.
    """
    if n_decode <= 0.0 or prefill_tokens <= 0.0 or kv_tokens_max <= 0.0:
        return _own_call_s(coefficients, n_decode, kv_tokens, kv_tokens_max)
    prefill_s = coefficients[4] * prefill_attention_tokens
    tokens = n_decode + prefill_tokens
    if tokens > coefficients[20]:
        call_s = _mixed_call_s(coefficients, n_decode, kv_tokens, kv_tokens_max, prefill_tokens, prefill_s)
        added_s = call_s - prefill_s
    else:
        added_s = _own_call_s(coefficients, n_decode, kv_tokens, kv_tokens_max)
    if coefficients[24] > 0.0:
        dense_s = dense_layers_s(coefficients, tokens) - dense_layers_s(coefficients, n_decode)
        added_s -= coefficients[24] * min(added_s, dense_s + coefficients[3] * prefill_tokens + prefill_s)
    return float(added_s)


@njit(cache=True)
def step_time_s(
    coefficients: NDArray[np.float64],
    n_decode: float,
    kv_tokens: float,
    kv_tokens_max: float,
    prefill_tokens: float,
    prefill_attention_tokens: float,
) -> float:
    """Step time in seconds; `coefficients` as from `StepModel.coefficients`."""
    return float(
        coefficients[0]
        + coefficients[1] * n_decode
        + decode_attention_s(coefficients, n_decode, kv_tokens, kv_tokens_max, prefill_tokens, prefill_attention_tokens)
        + dense_layers_s(coefficients, n_decode + prefill_tokens)
        + coefficients[3] * prefill_tokens
        + coefficients[4] * prefill_attention_tokens
    )


@dataclass(frozen=True, slots=True)
class StepModel:
    """
    Coefficients of the step time, all >= 0. Fields that end in `_s` are seconds. Always build it by keyword.

    Attributes:
        base_s: An empty step: weights, launch and CPU overhead.
        per_decode_s: Each decoding request, excluding its KV.
        per_kv_token_s: Each token of KV cache read by a decoding request.
        per_prefill_token_s: Each prompt token computed, excluding the dense layers' compute above the knee.
        per_prefill_attention_s: Each (token, context token) pair of prefill attention.
        straggler_per_kv_token_s: Each token of the longest decoding request when one thread block per head reads it.
        dense_knee_tokens: Tokens in a step that ride along with the read of the weights.
        per_dense_token_s: Each token, decode or prefill, beyond the knee.
        experts_s: Read of all experts' weights (mixture of experts; else 0).
        expert_miss: Probability that one token does not pick a given expert.
        split_s: Combining the pieces, if the backend splits.
        split_slots: Pieces that the backend spreads over the requests of a batch.
        split_slots_per_request: Slots lost per further request to rounding up (half a piece on average).
        split_by_share: 1: pieces of one size (a request gets pieces by its share of the KV); 0: one split count for the
            batch.
        split_until_requests: From this many requests on nothing is split. 0: never split.
        split_cap: Most pieces of one request.
        overlap_max: Share of the shorter of (balanced, straggler) that the longer does not hide in a large batch.
        wave_requests: Requests that run at once; no overlap up to here.
        split_efficiency: How full the last wave of a split count has to be; 0: counts are not rounded.
        split_above_tokens: Requests up to this length are never split.
        mixed_split_tokens: Tokens of a step with prompts up to which decoding requests are split as they are alone.
            `SEPARATE_CALLS_TOKENS`: always.
        mixed_fill_tokens: Prompt tokens whose thread blocks fill the device; beside 0.8 of them or more no decoding
            request is split in larger steps. 0: beside none.
        mixed_share_per_request: Share of the thread blocks that run at once which each decoding request takes there; 0
            where blocks do not limit the reading of KV.
        mixed_overlap: Share of the shorter of (work, straggler) that the longer does not hide there.
        mixed_hidden: Share of the shorter of (decodes' attention, prompts' part of the step) that the longer hides; 0
            where layers run one after another.
    """

    base_s: float
    per_decode_s: float
    per_kv_token_s: float
    per_prefill_token_s: float
    per_prefill_attention_s: float
    straggler_per_kv_token_s: float = 0.0
    dense_knee_tokens: float = 0.0
    per_dense_token_s: float = 0.0
    experts_s: float = 0.0
    expert_miss: float = 0.0
    split_s: float = 0.0
    split_slots: float = 0.0
    split_slots_per_request: float = 0.0
    split_by_share: float = 0.0
    split_until_requests: float = 0.0
    split_cap: float = 1.0
    overlap_max: float = 0.0
    wave_requests: float = 0.0
    split_efficiency: float = 0.0
    split_above_tokens: float = 0.0
    mixed_split_tokens: float = SEPARATE_CALLS_TOKENS
    mixed_fill_tokens: float = 0.0
    mixed_share_per_request: float = 0.0
    mixed_overlap: float = 0.0
    mixed_hidden: float = 0.0

    @property
    def compute_per_prefill_token_s(self) -> float:
        """Cost of a prompt token in a step that is already above the knee, excluding attention."""
        return self.per_prefill_token_s + self.per_dense_token_s

    def coefficients(self) -> NDArray[np.float64]:  # (25,)
        """The fields in order, as `step_time_s` takes them."""
        return np.array([getattr(self, name) for name in FIELDS], dtype=np.float64)

    def step_s(self, batch: BatchFeatures) -> float:
        """Predicted duration of a step with this batch in seconds."""
        predicted: float = step_time_s(
            self.coefficients(),
            batch.n_decode,
            batch.decode_kv_tokens,
            batch.decode_kv_tokens_max,
            batch.prefill_tokens,
            batch.prefill_attention_tokens,
        )
        return predicted


FIELDS: Final = tuple(field.name for field in fields(StepModel))
"""Coefficient names in the order of `StepModel.coefficients`."""

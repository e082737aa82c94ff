"""
Step time of an instance from the features of its batch.

    step_s = base + per_decode * n_decode + per_kv_token * kv_sum + per_prefill_token * prefill_tokens
             + per_prefill_attention * prefill_attention + straggler(n_decode, kv_sum, kv_max)

The straggler term is the price of mixed lengths: an attention backend that cannot split a long request over the whole GPU
needs at least `kv_max * straggler_per_kv_token` seconds for it, however idle the rest is.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BatchFeatures:
    """
    What a step's cost depends on.

    Attributes:
        n_decode: Requests that decode one token.
        decode_kv_tokens: Sum of their lengths.
        decode_kv_tokens_max: The longest of them.
        prefill_tokens: Prompt tokens computed in this step, all chunks together.
        prefill_attention_tokens: Sum over those tokens of the context each attends to: a chunk of c tokens after s computed
            ones adds c * s + c * (c + 1) / 2.

    """

    n_decode: int
    decode_kv_tokens: int
    decode_kv_tokens_max: int
    prefill_tokens: int = 0
    prefill_attention_tokens: float = 0.0

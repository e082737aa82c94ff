"""
Step time of an instance from the features of its batch.

    attention_s = max(per_kv_token * kv_sum, straggler_per_kv_token * kv_max)
    step_s = base + per_decode * n_decode + attention_s
             + per_prefill_token * prefill_tokens + per_prefill_attention * prefill_attention

The second arm of the maximum is the price of mixed lengths: an attention backend that cannot spread one long request over the
whole device needs at least `straggler_per_kv_token * kv_max` for it, however idle the rest is (zero: the backend does not care).
`step_time_s` is the compiled form, called by the simulator for every step and by the planner for every bucket.
"""

from dataclasses import astuple, dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray


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
    attention_s = max(coefficients[2] * kv_tokens, coefficients[5] * kv_tokens_max)
    return float(
        coefficients[0]
        + coefficients[1] * n_decode
        + attention_s
        + coefficients[3] * prefill_tokens
        + coefficients[4] * prefill_attention_tokens
    )


@dataclass(frozen=True, slots=True)
class StepModel:
    """
    Coefficients of the step time, all in seconds and >= 0.

    Attributes:
        base_s: A step with nothing in it: weights, launch and CPU overhead.
        per_decode_s: Each decoding request.
        per_kv_token_s: Each token of KV cache read by a decoding request.
        per_prefill_token_s: Each prompt token computed.
        per_prefill_attention_s: Each (token, context token) pair of prefill attention.
        straggler_per_kv_token_s: Each token of the longest decoding request, when it cannot be spread over the device.
    """

    base_s: float
    per_decode_s: float
    per_kv_token_s: float
    per_prefill_token_s: float
    per_prefill_attention_s: float
    straggler_per_kv_token_s: float = 0.0

    def coefficients(self) -> NDArray[np.float64]:  # (6,)
        """The fields in order, as `step_time_s` takes them."""
        return np.asarray(astuple(self), dtype=np.float64)

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

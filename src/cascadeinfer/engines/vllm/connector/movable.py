"""
Whether an engine's requests can migrate at all, judged by its configuration and KV cache.

A pull copies the blocks of N-1 consecutive tokens of one group. That is right for plain and multi-head latent
attention, where a request's blocks hold the KV of all its tokens in order. vLLM's own checks go by the names of its
connectors and do not cover ours.
"""

from collections.abc import Sequence

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec, MLAAttentionSpec

MOVABLE_SPECS = (FullAttentionSpec, MLAAttentionSpec)
"""Exactly these: subclasses drop blocks in the middle, add sinks in front or hold something else than KV."""


def why_not_movable(vllm_config: VllmConfig, groups: Sequence[KVCacheGroupSpec]) -> str | None:
    """
    Why running requests cannot move between engines of this kind, in words for the operator; None: they can.

    Args:
        vllm_config: Of the engine.
        groups: Of its KV cache.
    """
    parallel = vllm_config.parallel_config
    reasons = (
        (len(groups) != 1, "its layers need KV caches of several kinds"),
        (vllm_config.speculative_config is not None, "speculative decoding"),
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism"),
        (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
            "context parallelism",
        ),
    )
    for applies, reason in reasons:
        if applies:
            return reason
    spec = groups[0].kv_cache_spec
    if not isinstance(spec, FullAttentionSpec) or type(spec) not in MOVABLE_SPECS:
        return f"KV cache of the kind {type(spec).__name__}"
    non_causal = spec.non_causal or (isinstance(spec, MLAAttentionSpec) and spec.non_causal_multi_token_decode)
    if non_causal:
        return "attention that is not causal"
    return None if spec.tokens_per_state == 1 else "KV states that each cover several tokens"

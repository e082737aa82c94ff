"""
Whether an engine's requests can migrate at all, judged by its configuration and KV cache.

A pull copies the blocks of N-1 consecutive tokens of one group. That is right for plain and multi-head latent
attention, where a request's blocks hold the KV of all its tokens in order. vLLM's own checks go by the names of its
connectors and do not cover ours.

Models that mix sliding windows with full attention have a group of each kind, and are refused. With
`--disable-hybrid-kv-cache-manager` vLLM keeps the blocks of all tokens for their windows as well, in one group: then
they can migrate, and need more memory.
"""

from collections.abc import Sequence

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheGroupSpec,
    MLAAttentionSpec,
    SparseCacheRole,
    iter_layer_specs,
)

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
        (not groups, "it keeps no KV cache"),
        (len(groups) > 1, "its layers need KV caches of several kinds"),
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
    # Layers that differ in size only share a group and keep their specifications.
    refusals = (_why_not_of(spec) for spec in iter_layer_specs(groups[0].kv_cache_spec))
    return next((refusal for refusal in refusals if refusal is not None), None)


def _why_not_of(spec: object) -> str | None:
    """Why a layer's KV cache cannot be pulled."""
    if not isinstance(spec, FullAttentionSpec) or type(spec) not in MOVABLE_SPECS:
        return f"KV cache of the kind {type(spec).__name__}"
    is_latent = isinstance(spec, MLAAttentionSpec)
    if is_latent and spec.cache_role is not SparseCacheRole.SPARSE:
        return "the cache of a sparse attention's indexer"
    if spec.non_causal or (is_latent and spec.non_causal_multi_token_decode):
        return "attention that is not causal"
    return None if spec.tokens_per_state == 1 else "KV states that each cover several tokens"

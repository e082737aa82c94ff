"""
Which engines' requests may move: only those with plain or latent attention over one KV cache group.

Groups are what vLLM itself makes of the layers' specifications (`get_kv_cache_groups`), for shapes that cannot run on a
CPU as well. `tests/engine/test_models.py` runs those that can.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.core.kv_cache_utils import get_kv_cache_groups
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheGroupSpec,
    KVCacheLayout,
    MambaSpec,
    MLAAttentionSpec,
    RSWASpec,
    SinkFullAttentionSpec,
    SlidingWindowSpec,
    SparseCacheRole,
    UniformTypeKVCacheSpecs,
)

from cascadeinfer.engines.vllm.connector.identity import kv_bytes_per_token
from cascadeinfer.engines.vllm.connector.movable import why_not_movable

ATTENTION: dict[str, Any] = {"block_size": 16, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
FULL = FullAttentionSpec(**ATTENTION)


def config(*, speculative: object = None, **sizes: int) -> Any:
    """The part of a `VllmConfig` that is read."""
    parallel = {
        "pipeline_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
    }
    return SimpleNamespace(speculative_config=speculative, parallel_config=SimpleNamespace(**{**parallel, **sizes}))


def groups(*specs: Any) -> list[KVCacheGroupSpec]:
    """One KV cache group per specification."""
    return [KVCacheGroupSpec([f"layer{number}"], spec) for number, spec in enumerate(specs)]


@pytest.mark.parametrize(
    "spec", [FULL, FullAttentionSpec(**ATTENTION, sliding_window=64), MLAAttentionSpec(**ATTENTION)]
)
def test_moves(spec: Any) -> None:
    """Full attention, sliding windows kept as full attention, and multi-head latent attention can move."""
    assert why_not_movable(config(), groups(spec)) is None


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        (RSWASpec(**ATTENTION, rswa_window=64), "RSWASpec"),
        (SinkFullAttentionSpec(**ATTENTION, sink_len=4), "SinkFullAttentionSpec"),
        (SlidingWindowSpec(**ATTENTION, sliding_window=64), "SlidingWindowSpec"),
        (MambaSpec(block_size=16, shapes=((4, 4),), dtypes=(torch.float32,)), "MambaSpec"),
        (FullAttentionSpec(**ATTENTION, non_causal=True), "not causal"),
        (MLAAttentionSpec(**ATTENTION, tokens_per_state=4), "several tokens"),
        (MLAAttentionSpec(**ATTENTION, cache_role=SparseCacheRole.INDEXER), "indexer"),
    ],
)
def test_other_caches_stay(spec: Any, word: str) -> None:
    """Blocks dropped in the middle, attention sinks, windows and recurrent states: named, and not moved."""
    assert word in (why_not_movable(config(), groups(spec)) or "")


@pytest.mark.parametrize(
    ("vllm_config", "word"),
    [
        (config(speculative=object()), "speculative"),
        (config(pipeline_parallel_size=2), "pipeline"),
        (config(decode_context_parallel_size=2), "context"),
        (config(prefill_context_parallel_size=2), "context"),
    ],
)
def test_other_engines_stay(vllm_config: Any, word: str) -> None:
    """Engines that do more than plain decoding, or shard over ranks other than by tensor, cannot move requests."""
    assert word in (why_not_movable(vllm_config, groups(FULL)) or "")


def test_several_groups_stay() -> None:
    """Layers of two kinds have separate block tables; a model without a KV cache has nothing to pull."""
    assert "several kinds" in (why_not_movable(config(), groups(FULL, FULL)) or "")
    assert "no KV cache" in (why_not_movable(config(), []) or "")


WINDOWED = SlidingWindowSpec(**ATTENTION, sliding_window=64)
WIDE = FullAttentionSpec(**{**ATTENTION, "head_size": 64})
LATENT = MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=576, dtype=torch.float32)
INDEXER = MLAAttentionSpec(
    block_size=16, num_kv_heads=1, head_size=128, dtype=torch.float32, cache_role=SparseCacheRole.INDEXER
)


@pytest.mark.parametrize(
    ("layers", "by_default", "without_hybrid"),
    [
        pytest.param([FULL] * 4, None, None, id="full attention"),
        pytest.param([FULL, WIDE] * 2, None, None, id="full attention of two sizes"),
        pytest.param([WINDOWED, FULL] * 2, "several kinds", None, id="windows and full attention"),
        pytest.param([WINDOWED] * 4, "SlidingWindowSpec", "SlidingWindowSpec", id="windows only"),
        pytest.param([LATENT] * 4, None, None, id="latent attention"),
        pytest.param([LATENT, INDEXER] * 2, "indexer", "indexer", id="sparse latent attention"),
    ],
)
def test_models(layers: list[Any], by_default: str | None, without_hybrid: str | None) -> None:
    """
    Of the layers' kinds, and of whether vLLM keeps windows as full attention (`--disable-hybrid-kv-cache-manager`),
    depends whether requests can move.
    """
    for disabled, word in ((False, by_default), (True, without_hybrid)):
        specs = {f"layer{number}": spec for number, spec in enumerate(layers)}
        vllm_config: Any = SimpleNamespace(
            scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=disabled),
            attention_config=SimpleNamespace(hisparse_config=None),
            speculative_config=None,
            cache_config=SimpleNamespace(get_resolved_kv_cache_layout=lambda: KVCacheLayout.LBNHC),
        )
        why_not = why_not_movable(config(), get_kv_cache_groups(vllm_config, specs))
        assert (why_not is None) if word is None else (word in (why_not or ""))


def test_bytes_per_token_of_layers_of_two_sizes() -> None:
    """Layers that share a group and differ in size count once each; other layers count alike."""
    specs = {"layer0": FULL, "layer1": WIDE}
    mixed = KVCacheGroupSpec(list(specs), UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs=specs))
    alike = KVCacheGroupSpec(["layer0", "layer1"], FULL)
    vllm_config: Any = SimpleNamespace(parallel_config=SimpleNamespace(tensor_parallel_size=1))
    for group, head_sizes in ((mixed, 32 + 64), (alike, 32 + 32)):
        cache: Any = SimpleNamespace(kv_cache_groups=[group])
        assert kv_bytes_per_token(cache, vllm_config) == 2 * 2 * head_sizes * 4  # K and V, KV heads, float32

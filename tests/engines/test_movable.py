"""Which engines' requests may move: only those with plain or latent attention over one KV cache group."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheGroupSpec,
    MambaSpec,
    MLAAttentionSpec,
    RSWASpec,
    SinkFullAttentionSpec,
    SlidingWindowSpec,
)

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
    """Layers of two kinds have separate block tables."""
    assert "several kinds" in (why_not_movable(config(), groups(FULL, FULL)) or "")

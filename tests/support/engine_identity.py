"""An engine to compare profiles with: Llama-3.1-8B on one GPU. Tests change the fields they are about."""

from typing import Any

from msgspec.structs import replace

from cascadeinfer.core.cost.identity import EngineIdentity

_ENGINE = EngineIdentity(
    engine="vllm",
    engine_version="0.32.0",
    model="meta/llama",
    architecture="LlamaForCausalLM",
    layers=32,
    hidden_size=4096,
    query_heads=32,
    kv_heads=8,
    head_size=128,
    vocabulary=128_256,
    experts=0,
    dtype="bfloat16",
    kv_cache_dtype="auto",
    quantization="none",
    tensor_parallel=1,
    pipeline_parallel=1,
    device="NVIDIA H100",
    threads=0,
    attention_backend="FLASH_ATTN_3",
    eager=False,
    asynchronous=True,
)


def engine_identity(**changes: Any) -> EngineIdentity:
    """That engine, with these changes."""
    return replace(_ENGINE, **changes)

"""Which engines a profile is valid for."""

import msgspec
import pytest

from cascadeinfer.core.cost.identity import EngineIdentity, foreign, stale

ENGINE = EngineIdentity(
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


def test_the_same_engine_is_neither() -> None:
    """An engine's own profile is valid and current, under whatever name the model was loaded."""
    assert foreign(ENGINE, ENGINE) == stale(ENGINE, ENGINE) == ()
    assert foreign(ENGINE, msgspec.structs.replace(ENGINE, model="/models/llama")) == ()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architecture", "QwenForCausalLM"), ("layers", 80), ("hidden_size", 8192), ("kv_heads", 4), ("dtype", "float16"),
        ("kv_cache_dtype", "fp8"), ("quantization", "awq"), ("tensor_parallel", 2), ("device", "NVIDIA A100"),
        ("attention_backend", "FLASHINFER"), ("threads", 4), ("experts", 128), ("engine", "sglang"),
    ],
)  # fmt: skip
def test_another_engine_is_foreign(field: str, value: object) -> None:
    """Another model, number format, split, device or attention backend forbids the profile, and is named with both values."""
    (reason,) = foreign(ENGINE, msgspec.structs.replace(ENGINE, **{field: value}))
    assert reason == f"{field}: {getattr(ENGINE, field)} in the profile, {value} in the engine"


@pytest.mark.parametrize(("field", "value"), [("engine_version", "0.33.0"), ("eager", True), ("asynchronous", False)])
def test_another_release_is_stale(field: str, value: object) -> None:
    """Another release or way to run makes it doubtful, not forbidden."""
    other = msgspec.structs.replace(ENGINE, **{field: value})
    assert foreign(ENGINE, other) == ()
    assert stale(ENGINE, other)[0].startswith(f"{field}: ")

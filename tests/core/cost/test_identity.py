"""Which engines a profile is valid for."""

import pytest

from cascadeinfer.core.cost.identity import foreign, stale
from support.engine_identity import engine_identity

ENGINE = engine_identity()


def test_the_same_engine_is_neither() -> None:
    """An engine's own profile is valid and current, under whatever name the model was loaded."""
    assert foreign(ENGINE, ENGINE) == stale(ENGINE, ENGINE) == ()
    assert foreign(ENGINE, engine_identity(model="/models/llama")) == ()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architecture", "QwenForCausalLM"), ("layers", 80), ("hidden_size", 8192), ("kv_heads", 4),
        ("dtype", "float16"),
        ("kv_cache_dtype", "fp8"), ("quantization", "awq"), ("tensor_parallel", 2), ("device", "NVIDIA A100"),
        ("attention_backend", "FLASHINFER"), ("threads", 4), ("experts", 128), ("engine", "sglang"),
    ],
)  # fmt: skip
def test_another_engine_is_foreign(field: str, value: object) -> None:
    """Another model, number format, split, device or attention backend forbids the profile; both values are named."""
    (reason,) = foreign(ENGINE, engine_identity(**{field: value}))
    assert reason == f"{field}: {getattr(ENGINE, field)} in the profile, {value} in the engine"


@pytest.mark.parametrize(("field", "value"), [("engine_version", "0.33.0"), ("eager", True), ("asynchronous", False)])
def test_another_release_is_stale(field: str, value: object) -> None:
    """Another release or way to run makes the profile doubtful, not invalid."""
    other = engine_identity(**{field: value})
    assert foreign(ENGINE, other) == ()
    assert stale(ENGINE, other)[0].startswith(f"{field}: ")

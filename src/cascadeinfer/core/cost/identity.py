"""
What makes a measured profile valid for an engine: the same model, sizes, split and device.

A profile of another model is wrong by factors, not slightly, and nothing in a running system would show it. Every
measured profile therefore carries the identity of the engine it was measured on, and whoever loads one for a running
engine compares them: `foreign` names what forbids its use, `stale` what makes it doubtful.
"""

from typing import Annotated, Final

import msgspec

Count = Annotated[int, msgspec.Meta(ge=1)]
Text = Annotated[str, msgspec.Meta(min_length=1)]


class EngineIdentity(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """
    An engine, as far as its step times depend on it.

    Attributes:
        engine: The engine program, e.g. `vllm`.
        engine_version: Its release.
        model: The model as the operator names it: a repository, or the last part of a folder's path.
        architecture: The model's class.
        layers, hidden_size, query_heads, kv_heads, head_size, vocabulary: Sizes of the whole model.
        experts: Number of experts of a mixture of experts; else 0.
        dtype: Type of weights and activations.
        kv_cache_dtype: As the engine names it; `auto` means `dtype`.
        quantization: Quantization of the weights, or `none`.
        tensor_parallel, pipeline_parallel: Devices that share the model.
        device: Name of one device, or of the processor.
        threads: Processor threads that compute; 0 on an accelerator.
        attention_backend: As the engine names it.
        eager: Whether it runs without compilation and graphs.
        asynchronous: Whether the next step is scheduled while one runs.
    """

    engine: Text
    engine_version: Text
    model: Text
    architecture: Text
    layers: Count
    hidden_size: Count
    query_heads: Count
    kv_heads: Count
    head_size: Count
    vocabulary: Count
    experts: Annotated[int, msgspec.Meta(ge=0)]
    dtype: Text
    kv_cache_dtype: Text
    quantization: Text
    tensor_parallel: Count
    pipeline_parallel: Count
    device: Text
    threads: Annotated[int, msgspec.Meta(ge=0)]
    attention_backend: Text
    eager: bool
    asynchronous: bool


DOUBTFUL: Final = frozenset({"engine_version", "eager", "asynchronous"})
"""A difference here changes step times by a few per cent, not by factors."""

NAMES: Final = frozenset({"model"})
"""The same model has many names (a folder, a repository); its sizes identify it."""


def foreign(profile: EngineIdentity, engine: EngineIdentity) -> tuple[str, ...]:
    """Why a profile must not be used for an engine (`layers: 32 in the profile, 80 in the engine`); empty if it may."""
    return _differences(profile, engine, frozenset(profile.__struct_fields__) - DOUBTFUL - NAMES)


def stale(profile: EngineIdentity, engine: EngineIdentity) -> tuple[str, ...]:
    """Why a profile that may be used for an engine is doubtful; empty when it is not."""
    return _differences(profile, engine, DOUBTFUL)


def _differences(profile: EngineIdentity, engine: EngineIdentity, names: frozenset[str]) -> tuple[str, ...]:
    return tuple(
        f"{name}: {getattr(profile, name)} in the profile, {getattr(engine, name)} in the engine"
        for name in profile.__struct_fields__
        if name in names and getattr(profile, name) != getattr(engine, name)
    )

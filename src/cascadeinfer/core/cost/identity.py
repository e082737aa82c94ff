"""
What makes a measured profile valid for an engine: the same model, numbers, split and device.

A profile of another model is not slightly wrong but wrong by factors, and nothing in a running system would say so. Every measured profile
therefore carries the identity of the engine it was measured on, and whoever loads one for a running engine compares: `foreign` names
what forbids its use, `stale` what makes it doubtful.
"""

from typing import Annotated, Final

import msgspec

Count = Annotated[int, msgspec.Meta(ge=1)]
Text = Annotated[str, msgspec.Meta(min_length=1)]


class EngineIdentity(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """
    An engine, as far as its step times depend on it.

    Attributes:
        engine: Which program, e.g. `vllm`.
        engine_version: Its release.
        model: As the operator calls it: a repository, or the last part of a folder's path.
        architecture: The model's class.
        layers, hidden_size, query_heads, kv_heads, head_size, vocabulary: Of the whole model.
        experts: Of a mixture of experts; else 0.
        dtype: Of weights and activations.
        kv_cache_dtype: As the engine names it; `auto` is `dtype`.
        quantization: Of the weights, or `none`.
        tensor_parallel, pipeline_parallel: Devices that share the model.
        device: Name of one device, or of the processor.
        threads: Processor threads that compute; 0 on an accelerator.
        attention_backend: As the engine names it.
        eager: Without compilation and graphs.
        asynchronous: The next step is scheduled while one runs.
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
"""A difference here changes step times by percents, not by factors."""

NAMES: Final = frozenset({"model"})
"""The same model has many names (a folder, a repository); its sizes tell."""


def foreign(profile: EngineIdentity, engine: EngineIdentity) -> tuple[str, ...]:
    """Why a profile must not be used for an engine, e.g. `layers: 32 in the profile, 80 in the engine`; empty when it may."""
    return _differences(profile, engine, frozenset(profile.__struct_fields__) - DOUBTFUL - NAMES)


def stale(profile: EngineIdentity, engine: EngineIdentity) -> tuple[str, ...]:
    """What makes a profile that may be used doubtful for an engine."""
    return _differences(profile, engine, DOUBTFUL)


def _differences(profile: EngineIdentity, engine: EngineIdentity, names: frozenset[str]) -> tuple[str, ...]:
    return tuple(
        f"{name}: {getattr(profile, name)} in the profile, {getattr(engine, name)} in the engine"
        for name in profile.__struct_fields__
        if name in names and getattr(profile, name) != getattr(engine, name)
    )

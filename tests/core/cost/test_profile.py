"""Profile files: round trip, strictness, capacity from memory."""

import contextlib
import json
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeinfer.core.cost.latency import FIELDS, SEPARATE_CALLS_TOKENS, StepModel
from cascadeinfer.core.cost.profile import (
    LATER,
    SCHEMA_VERSION,
    CostProfile,
    FitError,
    Memory,
    Provenance,
    decode_profile,
    encode_profile,
    kv_capacity_blocks,
)
from cascadeinfer.core.errors import ProfileError
from cascadeinfer.core.types import InstanceCapacity

MEMORY = Memory(
    device_bytes=80 * 10**9,
    gpu_memory_utilization=0.9,
    reserved_bytes=2 * 10**9,
    weights_bytes=16_060_000_000,
    kv_bytes_per_token=131_072,
)
PROFILE = CostProfile(
    name="h100-toy",
    model="toy/model",
    device="toy device",
    backend="FlashAttention-3",
    tensor_parallel=1,
    step_model=StepModel(
        base_s=6e-3,
        per_decode_s=2e-5,
        per_kv_token_s=4.123456789012345e-8,
        per_prefill_token_s=2e-6,
        per_prefill_attention_s=2e-10,
    ),
    capacity=InstanceCapacity(
        kv_blocks=kv_capacity_blocks(MEMORY, tensor_parallel=1, block_size_tokens=16),
        block_size_tokens=16,
        max_num_seqs=256,
        max_batched_tokens=8192,
    ),
    kv_bytes_per_token=131_072,
    transfer_bytes_per_s=4e10,
    derived=False,
    coefficient_errors={"base_s": 1e-5},
    fit_errors=(FitError(part="all", samples=10, median=0.02, p90=0.05, bias=-0.01, measured=True),),
    memory=MEMORY,
    provenance=Provenance(command="a script", date="2026-11-23", sources=("a table",), notes=("an assumption",)),
)


def as_object() -> dict[str, Any]:
    """The file as plain objects, ready to be damaged."""
    parsed: dict[str, Any] = json.loads(encode_profile(PROFILE))
    return parsed


def decoded(content: dict[str, Any]) -> CostProfile:
    """Decode plain objects."""
    return decode_profile(json.dumps(content).encode(), origin="x.json")


def test_round_trip_is_exact() -> None:
    """What was encoded is decoded, each coefficient to the last bit."""
    assert decode_profile(encode_profile(PROFILE)) == PROFILE
    assert encode_profile(decode_profile(encode_profile(PROFILE))) == encode_profile(PROFILE)


@given(st.lists(st.floats(0, 1e3), min_size=len(FIELDS), max_size=len(FIELDS)))
def test_any_coefficients_survive(values: list[float]) -> None:
    """Any non-negative finite coefficients come back unchanged."""
    model = replace(StepModel(*values), base_s=values[0] + 1e-6)
    assert decode_profile(encode_profile(replace(PROFILE, step_model=model))).step_model == model


def test_transfer_time_follows_from_bytes() -> None:
    """4,096 tokens of 128 KiB at 40 GB/s take 13.4 ms."""
    assert PROFILE.transfer_s(4_096) == pytest.approx(4_096 * 131_072 / 4e10)


def test_capacity_is_what_memory_leaves() -> None:
    """Llama-3.1-8B on 80 GB at 0.9 with 2 GB reserved leaves 53.94 GB: 25,720 blocks of 16 tokens."""
    assert (
        kv_capacity_blocks(MEMORY, tensor_parallel=1, block_size_tokens=16) == int(53.94e9 // (131_072 * 16)) == 25_720
    )


def test_tensor_parallelism_pools_memory() -> None:
    """Two devices hold the weights once between them and have twice the room."""
    two = kv_capacity_blocks(MEMORY, tensor_parallel=2, block_size_tokens=16)
    assert two == int((2 * 70e9 - 16.06e9) // (131_072 * 16))


def test_weights_that_do_not_fit_are_an_error() -> None:
    """A 70B model on one 80 GB device has no capacity, and the error says how much it needs."""
    big = Memory(
        device_bytes=80 * 10**9,
        gpu_memory_utilization=0.9,
        reserved_bytes=0,
        weights_bytes=141_100_000_000,
        kv_bytes_per_token=327_680,
    )
    with pytest.raises(ProfileError, match=r"weights of 141\.1 GB leave no room for KV on 1 x 72\.0 GB"):
        kv_capacity_blocks(big, tensor_parallel=1, block_size_tokens=16)


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1])
def test_other_schema_versions_are_refused_before_anything_else(version: int) -> None:
    """A file of another version is refused for its version, whatever else it contains."""
    with pytest.raises(
        ProfileError, match=rf"x\.json: schema version {version}, this program reads 1 and {SCHEMA_VERSION}"
    ):
        decoded({"schema_version": version, "new_field": 1})


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("surprise",), 1, "surprise"),
        (("memory", "surprise"), 1, r"\$\.memory"),
        (("coefficients", "base_s", "surprise"), 1, r"\$\.coefficients"),
        (("coefficients", "per_token_s"), {"value": 1.0}, r"unknown \['per_token_s'\]"),
        (("coefficients", "base_s", "value"), -1.0, r"\$\.coefficients"),
        (("coefficients", "base_s", "value"), "6 ms", r"\$\.coefficients"),
        (("coefficients", "base_s", "value"), 0.0, "no step is free"),
        (("capacity", "kv_blocks"), 25_721, "kv_blocks is 25721, memory gives 25720"),
        (("capacity", "max_num_seqs"), 0, r"\$\.capacity\.max_num_seqs"),
        (("memory", "gpu_memory_utilization"), 1.5, r"\$\.memory\.gpu_memory_utilization"),
        (("tensor_parallel",), 1.5, r"\$\.tensor_parallel"),
        (("transfer_bytes_per_s",), 0.0, r"\$\.transfer_bytes_per_s"),
        (("name",), "../../etc/passwd", r"\$\.name"),
        (("provenance", "date"), "yesterday", r"\$\.provenance\.date"),
    ],
)
def test_wrong_values_are_refused_by_path(path: tuple[str, ...], value: object, message: str) -> None:
    """Each kind of wrong value is an error that says where the value is."""
    content = as_object()
    target = content
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(ProfileError, match=message):
        decoded(content)


def test_missing_coefficients_are_refused() -> None:
    """Every coefficient is written out; a file without one is not completed with a default."""
    content = as_object()
    del content["coefficients"]["split_slots"]
    with pytest.raises(ProfileError, match=r"missing \['split_slots'\]"):
        decoded(content)


def test_files_from_before_mixed_steps_load_without_a_rule() -> None:
    """A file without any coefficient of mixed steps is complete; one with some of them is not."""
    content = as_object()
    for name in LATER:
        del content["coefficients"][name]
    model = decoded(content).step_model
    assert model == replace(PROFILE.step_model, **{f.name: f.default for f in fields(StepModel) if f.name in LATER})
    assert model.mixed_split_tokens == SEPARATE_CALLS_TOKENS
    content["coefficients"]["mixed_overlap"] = {"value": 1.0}
    with pytest.raises(ProfileError, match=r"missing \['mixed_fill_tokens', 'mixed_hidden'"):
        decoded(content)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_non_finite_numbers_are_refused(number: str) -> None:
    """Neither the names of non-finite numbers nor a number that overflows are accepted."""
    raw = encode_profile(PROFILE).replace(b"4.123456789012345e-8", number.encode())
    assert number.encode() in raw
    with pytest.raises(ProfileError):
        decode_profile(raw)


@given(st.binary(max_size=200))
def test_garbage_is_a_profile_error(raw: bytes) -> None:
    """Bytes that are no profile raise ProfileError and nothing else."""
    with pytest.raises(ProfileError):
        decode_profile(raw)


@given(st.integers(0, 2_000), st.binary(min_size=1, max_size=3))
def test_damaged_files_never_crash(position: int, junk: bytes) -> None:
    """A file with a few bytes overwritten either decodes to a profile or raises ProfileError."""
    raw = bytearray(encode_profile(PROFILE))
    raw[position : position + len(junk)] = junk
    with contextlib.suppress(ProfileError):
        assert decode_profile(bytes(raw)).tensor_parallel >= 1


def test_deep_nesting_is_refused() -> None:
    """A file nested a million deep is an error, not a crash."""
    with pytest.raises(ProfileError):
        decode_profile(b'{"schema_version": ' + b"[" * 1_000_000)

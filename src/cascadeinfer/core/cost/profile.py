"""
The profile file: everything about one model on one device that a plan or a simulation needs.

JSON, one object, written by `tools/profiles/build_profiles.py` (shipped profiles) and by `cascadeinfer profile`
(measured ones). Decoding is strict: unknown fields, unknown or missing coefficients, non-finite or negative numbers,
another schema version, and a KV capacity that does not follow from the memory figures are refused with the path of the
offending value. Bump `SCHEMA_VERSION` with every change of meaning; `CostProfile` is what the rest of the project sees.

KV capacity is computed as in vLLM: what `gpu_memory_utilization` of the device leaves after weights and working memory,
in whole blocks; tensor parallelism splits weights and KV heads over its devices. A measured profile has the capacity
that the engine reported.

Version 2 adds the fields of a measured profile: the engine it is valid for, and how steps and transfers were measured.
Version 1 files have none of them and load unchanged. The coefficients of mixed steps (`LATER`) came after both: a file
without any of them says nothing about mixed steps, and a prompt's attention adds to that of decodes there, as it did.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Final

import msgspec

from cascadeinfer.core.cost.identity import EngineIdentity
from cascadeinfer.core.cost.latency import FIELDS, StepModel
from cascadeinfer.core.errors import ProfileError
from cascadeinfer.core.types import InstanceCapacity

SCHEMA_VERSION: Final = 2
READ_VERSIONS: Final = (1, 2)

LATER: Final = frozenset(name for name in FIELDS if name.startswith("mixed_"))
"""Coefficients that earlier files lack; all of them or none."""

Positive = Annotated[float, msgspec.Meta(gt=0.0)]
NotNegative = Annotated[float, msgspec.Meta(ge=0.0)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Text = Annotated[str, msgspec.Meta(min_length=1)]


class Coefficient(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """
    One coefficient of the step model.

    Attributes:
        std_error: Standard error of the fit in the same unit; None for structure (split rules) and derived values.
    """

    value: NotNegative
    std_error: NotNegative | None = None


class Memory(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """
    What the KV capacity follows from; sizes in bytes are per device, those of the model are for the whole model.

    Attributes:
        reserved_bytes: Working memory per device: context, communication buffers, activations, CUDA graphs.
    """

    device_bytes: Count
    gpu_memory_utilization: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)]
    reserved_bytes: Annotated[int, msgspec.Meta(ge=0)]
    weights_bytes: Count
    kv_bytes_per_token: Count


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The fields of `InstanceCapacity`."""

    kv_blocks: Count
    block_size_tokens: Count
    max_num_seqs: Count
    max_batched_tokens: Count


class FitError(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """
    Relative error of the model on samples: median and 90th percentile of the absolute error, median of the signed
    error.
    """

    part: Text
    samples: Count
    median: NotNegative
    p90: NotNegative
    bias: float
    measured: bool
    """False: the samples are derived or simulated, not measured on this device."""


class Measurement(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """
    How the steps were measured.

    Attributes:
        batches: Kinds of batch that were run.
        left_out: Kinds of batch that the engine could hold but that were skipped for lack of time.
        rounds: How often, at most, each kind was run.
        steps: Steps measured.
        outliers: Steps left out: far longer than others of the same batch (compilation, a disturbance).
        samples: Medians of like steps, which the coefficients are fitted to.
        measuring_s: Seconds of measuring, excluding the engine's start.
        step_share: Sum of the steps' seconds over the wall time in which they ran.
        max_decodes, max_kv_tokens, max_length_tokens, max_prefill_tokens: Largest values in a step; beyond them the
            model extrapolates.
    """

    batches: Count
    left_out: Annotated[int, msgspec.Meta(ge=0)]
    rounds: Count
    steps: Count
    outliers: Annotated[int, msgspec.Meta(ge=0)]
    samples: Count
    measuring_s: Positive
    step_share: Positive
    max_decodes: Annotated[int, msgspec.Meta(ge=0)]
    max_kv_tokens: Annotated[int, msgspec.Meta(ge=0)]
    max_length_tokens: Annotated[int, msgspec.Meta(ge=0)]
    max_prefill_tokens: Annotated[int, msgspec.Meta(ge=0)]


class TransferMeasurement(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """
    How the transfer of KV between two instances was measured.

    Attributes:
        pulls: Transfers measured.
        longest_tokens: Tokens of the longest transfer.
        fixed_s: Time of a transfer that does not depend on its size.
        spread: Half the interquartile range of the rate, as a share of the rate.
    """

    pulls: Count
    longest_tokens: Count
    fixed_s: NotNegative
    spread: NotNegative


class Provenance(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """
    Where the numbers come from.

    Attributes:
        command: The command that made the file.
        date: Day on which it was made, as passed in (ISO).
        sources: Data files and documents.
        notes: Each part that was not measured on this device, and each assumption.
    """

    command: Text
    date: Annotated[str, msgspec.Meta(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    sources: tuple[Text, ...]
    notes: tuple[Text, ...]


class ProfileFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The file as it is written."""

    schema_version: int
    name: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9.\-]*$")]
    model: Text
    device: Text
    backend: Text
    tensor_parallel: Count
    derived: bool
    coefficients: dict[str, Coefficient]
    capacity: Limits
    transfer_bytes_per_s: Positive
    fit_errors: tuple[FitError, ...]
    provenance: Provenance
    memory: Memory | None = None
    kv_bytes_per_token: Count | None = None
    engine: EngineIdentity | None = None
    measurement: Measurement | None = None
    transfer: TransferMeasurement | None = None


class _Versioned(msgspec.Struct):
    schema_version: int


@dataclass(frozen=True, slots=True)
class CostProfile:
    """
    One model on one device (or on `tensor_parallel` of them): cost of a step, capacity, transfer.

    Attributes:
        backend: Attention backend; its split rule is in the step model.
        capacity: Capacity of one instance.
        kv_bytes_per_token: Of the whole instance, all its devices together.
        transfer_bytes_per_s: Effective rate at which KV moves to another instance.
        derived: A main part was not measured on this device; `provenance.notes` says which.
        coefficient_errors: Standard errors of the fitted coefficients, in their units.
        memory: What the capacity follows from; None when the engine reported it.
        engine: The engine it was measured on; None if it was not measured on a running engine.
        measurement: How it was measured; None likewise.
        transfer: How transfers were measured; None if `transfer_bytes_per_s` is assumed.
    """

    name: str
    model: str
    device: str
    backend: str
    tensor_parallel: int
    step_model: StepModel
    capacity: InstanceCapacity
    kv_bytes_per_token: int
    transfer_bytes_per_s: float
    derived: bool
    coefficient_errors: dict[str, float]
    fit_errors: tuple[FitError, ...]
    memory: Memory | None
    provenance: Provenance
    engine: EngineIdentity | None = None
    measurement: Measurement | None = None
    transfer: TransferMeasurement | None = None

    def transfer_s(self, tokens: int) -> float:
        """Seconds to move the KV of this many tokens to another instance, undisturbed."""
        return tokens * self.kv_bytes_per_token / self.transfer_bytes_per_s


def kv_capacity_blocks(memory: Memory, *, tensor_parallel: int, block_size_tokens: int) -> int:
    """
    KV blocks of an instance.

    Raises:
        ProfileError: The weights leave no room for a block.
    """
    usable = memory.device_bytes * memory.gpu_memory_utilization - memory.reserved_bytes
    room = usable * tensor_parallel - memory.weights_bytes
    blocks = math.floor(room / (memory.kv_bytes_per_token * block_size_tokens))
    if blocks < 1:
        need = memory.weights_bytes / 1e9
        raise ProfileError(
            f"weights of {need:.1f} GB leave no room for KV on {tensor_parallel} x {usable / 1e9:.1f} GB"
        )
    return blocks


def decode_profile(raw: bytes, *, origin: str = "profile") -> CostProfile:
    """
    Read a profile file.

    Args:
        raw: The file's bytes.
        origin: What to call it in errors, e.g. its path.

    Raises:
        ProfileError: Not JSON, another schema version, or anything the module header says is refused.
    """
    try:
        version = msgspec.json.decode(raw, type=_Versioned).schema_version
        if version not in READ_VERSIONS:
            known = " and ".join(map(str, READ_VERSIONS))
            raise ProfileError(f"{origin}: schema version {version}, this program reads {known}")
        file = msgspec.json.decode(raw, type=ProfileFile)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ProfileError(f"{origin}: {error}") from None
    except RecursionError:
        raise ProfileError(f"{origin}: nested too deeply") from None
    return _checked(file, origin)


def _checked(file: ProfileFile, origin: str) -> CostProfile:
    needed = set(FIELDS) - (set() if LATER & set(file.coefficients) else LATER)
    unknown, missing = sorted(set(file.coefficients) - set(FIELDS)), sorted(needed - set(file.coefficients))
    if unknown or missing:
        raise ProfileError(f"{origin}: coefficients: unknown {unknown}, missing {missing}")
    numbers = {f"coefficients.{name}": c.value for name, c in file.coefficients.items()}
    numbers |= {f"coefficients.{name}.std_error": c.std_error or 0.0 for name, c in file.coefficients.items()}
    numbers |= {"transfer_bytes_per_s": file.transfer_bytes_per_s}
    numbers |= {f"fit_errors.{e.part}": e.median + e.p90 + e.bias for e in file.fit_errors}
    for path, number in numbers.items():
        if not math.isfinite(number):
            raise ProfileError(f"{origin}: {path} is not finite")
    if file.coefficients["base_s"].value <= 0.0:
        raise ProfileError(f"{origin}: coefficients.base_s is zero: no step is free")
    limits, parallel = file.capacity, file.tensor_parallel
    kv_bytes_per_token = _kv_bytes_per_token(file, origin)
    return CostProfile(
        name=file.name,
        model=file.model,
        device=file.device,
        backend=file.backend,
        tensor_parallel=parallel,
        step_model=StepModel(**{name: c.value for name, c in file.coefficients.items()}),
        capacity=InstanceCapacity(
            kv_blocks=limits.kv_blocks,
            block_size_tokens=limits.block_size_tokens,
            max_num_seqs=limits.max_num_seqs,
            max_batched_tokens=limits.max_batched_tokens,
        ),
        kv_bytes_per_token=kv_bytes_per_token,
        transfer_bytes_per_s=file.transfer_bytes_per_s,
        derived=file.derived,
        coefficient_errors={n: c.std_error for n, c in file.coefficients.items() if c.std_error is not None},
        fit_errors=file.fit_errors,
        memory=file.memory,
        provenance=file.provenance,
        engine=file.engine,
        measurement=file.measurement,
        transfer=file.transfer,
    )


def _kv_bytes_per_token(file: ProfileFile, origin: str) -> int:
    """
    Bytes of a token's KV; refuses a capacity that contradicts the memory figures, and a file with too few or too many
    fields.
    """
    measured = (file.engine, file.measurement, file.transfer, file.kv_bytes_per_token)
    if file.schema_version == 1 and any(part is not None for part in measured):
        raise ProfileError(f"{origin}: engine, measurement, transfer and kv_bytes_per_token came with schema version 2")
    if file.engine is not None and file.engine.tensor_parallel != file.tensor_parallel:
        raise ProfileError(f"{origin}: tensor_parallel is {file.tensor_parallel}, engine.tensor_parallel differs")
    if file.memory is None:
        if file.engine is None or file.kv_bytes_per_token is None:
            raise ProfileError(f"{origin}: without memory, engine and kv_bytes_per_token are needed")
        return file.kv_bytes_per_token
    if file.kv_bytes_per_token not in {None, file.memory.kv_bytes_per_token}:
        raise ProfileError(f"{origin}: kv_bytes_per_token differs from memory.kv_bytes_per_token")
    limits = file.capacity
    expected = kv_capacity_blocks(
        file.memory, tensor_parallel=file.tensor_parallel, block_size_tokens=limits.block_size_tokens
    )
    if limits.kv_blocks != expected:
        raise ProfileError(f"{origin}: capacity.kv_blocks is {limits.kv_blocks}, memory gives {expected}")
    return file.memory.kv_bytes_per_token


def encode_profile(profile: CostProfile) -> bytes:
    """The profile as a file, indented, with a final newline; `decode_profile` gives it back."""
    values = dict(zip(FIELDS, profile.step_model.coefficients().tolist(), strict=True))
    capacity = profile.capacity
    file = ProfileFile(
        schema_version=SCHEMA_VERSION,
        name=profile.name,
        model=profile.model,
        device=profile.device,
        backend=profile.backend,
        tensor_parallel=profile.tensor_parallel,
        derived=profile.derived,
        coefficients={
            name: Coefficient(value=value, std_error=profile.coefficient_errors.get(name))
            for name, value in values.items()
        },
        memory=profile.memory,
        capacity=Limits(
            kv_blocks=capacity.kv_blocks,
            block_size_tokens=capacity.block_size_tokens,
            max_num_seqs=capacity.max_num_seqs,
            max_batched_tokens=capacity.max_batched_tokens,
        ),
        transfer_bytes_per_s=profile.transfer_bytes_per_s,
        fit_errors=profile.fit_errors,
        provenance=profile.provenance,
        kv_bytes_per_token=None if profile.memory is not None else profile.kv_bytes_per_token,
        engine=profile.engine,
        measurement=profile.measurement,
        transfer=profile.transfer,
    )
    return msgspec.json.format(msgspec.json.encode(file), indent=2) + b"\n"

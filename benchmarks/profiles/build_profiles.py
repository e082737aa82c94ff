"""
Make the shipped profiles and docs/profiles.md from ../shared/data/gpu.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/profiles/build_profiles.py --date 2026-11-23

Prints one row of fit errors per profile. `catalogue.py` has the devices, models and assumptions, `measured.py` reads the tables,
`parts.py` composes and fits, `report.py` writes the page.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from catalogue import (
    BLOCK_SIZE_TOKENS,
    DEVICES,
    GPU_MEMORY_UTILIZATION,
    LONGEST_SERVED_TOKENS,
    MODELS,
    RESERVED_BYTES,
    Device,
    Model,
)
from parts import (
    Setting,
    assemble,
    attention_samples,
    composed_steps,
    dense_samples,
    fit_attention,
    fit_dense,
    fit_prefill,
    prefill_samples,
    simulates_attention,
)
from report import Row, mixed_batches, write_page

from cascadeinfer.core.cost.fit import FitResult, StepSamples, residuals
from cascadeinfer.core.cost.heterogeneity import reduce_kernel, reduction_error
from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.cost.profile import (
    CostProfile,
    FitError,
    Memory,
    Provenance,
    encode_profile,
    kv_capacity_blocks,
)
from cascadeinfer.core.errors import ProfileError
from cascadeinfer.core.types import InstanceCapacity

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "src" / "cascadeinfer" / "profiles"
COMMAND = "benchmarks/profiles/build_profiles.py"
DEVICE_OF = {device.name: device for device in DEVICES}
BACKENDS = {"fa2": "FlashAttention-2", "fa3": "FlashAttention-3", "trtllm-gen": "FlashInfer trtllm-gen"}


def memory_of(device: Device, model: Model) -> Memory:
    """What the KV capacity follows from."""
    return Memory(
        device_bytes=device.memory_bytes,
        gpu_memory_utilization=GPU_MEMORY_UTILIZATION,
        reserved_bytes=RESERVED_BYTES,
        weights_bytes=model.weights_bytes,
        kv_bytes_per_token=model.kv_bytes_per_token,
    )


def fitting_parallel(device: Device, model: Model) -> int:
    """The model's tensor-parallel degree, or the next power of two that leaves room for the longest request."""
    memory = memory_of(device, model)
    degree = model.tensor_parallel
    while True:
        try:
            blocks = kv_capacity_blocks(memory, tensor_parallel=degree, block_size_tokens=BLOCK_SIZE_TOKENS)
        except ProfileError:
            blocks = 0
        if blocks * BLOCK_SIZE_TOKENS >= LONGEST_SERVED_TOKENS:
            return degree
        degree *= 2


def setting_of(device: Device, model: Model) -> Setting:
    """Which tables a profile is made from."""
    source = DEVICE_OF[device.scaled_from] if device.scaled_from else device
    prefill = next(d for d in DEVICES if d.tables == (device.prefill_from or device.tables) and d.scaled_from is None)
    return Setting(model, device, fitting_parallel(device, model), source, prefill)


def error_of(part: str, model: StepModel, found: StepSamples, *, measured: bool) -> FitError:
    """Residuals of a model on samples as the profile records them."""
    every = residuals(model, found)[0]
    return FitError(
        part=part, samples=every.samples, median=every.median, p90=every.p90, bias=every.bias, measured=measured
    )


def fit_errors(setting: Setting, dense: FitResult, attention: FitResult, prefill: FitResult) -> tuple[FitError, ...]:
    """One error per part, and of whole composed steps."""
    own = setting.device.scaled_from is None
    own_dense = own and not setting.model.experts
    whole = assemble(dense.model, attention.model, prefill.model)
    return (
        error_of(
            "decode attention, equal lengths, KV > 1.5 L2",
            attention.model,
            attention_samples(setting)[0],
            measured=own and not simulates_attention(setting.device),
        ),
        error_of("dense layers and overhead", dense.model, dense_samples(setting), measured=own_dense),
        error_of(
            "prefill attention",
            prefill.model,
            prefill_samples(setting),
            measured=own and setting.device.prefill_from is None,
        ),
        error_of("whole step, composed of the parts", whole, composed_steps(setting), measured=False),
    )


def combined_errors(dense: FitResult, attention: FitResult, prefill: FitResult) -> dict[str, float]:
    """Standard errors of the sums: parts are independent, so they add in quadrature; the prefill part's floor is not used."""
    used = (dense.errors, attention.errors, {n: e for n, e in prefill.errors.items() if n != "base_s"})
    names = sorted({name for errors in used for name in errors})
    return {name: float(np.sqrt(sum(errors.get(name, 0.0) ** 2 for errors in used))) for name in names}


def notes_of(setting: Setting) -> tuple[str, ...]:
    """Assumptions and derived parts of a profile."""
    device, model, degree = setting.device, setting.model, setting.tensor_parallel
    notes = [
        "decode attention of mixed lengths: simulated from the backend's split rule, not measured",
        "step overhead 0.6 ms and 2 us per request: assumed, not measured",
        "no whole step was measured: the step is the sum of its measured or derived parts",
        f"KV transfer at {device.transfer_bytes_s / 1e9:.1f} GB/s per device: 80 % of one network card or PCIe link, assumed",
        *device.notes,
    ]
    if model.experts:
        notes.append("experts' products derived from the bytes of the experts picked and the device's dense rates")
    if degree > 1 and device.allreduce is None:
        notes.append("all-reduce over PCIe by the ring formula, not measured")
    if degree > model.tensor_parallel:
        notes.append(f"tensor parallel {degree}: the fewest devices that hold the weights and a 32K request")
    return tuple(notes)


def build(setting: Setting, date: str) -> CostProfile:
    """Fit one profile."""
    device, model, degree = setting.device, setting.model, setting.tensor_parallel
    dense, attention, prefill = fit_dense(setting), fit_attention(setting), fit_prefill(setting)
    memory = memory_of(device, model)
    tables = [f"aic_{kind}_{device.tables}" for kind in ("gemm_bf16", "decode_attn")]
    tables.append(f"aic_prefill_attn_{setting.prefill_source.tables}")
    if degree > 1 and device.allreduce:
        tables.append(f"aic_allreduce_{device.allreduce}")
    return CostProfile(
        name=f"{device.name}-{model.name}" + (f"-tp{degree}" if degree > 1 else ""),
        model=model.title,
        device=device.title,
        backend=BACKENDS[device.kernel.rule.value],
        tensor_parallel=degree,
        step_model=assemble(dense.model, attention.model, prefill.model),
        capacity=InstanceCapacity(
            kv_blocks=kv_capacity_blocks(memory, tensor_parallel=degree, block_size_tokens=BLOCK_SIZE_TOKENS),
            block_size_tokens=BLOCK_SIZE_TOKENS,
            max_num_seqs=device.max_num_seqs,
            max_batched_tokens=device.max_batched_tokens,
        ),
        kv_bytes_per_token=model.kv_bytes_per_token,
        transfer_bytes_per_s=device.transfer_bytes_s * degree,
        derived=device.scaled_from is not None or bool(model.experts) or device.prefill_from is not None,
        coefficient_errors=combined_errors(dense, attention, prefill),
        fit_errors=fit_errors(setting, dense, attention, prefill),
        memory=memory,
        provenance=Provenance(
            command=COMMAND,
            date=date,
            sources=tuple(f"shared/data/gpu/{table}.csv.gz" for table in tables),
            notes=notes_of(setting),
        ),
    )


def fast_form(setting: Setting, profile: CostProfile) -> StepModel:
    """The kernel's own reduction for all layers: what the profile's split structure is compared with."""
    whole = reduce_kernel(setting.device.kernel, kv_heads=setting.heads[1], layers=1)
    layers = setting.model.layers
    return replace(whole, per_kv_token_s=profile.step_model.per_kv_token_s / layers)


def main() -> None:
    """Build every profile and the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--date", required=True, help="day to note in the profiles, ISO")
    arguments = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    batches = mixed_batches(np.random.default_rng(1))
    table = []
    for device in DEVICES:
        for model in MODELS:
            setting = setting_of(device, model)
            profile = build(setting, arguments.date)
            (OUT / f"{profile.name}.json").write_bytes(encode_profile(profile))
            fits = [b for b in batches if b.sum() <= profile.capacity.kv_tokens and len(b) <= device.max_num_seqs]
            mixed = reduction_error(device.kernel, fits, kv_heads=setting.heads[1], model=fast_form(setting, profile))
            table.append(Row(profile, mixed))
            print(table[-1].line())
    write_page(ROOT / "docs" / "profiles.md", table, arguments.date)


if __name__ == "__main__":
    main()

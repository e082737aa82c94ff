"""
Make the shipped profiles and docs/profiles.md from ../shared/data/gpu.

    OMP_NUM_THREADS=1 .venv/bin/python tools/profiles/build_profiles.py --date 2026-11-23

Prints one row of fit errors per profile. `catalogue.py` has the devices, models and assumptions, `measured.py` reads
the tables, `parts.py` composes and fits, `report.py` writes the page.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from catalogue import (
    BLOCK_SIZE_TOKENS,
    DEVICES,
    GPU_MEMORY_UTILIZATION,
    LLAMA_2_70B,
    LONGEST_SERVED_TOKENS,
    MODELS,
    RESERVED_BYTES,
    Device,
    Model,
)
from measured import splitwise
from numpy.typing import NDArray
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
from report import Page, Row, mixed_batches

from cascadeinfer.core.cost.fit import FitResult, StepSamples, residuals
from cascadeinfer.core.cost.heterogeneity import (
    MixedError,
    MixedStep,
    ReductionError,
    mixed_reduction_error,
    reduction_error,
)
from cascadeinfer.core.cost.latency import FIELDS, BatchFeatures, StepModel
from cascadeinfer.core.cost.profile import (
    CostProfile,
    FitError,
    Memory,
    Provenance,
    encode_profile,
    kv_capacity_blocks,
)
from cascadeinfer.core.cost.splitkv import AttentionKernel, SplitRule
from cascadeinfer.core.cost.varlen import GRAPH_TOKENS, Chunk, Heads
from cascadeinfer.core.errors import ProfileError
from cascadeinfer.core.types import InstanceCapacity

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "src" / "cascadeinfer" / "profiles"
COMMAND = "tools/profiles/build_profiles.py"
DEVICE_OF = {device.name: device for device in DEVICES}
MOST_TOKENS = 1_000_000
"""Largest batch of the comparison of rules."""

MIXED_CHUNKS = {"small": (64, 256, 400), "large": (800, 2_048)}
"""Prompt tokens beside the batches of the comparison of mixed steps."""
COMPUTED_TOKENS = (0, 8_192)
"""Tokens of the same prompt computed before."""
BATCH_STRIDE = 4
"""Of the trace batches in that comparison."""

SPLITWISE_MEAN_OUTPUT_TOKENS = 64
"""splitwise_perf_model generates 128 tokens in most rows; its token time is their mean."""

BACKENDS = {"fa2": "FlashAttention-2", "fa3": "FlashAttention-3", "trtllm-gen": "FlashInfer trtllm-gen"}


def memory_of(device: Device, model: Model) -> Memory:
    """What determines the KV capacity."""
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
    """The tables that a profile is made from."""
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
    """Standard errors of the sums: parts are independent, so they add in quadrature, without the prefill floor."""
    used = (dense.errors, attention.errors, {n: e for n, e in prefill.errors.items() if n != "base_s"})
    names = sorted({name for errors in used for name in errors})
    return {name: float(np.sqrt(sum(errors.get(name, 0.0) ** 2 for errors in used))) for name in names}


def notes_of(setting: Setting) -> tuple[str, ...]:
    """Assumptions and derived parts of a profile."""
    device, model, degree = setting.device, setting.model, setting.tensor_parallel
    notes = [
        "decode attention of mixed lengths: simulated from the backend's split rule, not measured",
        "steps with prompts and decodes: simulated from the backend's attention call, not measured",
        "step overhead 0.6 ms and 2 us per request: assumed, not measured",
        "no whole step was measured: the step is the sum of its measured or derived parts",
        (
            f"KV transfer at {device.transfer_bytes_s / 1e9:.1f} GB/s per device: 80 % of one network card or PCIe "
            "link, assumed"
        ),
        *device.notes,
    ]
    if model.experts:
        notes.append("experts' products derived from the bytes of the experts picked and the device's dense rates")
    if degree > 1 and device.allreduce is None:
        notes.append("all-reduce over PCIe by the ring formula, not measured")
    if degree > model.tensor_parallel:
        notes.append(f"tensor parallel {degree}: the fewest devices that hold the weights and a 32K request")
    return tuple(notes)


def build(setting: Setting, date: str) -> tuple[CostProfile, StepModel]:
    """Fit one profile; also its attention part for one layer."""
    device, model, degree = setting.device, setting.model, setting.tensor_parallel
    dense, attention, prefill = fit_dense(setting), fit_attention(setting), fit_prefill(setting)
    memory = memory_of(device, model)
    tables = [f"aic_{kind}_{device.tables}" for kind in ("gemm_bf16", "decode_attn")]
    tables.append(f"aic_prefill_attn_{setting.prefill_source.tables}")
    if degree > 1 and device.allreduce:
        tables.append(f"aic_allreduce_{device.allreduce}")
    profile = CostProfile(
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
    per_layer = {name: getattr(attention.model, name) / model.layers for name in FIELDS if name.endswith("_s")}
    return profile, replace(attention.model, **per_layer)


def reductions(batches: list[NDArray[np.int64]]) -> list[tuple[str, int, ReductionError]]:
    """How closely each rule's fast form matches the simulation of the same kernel, by KV heads per device."""
    flashinfer = AttentionKernel(SplitRule.FLASHINFER_TENSOR_CORE, 132, 2, 3.15e12, 14e9, 11e-6, 5.5e-6, 1.2e-6)
    kernels = {
        "FA3, H100, cap 32": DEVICE_OF["h100"].kernel,
        "FA3, H100, cap 16": replace(DEVICE_OF["h100"].kernel, split_cap=16),
        "FA2, A100": DEVICE_OF["a100"].kernel,
        "FA2, L40S": DEVICE_OF["l40s"].kernel,
        "FlashInfer tensor-core, H100": flashinfer,
        "FlashInfer CUDA-core, H100": replace(flashinfer, rule=SplitRule.FLASHINFER_CUDA_CORE),
        "trtllm-gen, B200": DEVICE_OF["b200"].kernel,
    }
    fits = [batch for batch in batches if batch.sum() <= MOST_TOKENS]
    return [
        (name, kv_heads, reduction_error(kernel, fits, kv_heads=kv_heads))
        for name, kernel in kernels.items()
        for kv_heads in (8, 2, 1)
    ]


def mixed_reductions(
    batches: list[NDArray[np.int64]], profiles: list[CostProfile]
) -> list[tuple[str, Heads, str, MixedError]]:
    """The same for steps with prompts, whose attention takes what the profile of the 8B model on the device says."""
    calls = {
        "FA3, H100": ("h100", GRAPH_TOKENS),
        "FA3, H100, no graphs": ("h100", 0),
        "FA2, A100": ("a100", 0),
        "FA2, L40S": ("l40s", 0),
    }
    fits = [batch for batch in batches if batch.sum() <= MOST_TOKENS][::BATCH_STRIDE]
    found = []
    for name, (device, graph_tokens) in calls.items():
        profile = next(p for p in profiles if p.name == f"{device}-{MODELS[0].name}")
        pair_s = profile.step_model.per_prefill_attention_s / MODELS[0].layers / MODELS[0].q_heads
        for heads in (Heads(32, 8), Heads(16, 2), Heads(8, 1)):
            for kind, sizes in MIXED_CHUNKS.items():
                chunks = [Chunk(tokens, computed) for tokens in sizes for computed in COMPUTED_TOKENS]
                steps = [MixedStep(batch, (chunk,)) for batch in fits for chunk in chunks]
                error = mixed_reduction_error(
                    DEVICE_OF[device].kernel, steps, heads, pair_s=pair_s, graph_tokens=graph_tokens
                )
                found.append((name, heads, kind, error))
    return found


def whole_model_checks() -> list[str]:
    """Predicted against measured whole steps of Llama-2-70B (splitwise_perf_model), as table lines."""
    lines = []
    for name in ("a100", "h100"):
        device = DEVICE_OF[name]
        for degree in (2, 4, 8):
            setting = Setting(LLAMA_2_70B, device, degree, device, device)
            model = assemble(fit_dense(setting).model, fit_attention(setting).model, fit_prefill(setting).model)
            prompt, token = [], []
            for (length, batch), (prompt_s, token_s) in splitwise(f"{name}-80gb", degree).items():
                pairs = batch * length * (length + 1) / 2
                if length * batch <= device.max_batched_tokens:
                    prompt.append(prompt_s / model.step_s(BatchFeatures(0, 0, 0, length * batch, pairs)))
                kv = length + SPLITWISE_MEAN_OUTPUT_TOKENS
                token.append(token_s / model.step_s(BatchFeatures(batch, batch * kv, kv)))
            lines.append(
                f"| {name.upper()} | {degree} | {np.median(prompt):.2f} ({min(prompt):.2f}-{max(prompt):.2f}) "
                f"| {np.median(token):.2f} ({min(token):.2f}-{max(token):.2f}) |"
            )
    return lines


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
            profile, attention = build(setting, arguments.date)
            (OUT / f"{profile.name}.json").write_bytes(encode_profile(profile))
            fits = [b for b in batches if b.sum() <= profile.capacity.kv_tokens and len(b) <= device.max_num_seqs]
            mixed = reduction_error(device.kernel, fits, kv_heads=setting.heads[1], model=attention)
            table.append(Row(profile, mixed))
            print(table[-1].line())
    page = Page(
        arguments.date,
        f"{COMMAND} --date {arguments.date}",
        table,
        reductions(batches),
        mixed_reductions(batches, [row.profile for row in table]),
        whole_model_checks(),
    )
    (ROOT / "docs" / "profiles.md").write_text(page.text())


if __name__ == "__main__":
    main()

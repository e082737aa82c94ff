"""
Chooses the form of the step model, fits its coefficients, and determines its error on batches that it has not seen.

The candidates range from a straight line to the full model, which adds the knee of the dense layers and the straggler
of mixed lengths under the attention backend's split rule. How decodes are cut beside a prompt is never fitted: it is
the backend's rule in every candidate. Each is fitted five times, each time with another fifth of
the *kinds of batch* held out (not of the samples: two samples of one kind are nearly the same), and judged by its error
on those. A richer candidate must be clearly better. The profile's coefficients come from a final fit to all samples;
its errors are those on held-out batches.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cascadeinfer.core.cost.fit import FitResult, RegionError, StepSamples, fit_step_model, predict_s, regions_of
from cascadeinfer.core.cost.heterogeneity import mixed_rule, reduce_kernel
from cascadeinfer.core.cost.identity import EngineIdentity
from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.cost.splitkv import AttentionKernel, SplitRule
from cascadeinfer.core.cost.varlen import GRAPH_SPLITS, GRAPH_TOKENS, Heads
from cascadeinfer.core.errors import ProfileError
from cascadeinfer.profiling.statistics import Points

FOLDS: Final = 5
CLEARLY_BETTER: Final = 0.95
"""A richer model's held-out error must be below this share of the simpler one's."""
ERROR_CAP: Final = 0.5
"""Larger relative errors count as this much when models are compared, so that one wild sample does not decide."""
WILD_FACTOR: Final = 3.0
"""A single step that takes this many times the model's prediction is also an outlier."""

LINE: Final = ("base_s", "per_decode_s", "per_kv_token_s", "per_prefill_token_s", "per_prefill_attention_s")
KNEE: Final = ("dense_knee_tokens", "per_dense_token_s")
STRAGGLER: Final = ("straggler_per_kv_token_s",)

NOTHING: Final = StepModel(
    base_s=0.0, per_decode_s=0.0, per_kv_token_s=0.0, per_prefill_token_s=0.0, per_prefill_attention_s=0.0
)

TRITON_MIXED: Final = {"mixed_split_tokens": 0.0, "mixed_overlap": 1.0}
"""
vLLM's Triton kernel splits only batches without prompts, and takes one head after another
(`triton_unified_attention.py`: `use_3d`, `grid`).
"""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A form of the step model: the fixed part (the split rule) and the fitted parameters."""

    name: str
    start: StepModel
    free: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ProfileFit:
    """
    The chosen model.

    Attributes:
        form: Name of the candidate.
        held_out: Errors on batches that the fit had not seen: overall, then by region.
        predicted_s: For each sample, the prediction of the fit that had not seen it.
        samples: The samples it was fitted to.
        spread: For each sample, see `Points`.
        outliers: Number of single steps left out because they are far above the model.
    """

    form: str
    result: FitResult
    held_out: tuple[RegionError, ...]
    predicted_s: NDArray[np.float64]
    samples: StepSamples
    spread: NDArray[np.float64]
    outliers: int


def split_structure(identity: EngineIdentity, multiprocessors: int | None, graph_tokens: int) -> StepModel | None:
    """
    The split rule of the engine's attention, if known; its rates are left to the fit.

    Args:
        identity: The engine.
        multiprocessors: Streaming multiprocessors of a device; None on a processor.
        graph_tokens: Tokens of a step up to which the engine uses full CUDA graphs; 0 without.
    """
    kernel = _kernel_of(identity, multiprocessors, graph_tokens)
    if kernel is None:
        return None
    heads = _heads_of(identity)
    reduced = reduce_kernel(
        kernel, kv_heads=heads.kv, layers=identity.layers, query_heads=heads.query, graph_tokens=graph_tokens
    )
    return replace(reduced, base_s=0.0, per_decode_s=0.0, per_kv_token_s=0.0, split_s=0.0)


def mixed_rule_of(identity: EngineIdentity, multiprocessors: int | None, graph_tokens: int) -> dict[str, float]:
    """
    The coefficients of steps with prompts by the engine's attention backend; empty if it has separate calls, or is
    unknown. Arguments as for `split_structure`.
    """
    if identity.attention_backend == "TRITON_ATTN":
        return dict(TRITON_MIXED)
    kernel = _kernel_of(identity, multiprocessors, graph_tokens)
    return {} if kernel is None else mixed_rule(kernel, _heads_of(identity), graph_tokens=graph_tokens)


def graph_tokens_of(identity: EngineIdentity, told: int | None) -> int:
    """Tokens of a step up to which an engine uses full CUDA graphs: as it has told, else vLLM's default."""
    if identity.eager:
        return 0
    return GRAPH_TOKENS if told is None else told


def _heads_of(identity: EngineIdentity) -> Heads:
    """Attention heads of one device."""
    degree = identity.tensor_parallel
    kv_heads = max(1, identity.kv_heads // degree)
    return Heads(max(kv_heads, identity.query_heads // degree), kv_heads)


def _kernel_of(identity: EngineIdentity, multiprocessors: int | None, graph_tokens: int) -> AttentionKernel | None:
    """The engine's attention kernel with nominal rates; None on a processor, and if its rule is unknown."""
    rule = _rule_of(identity)
    if multiprocessors is None or rule is None:
        return None
    blocks = 1 if rule is SplitRule.FA3 else 2
    kernel = AttentionKernel(rule, multiprocessors, blocks, 1e12, 2e10, 1e-5, 1e-6, 1e-6)
    return replace(kernel, split_cap=GRAPH_SPLITS) if rule is SplitRule.FA3 and graph_tokens else kernel


def _rule_of(identity: EngineIdentity) -> SplitRule | None:
    match identity.attention_backend:
        case "FLASH_ATTN_2":
            return SplitRule.FA2
        case "FLASH_ATTN_3":
            return SplitRule.FA3
        case "FLASHINFER":
            return SplitRule.FLASHINFER_TENSOR_CORE
        case _:
            return None


def candidates(structure: StepModel | None, mixed: Mapping[str, float]) -> list[Candidate]:
    """The candidate forms, simplest first."""
    nothing = replace(NOTHING, **mixed)
    found = [
        Candidate("line", nothing, LINE),
        Candidate("line and knee", nothing, LINE + KNEE),
        Candidate("line and straggler", nothing, LINE + STRAGGLER),
        Candidate("line, knee and straggler", nothing, LINE + KNEE + STRAGGLER),
    ]
    if structure is not None:
        found += [
            Candidate("line and straggler, split", structure, LINE + STRAGGLER),
            Candidate("line, knee and straggler, split", structure, LINE + KNEE + STRAGGLER),
        ]
    return found


def fit_points(
    points: Points,
    structure: StepModel | None = None,
    *,
    mixed: Mapping[str, float] = MappingProxyType({}),
    seed: int = 0,
) -> ProfileFit:
    """
    Choose a form of the model and fit it.

    Args:
        points: The samples.
        structure: The backend's split rule (`split_structure`); None if unknown.
        mixed: The backend's rule for steps with prompts (`mixed_rule_of`).
        seed: Of the folds.

    Raises:
        ProfileError: The samples do not determine even the simplest form.
    """
    points, outliers = _without_wild(points)
    fold_of = _folds(points, np.random.default_rng(seed))
    best: tuple[float, Candidate, NDArray[np.float64]] | None = None
    refused = ""
    for candidate in candidates(structure, mixed):
        try:
            predicted_s = _held_out(candidate, points.samples, fold_of)
            fit_step_model(points.samples, start=candidate.start, free=candidate.free)
        except ProfileError as error:
            refused = refused or str(error)
            continue
        score = float(np.mean(np.minimum(np.abs(predicted_s / points.samples.step_s - 1.0), ERROR_CAP)))
        if best is None or score < CLEARLY_BETTER * best[0]:
            best = score, candidate, predicted_s
    if best is None:
        raise ProfileError(
            f"the steps measured do not make a profile: {refused} (raise --minutes and go on by --resume)"
        )
    _, chosen, predicted_s = best
    result = fit_step_model(points.samples, start=chosen.start, free=chosen.free)
    held_out = regions_of(points.samples, predicted_s)
    return ProfileFit(chosen.name, result, held_out, predicted_s, points.samples, points.spread, outliers)


def _folds(points: Points, rng: np.random.Generator) -> NDArray[np.int64]:
    """The fold of each sample, by kind of batch; each family's kinds are assigned to folds in turn."""
    fold_of_kind: dict[str, int] = {}
    kinds = sorted(set(points.kind_of))
    order = [kinds[i] for i in rng.permutation(len(kinds))]
    for number, kind in enumerate(sorted(order, key=lambda name: name.partition(" ")[0])):
        fold_of_kind[kind] = number % FOLDS
    return np.array([fold_of_kind[kind] for kind in points.kind_of], dtype=np.int64)


def _held_out(candidate: Candidate, samples: StepSamples, fold_of: NDArray[np.int64]) -> NDArray[np.float64]:
    """Each sample's prediction by the fit without its fold."""
    predicted_s = np.zeros(len(samples))
    for fold in range(FOLDS):
        held = fold_of == fold
        if held.any():
            model = fit_step_model(samples.where(~held), start=candidate.start, free=candidate.free).model
            predicted_s[held] = predict_s(model, samples.where(held))
    return predicted_s


def _without_wild(points: Points) -> tuple[Points, int]:
    """Drop single steps that a first, simple fit finds far too long."""
    single = points.counts == 1
    try:
        line = fit_step_model(points.samples, start=NOTHING, free=LINE).model
    except ProfileError:
        return points, 0
    wild = single & (points.samples.step_s > WILD_FACTOR * predict_s(line, points.samples))
    kept = ~wild
    left = replace(
        points,
        samples=points.samples.where(kept),
        kind_of=tuple(kind for kind, keep in zip(points.kind_of, kept, strict=True) if keep),
        counts=points.counts[kept],
        spread=points.spread[kept],
    )
    return left, int(wild.sum())

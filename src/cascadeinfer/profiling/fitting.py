"""
Chooses the form of the step model, fits its coefficients, and determines its error on batches that it has not seen.

The candidates range from a straight line to the full model, which adds the knee of the dense layers and the straggler
of mixed lengths under the attention backend's split rule. Each is fitted five times, each time with another fifth of
the *kinds of batch* held out (not of the samples: two samples of one kind are nearly the same), and judged by its error
on those. A richer candidate must be clearly better. The profile's coefficients come from a final fit to all samples;
its errors are those on held-out batches.
"""

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cascadeinfer.core.cost.fit import FitResult, RegionError, StepSamples, fit_step_model, predict_s, regions_of
from cascadeinfer.core.cost.heterogeneity import reduce_kernel
from cascadeinfer.core.cost.identity import EngineIdentity
from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.cost.splitkv import AttentionKernel, SplitRule
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


def split_structure(identity: EngineIdentity, multiprocessors: int | None) -> StepModel | None:
    """The split rule of the engine's attention, if known; its rates are left to the fit."""
    if multiprocessors is None:
        return None
    rule = _rule_of(identity)
    if rule is None:
        return None
    blocks = 1 if rule is SplitRule.FA3 else 2
    kernel = AttentionKernel(rule, multiprocessors, blocks, 1e12, 2e10, 1e-5, 1e-6, 1e-6)
    reduced = reduce_kernel(
        kernel, kv_heads=max(1, identity.kv_heads // identity.tensor_parallel), layers=identity.layers
    )
    return replace(reduced, base_s=0.0, per_decode_s=0.0, per_kv_token_s=0.0, split_s=0.0)


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


def candidates(structure: StepModel | None) -> list[Candidate]:
    """The candidate forms, simplest first."""
    found = [
        Candidate("line", NOTHING, LINE),
        Candidate("line and knee", NOTHING, LINE + KNEE),
        Candidate("line and straggler", NOTHING, LINE + STRAGGLER),
        Candidate("line, knee and straggler", NOTHING, LINE + KNEE + STRAGGLER),
    ]
    if structure is not None:
        found += [
            Candidate("line and straggler, split", structure, LINE + STRAGGLER),
            Candidate("line, knee and straggler, split", structure, LINE + KNEE + STRAGGLER),
        ]
    return found


def fit_points(points: Points, structure: StepModel | None = None, *, seed: int = 0) -> ProfileFit:
    """
    Choose a form of the model and fit it.

    Raises:
        ProfileError: The samples do not determine even the simplest form.
    """
    points, outliers = _without_wild(points)
    fold_of = _folds(points, np.random.default_rng(seed))
    best: tuple[float, Candidate, NDArray[np.float64]] | None = None
    refused = ""
    for candidate in candidates(structure):
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

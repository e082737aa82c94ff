"""Choosing and fitting the step model: split rules, noise, held-out errors, transfers."""

from dataclasses import replace

import msgspec
import numpy as np
import pytest
from profiled_engine import IDENTITY, TRUTH

from cascadeinfer.core.cost.fit import StepSamples
from cascadeinfer.core.cost.latency import BatchFeatures, StepModel
from cascadeinfer.profiling.fitting import candidates, fit_points, graph_tokens_of, mixed_rule_of, split_structure
from cascadeinfer.profiling.log import PullRun
from cascadeinfer.profiling.statistics import Points
from cascadeinfer.profiling.transfer import rate_of

H100 = msgspec.structs.replace(
    IDENTITY, attention_backend="FLASH_ATTN_3", device="NVIDIA H100", layers=32, query_heads=32, kv_heads=8
)
MULTIPROCESSORS = 132


def points(model: StepModel, noise: float, *, seed: int = 0, wild: int = 0) -> Points:
    """Samples of forty kinds of batch with noise; the first `wild` take ten times too long."""
    rng = np.random.default_rng(seed)
    batches: list[BatchFeatures] = []
    kinds: list[str] = []
    for n in (1, 4, 16, 64):
        for mean in (100, 1_000, 8_000):
            for stretch in (1, 1, 6):
                longest = min(mean * n, mean * stretch)
                batches.append(BatchFeatures(n, mean * n, longest))
                kinds.append(f"decode {n} {mean} {stretch}")
    for chunk in (16, 64, 256, 1024, 4096):
        for n, done in ((0, 0), (0, 8_000), (16, 0)):
            batches.append(BatchFeatures(n, 500 * n, 500 if n else 0, chunk, chunk * done + chunk * (chunk + 1) / 2))
            kinds.append(f"prompt {chunk} {n} {done}")
    seconds = np.array([model.step_s(b) for b in batches]) * (1 + noise * rng.standard_normal(len(batches)))
    seconds[:wild] *= 10.0
    samples = StepSamples.of(batches, seconds)
    ones = np.ones(len(samples), dtype=np.int64)
    return Points(samples, tuple(kinds), ones, np.zeros(len(samples)), len(samples), 0, None)


def test_held_out_error_is_the_noise() -> None:
    """With 3 % noise, the held-out error is about that of the noise: nothing is fitted away or added."""
    fit = fit_points(points(TRUTH, 0.03))
    assert fit.held_out[0].median == pytest.approx(0.67 * 0.03, rel=0.5)
    assert fit.result.model.base_s == pytest.approx(TRUTH.base_s, rel=0.1)


def test_wild_single_steps_are_left_out() -> None:
    """Single steps that take ten times too long are counted as outliers and do not change the model."""
    fit = fit_points(points(TRUTH, 0.01, wild=2))
    assert fit.outliers == 2
    assert fit.result.model.base_s == pytest.approx(TRUTH.base_s, rel=0.05)


def test_split_rule_of_the_backend_is_used() -> None:
    """On a device whose attention splits long requests, the form with its rule is chosen and fits mixed batches."""
    rule = split_structure(H100, MULTIPROCESSORS, 0)
    assert rule is not None
    truth = replace(
        rule,
        base_s=7e-3,
        per_decode_s=1e-5,
        per_kv_token_s=4e-8,
        per_prefill_token_s=2e-5,
        per_prefill_attention_s=2e-10,
        straggler_per_kv_token_s=1e-6,
    )
    fit = fit_points(points(truth, 0.002), rule)
    assert fit.form.endswith("split")
    assert fit.result.model.straggler_per_kv_token_s == pytest.approx(1e-6, rel=0.1)
    assert fit.held_out[0].median < 0.01


@pytest.mark.parametrize("backend", ["CPU_ATTN", "TRITON_ATTN", "FLASH_ATTN_4", "FLASH_ATTN"])
def test_unknown_rules_are_not_guessed(backend: str) -> None:
    """A backend whose split rule is unknown gets none, and neither does a CPU."""
    assert split_structure(msgspec.structs.replace(H100, attention_backend=backend), MULTIPROCESSORS, 512) is None
    assert split_structure(H100, None, 512) is None


@pytest.mark.parametrize(
    ("backend", "graph_tokens", "expected"),
    [
        ("FLASH_ATTN_2", 512, {"mixed_split_tokens": 0.0, "mixed_share_per_request": 32 / 264, "mixed_overlap": 1.0}),
        ("FLASH_ATTN_3", 512, {"mixed_split_tokens": 512.0, "mixed_fill_tokens": 528.0}),
        ("FLASH_ATTN_3", 256, {"mixed_split_tokens": 256.0, "mixed_fill_tokens": 528.0}),
        ("FLASH_ATTN_3", 0, {"mixed_split_tokens": 0.0, "mixed_fill_tokens": 528.0}),
        ("TRITON_ATTN", 512, {"mixed_split_tokens": 0.0, "mixed_overlap": 1.0}),
        ("FLASHINFER", 512, {}),
        ("CPU_ATTN", 0, {}),
    ],
)
def test_rule_for_steps_with_prompts_is_the_backends(
    backend: str, graph_tokens: int, expected: dict[str, float]
) -> None:
    """It follows from the backend, the heads and the limit of CUDA graphs; every form of the model has it."""
    identity = msgspec.structs.replace(H100, attention_backend=backend)
    assert mixed_rule_of(identity, MULTIPROCESSORS, graph_tokens) == pytest.approx(expected)
    for candidate in candidates(
        split_structure(identity, MULTIPROCESSORS, graph_tokens), mixed_rule_of(identity, MULTIPROCESSORS, graph_tokens)
    ):
        assert {name: getattr(candidate.start, name) for name in expected} == pytest.approx(expected)
        assert not any(name.startswith("mixed_") for name in candidate.free)


def test_limit_of_graphs_is_what_the_engine_tells() -> None:
    """An eager engine has no graphs; one that does not tell has vLLM's default."""
    graphs = msgspec.structs.replace(H100, eager=False)
    assert [graph_tokens_of(graphs, told) for told in (None, 256, 0)] == [512, 256, 0]
    assert graph_tokens_of(msgspec.structs.replace(H100, eager=True), None) == 0


def test_decodes_beside_prompts_are_fitted_by_the_rule() -> None:
    """On an engine with FA2 the fit finds the straggler, and the rule explains what a sum would leave as error."""
    identity = msgspec.structs.replace(H100, attention_backend="FLASH_ATTN_2")
    structure, mixed = (made(identity, 108, 0) for made in (split_structure, mixed_rule_of))
    assert isinstance(structure, StepModel)
    truth = replace(
        structure,
        base_s=7e-3,
        per_decode_s=1e-5,
        per_kv_token_s=4e-8,
        per_prefill_token_s=2e-5,
        per_prefill_attention_s=2e-10,
        straggler_per_kv_token_s=1e-6,
    )
    rng = np.random.default_rng(5)
    batches, kinds = [], []
    for n in (2, 8, 32):
        for longest in (2_000, 16_000, 64_000):
            for chunk in (0, 128, 384, 768, 2_048):
                batches.append(BatchFeatures(n, 500 * (n - 1) + longest, longest, chunk, chunk * (chunk + 1) / 2))
                kinds.append(f"both {n} {longest} {chunk}")
    seconds = np.array([truth.step_s(batch) for batch in batches]) * (1 + 0.002 * rng.standard_normal(len(batches)))
    columns = StepSamples.of(batches, seconds)
    measured = Points(
        columns, tuple(kinds), np.ones(len(kinds), dtype=np.int64), np.zeros(len(kinds)), len(kinds), 0, None
    )
    ruled, sums = fit_points(measured, structure, mixed=mixed), fit_points(measured)
    assert ruled.result.model.straggler_per_kv_token_s == pytest.approx(1e-6, rel=0.05)
    assert ruled.held_out[0].median < 0.01
    assert sums.held_out[0].median > 2 * ruled.held_out[0].median


def pulls(per_token_s: float, fixed_s: float, noise_s: float = 0.0) -> list[PullRun]:
    """Seven pulls of each of four lengths."""
    rng = np.random.default_rng(0)
    return [
        PullRun(pulled_tokens=n, pull_s=max(0.0, fixed_s + per_token_s * n + noise_s * float(rng.standard_normal())))
        for _ in range(7)
        for n in (1_000, 2_000, 3_000, 4_000)
    ]


def test_rate_is_the_slope() -> None:
    """A transfer that takes 2 us per token of 1000 bytes runs at 500 MB/s, whatever its fixed time."""
    rate = rate_of(pulls(2e-6, 0.02, 1e-4), 1_000)
    assert rate.bytes_per_s == pytest.approx(5e8, rel=0.1)
    assert rate.measurement.fixed_s == pytest.approx(0.02, rel=0.1)
    assert rate.measurement.longest_tokens == 4_000
    assert "slope" in rate.note


def test_rate_of_pulls_that_hardly_grow_is_a_lower_bound() -> None:
    """Where the time does not grow with the length, the longest pulls' whole time counts, and the note says so."""
    rate = rate_of(pulls(0.0, 0.02, 2e-3), 1_000)
    assert rate.bytes_per_s == pytest.approx(4_000 * 1_000 / 0.02, rel=0.2)
    assert "faster than this" in rate.note


def test_rate_of_pulls_whose_growth_is_noise() -> None:
    """If slopes differ by more than their size, the longest pulls' whole time counts, not their median."""
    times = {1_000: (8, 12), 2_000: (6, 14), 3_000: (7, 24), 4_000: (9, 26)}
    runs = [PullRun(pulled_tokens=n, pull_s=1e-3 * ms) for n, both in times.items() for ms in both]
    rate = rate_of(runs, 1_000)
    assert "not steadily" in rate.note
    assert rate.bytes_per_s == pytest.approx(4_000 * 1_000 / 0.0175, rel=0.01)

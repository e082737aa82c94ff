"""The verdict on a measured profile: grades, what was not measured, and the remedy that fits the cause."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cascadeinfer.cli.profile import verdict_lines, what_next
from cascadeinfer.config.profiles import load_profile
from cascadeinfer.core.cost.fit import StepSamples
from cascadeinfer.core.cost.latency import BatchFeatures
from cascadeinfer.core.cost.profile import FitError, Measurement
from cascadeinfer.profiling.statistics import REPEATS
from cascadeinfer.profiling.verdict import Grade, Verdict, judge

BATCHES = [
    BatchFeatures(4, 400, 100),
    BatchFeatures(4, 400, 300),
    BatchFeatures(0, 0, 0, 64, 2_000.0),
    BatchFeatures(4, 400, 100, 64, 2_000.0),
]
"""One batch of each region."""
MEASUREMENT = Measurement(
    batches=40, left_out=0, rounds=3, steps=1_000, outliers=0, samples=100, measuring_s=60.0, step_share=0.98,
    max_decodes=64, max_kv_tokens=30_000, max_length_tokens=8_000, max_prefill_tokens=512,
)  # fmt: skip


def judged(
    median: float = 0.02, p90: float = 0.06, noise: float | None = 0.001, batches: Any = BATCHES, **measured: Any
) -> Verdict:
    """The verdict on a profile with these errors."""
    errors = [FitError(part="held out: all", samples=100, median=median, p90=p90, bias=0.0, measured=True)]
    if noise is not None:
        errors.append(FitError(part=REPEATS, samples=50, median=noise, p90=2 * noise, bias=0.0, measured=True))
    profile = replace(
        load_profile("h100-llama-3.1-8b"),
        fit_errors=tuple(errors),
        measurement=msgspec.structs.replace(MEASUREMENT, **measured),
    )
    return judge(profile, StepSamples.of(batches, [0.01] * len(batches)))


def test_a_good_profile_needs_nothing() -> None:
    """With small errors and everything measured, the verdict says what the profile is good for and asks for nothing."""
    verdict = judged()
    assert (verdict.grade, verdict.unmeasured, verdict.remedies) == (Grade.GOOD, (), ())
    assert verdict_lines(verdict) == [
        (
            "steps not seen by the fit: median error 2.0%, nine in ten within 6.0%; "
            "the machine itself varies by 0.1% from round to round"
        ),
        "verdict: good: plans and simulations may rest on it",
    ]


def test_a_poor_profile_is_not_recommended() -> None:
    """The last line of `profile` names the next command only if that would take the profile."""
    assert "use it: cascadeinfer plan" in what_next(judged(), Path("p.json"))
    poor = what_next(judged(median=0.5, p90=0.9), Path("p.json"))
    assert "not fit for use" in poor
    assert "--accept-poor-profile" in poor
    assert "use it:" not in poor


@pytest.mark.parametrize(
    ("median", "p90", "grade"),
    [
        (0.05, 0.15, Grade.GOOD),
        (0.051, 0.15, Grade.FAIR),
        (0.05, 0.151, Grade.FAIR),
        (0.15, 0.40, Grade.FAIR),
        (0.151, 0.40, Grade.POOR),
        (0.02, 0.41, Grade.POOR),
    ],
)
def test_median_and_tail_both_decide(median: float, p90: float, grade: Grade) -> None:
    """A profile is only as good as the worse of the two; a limit belongs to the better grade."""
    assert judged(median, p90).grade is grade


def test_regions_without_a_step_are_named() -> None:
    """A region of batches without a sample is listed, with the reason unless that was lack of time."""
    assert judged(batches=BATCHES[:3]).unmeasured == ("decode with prefill: the engine holds no such batch",)
    names = judged(batches=BATCHES[:1], left_out=20).unmeasured
    assert names[:3] == ("decode, mixed lengths", "prefill", "decode with prefill")


def test_what_the_time_did_not_allow_is_told() -> None:
    """Kinds left out are reported with the range measured and how to continue, even when the fit is good."""
    verdict = judged(left_out=20)
    [text] = verdict.unmeasured
    assert text.startswith("20 of 60 kinds of batch, for want of time; steps had up to 64 requests and 30,000 tokens")
    assert verdict.grade is Grade.GOOD
    [remedy] = verdict.remedies
    assert "--minutes" in remedy


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ({"noise": 0.08}, "stop what else runs on it"),
        ({"noise": None}, "--rounds 3"),
        ({"step_share": 0.5}, "50% of the wall time"),
        ({}, "--plot"),
    ],
)
def test_the_remedy_fits_the_cause(case: dict[str, Any], says: str) -> None:
    """Noise, a single round, a machine that waits between steps, a property the model lacks: each has its remedy."""
    verdict = judged(median=0.10, p90=0.30, **case)
    assert verdict.grade is Grade.FAIR
    [remedy] = verdict.remedies
    assert says in remedy
    assert verdict_lines(verdict)[-1].endswith(f"To do: {remedy}")


def test_steps_that_do_not_fill_the_time_spoil_a_good_fit() -> None:
    """However well steps are predicted, latencies are not if the engine waits between them."""
    assert judged(step_share=0.7).grade is Grade.FAIR

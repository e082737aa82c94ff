"""
Judges how good a measured profile is, and what would make it better.

The criterion is the error on steps that the fit has not seen. A large error has one of three causes, each with its own
remedy: the machine varies as much from one round to the next; the time was too short for all kinds of batch; or no form
of the step model has the property that these steps show.
"""

import enum
from dataclasses import dataclass
from typing import Final

from cascadeinfer.core.cost.fit import StepSamples, region_masks
from cascadeinfer.core.cost.profile import CostProfile, FitError, Measurement
from cascadeinfer.core.types import InstanceCapacity
from cascadeinfer.profiling.profiler import WHOLE_SHARE
from cascadeinfer.profiling.statistics import REPEATS

NOISE_SHARE: Final = 0.5
"""From this share of the fit's error on, the variation of the machine between rounds explains most of it."""


class Grade(enum.Enum):
    """What a profile is good enough for."""

    GOOD = "plans and simulations may rest on it"
    FAIR = "a start for serve, which learns costs on; layouts that a plan finds nearly equal may swap places"
    POOR = "do not plan with it"


@dataclass(frozen=True, slots=True)
class Limit:
    """Maximum relative errors on held-out steps, as shares of the step time."""

    median: float
    p90: float

    def holds(self, error: FitError) -> bool:
        """Whether an error is within both."""
        return error.median <= self.median and error.p90 <= self.p90


GOOD: Final = Limit(median=0.05, p90=0.15)
"""About what parts of the shipped profiles reach against the measurements they were made from."""
FAIR: Final = Limit(median=0.15, p90=0.40)
"""Beyond this, two stages of different lengths can be mistaken for each other."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """
    The verdict on a profile.

    Attributes:
        held_out: Relative error on steps that the fit had not seen.
        noise: How far one round of a batch is from the median of its rounds; None with one round.
        unmeasured: What was not measured, one phrase each.
        remedies: What would improve the profile, one phrase each; empty if nothing needs to be done.
    """

    grade: Grade
    held_out: FitError
    noise: FitError | None
    unmeasured: tuple[str, ...]
    remedies: tuple[str, ...]


def judge(profile: CostProfile, samples: StepSamples) -> Verdict:
    """
    The verdict on a measured profile.

    Args:
        profile: A profile with its measurement and its errors, the first of which covers all held-out steps.
        samples: The samples it was fitted to.
    """
    measurement = profile.measurement
    assert measurement is not None, "a measured profile says how"
    held_out = profile.fit_errors[0]
    noise = next((error for error in profile.fit_errors if error.part == REPEATS), None)
    grade = grade_of(profile)
    why = "" if measurement.left_out else ": the engine holds no such batch"
    absent = tuple(name + why for name, rows in region_masks(samples).items() if not rows.any())
    unmeasured = absent + _left_out(measurement, profile.capacity)
    return Verdict(grade, held_out, noise, unmeasured, tuple(_remedies(grade, held_out, noise, measurement)))


def grade_of(profile: CostProfile) -> Grade:
    """What a measured profile is good enough for, by the errors and the measurement that it records."""
    measurement = profile.measurement
    assert measurement is not None, "a measured profile says how"
    held_out = profile.fit_errors[0]
    if GOOD.holds(held_out) and _is_whole(measurement):
        return Grade.GOOD
    return Grade.FAIR if FAIR.holds(held_out) else Grade.POOR


def _is_whole(measurement: Measurement) -> bool:
    """Whether the steps account for the wall time, so that latencies can be predicted from them."""
    return WHOLE_SHARE[0] <= measurement.step_share <= WHOLE_SHARE[1]


def _left_out(measurement: Measurement, capacity: InstanceCapacity) -> tuple[str, ...]:
    """What the time did not allow, and how far the measurement got."""
    if not measurement.left_out:
        return ()
    n_kinds = measurement.left_out + measurement.batches
    reached = f"{measurement.max_decodes} requests and {measurement.max_kv_tokens:,} tokens of KV cache"
    held = f"{capacity.max_num_seqs} and {capacity.kv_tokens:,}"
    return (
        (
            f"{measurement.left_out} of {n_kinds} kinds of batch, for want of time; "
            f"steps had up to {reached}, the engine holds {held}"
        ),
    )


def _remedies(grade: Grade, held_out: FitError, noise: FitError | None, measurement: Measurement) -> list[str]:
    """What to do, most useful first."""
    found = []
    is_noisy = noise is not None and noise.median >= NOISE_SHARE * held_out.median
    if grade is not Grade.GOOD and is_noisy:
        found.append(
            "most of the error is the machine's own variation: "
            "stop what else runs on it, remove the samples and measure anew"
        )
    if measurement.left_out:
        found.append("go on with --resume and a larger --minutes, which counts from the first run on")
    if grade is Grade.GOOD:
        return found
    if noise is None:
        found.append(
            "go on with --resume, --rounds 3 and a larger --minutes, "
            "to tell the machine's variation from the model's error"
        )
    if not _is_whole(measurement):
        share = f"{measurement.step_share:.0%}"
        found.append(f"steps add up to {share} of the wall time: latencies will differ from the prediction accordingly")
    return found or ["no form of the step model fits these steps better: look at --plot for the batches that are off"]

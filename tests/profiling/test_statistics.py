"""Samples from steps: medians, outliers, repetitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeinfer.profiling.log import BatchRun, MeasuredStep
from cascadeinfer.profiling.statistics import MAX_RAMP_SAMPLES, WINDOW_STEPS, inliers, points_of, step_share


def decode(seconds: list[float], *, kind: str = "decode 2 x 16", number: int = 0) -> BatchRun:
    """A run that decodes two requests, in steps of these seconds."""
    steps = [MeasuredStep(2, 32 + 2 * i, 16 + i, 0, 0.0, s) for i, s in enumerate(seconds)]
    return BatchRun(kind=kind, round=number, wall_s=sum(seconds) or 1.0, steps=steps)


def test_like_steps_become_their_median() -> None:
    """A window of steps is one sample: its median seconds, its mean KV, its spread."""
    points = points_of([decode([0.010, 0.011, 0.012, 0.010, 0.011])])
    assert points.samples.step_s.tolist() == [0.011]
    assert points.samples.kv_tokens.tolist() == [36.0]
    assert points.counts.tolist() == [5]
    assert points.spread[0] == pytest.approx(0.5 / 11)
    assert points.repeats is None


def test_windows_follow_the_growing_kv() -> None:
    """Steps far apart are not alike: the KV has grown."""
    assert len(points_of([decode([0.01] * (2 * WINDOW_STEPS + 1))]).samples) == 3


def test_a_compilation_is_left_out_and_counted() -> None:
    """A step 100 times as long as its like is counted, but changes neither the median nor the number of samples."""
    quiet = points_of([decode([0.010, 0.011, 0.012] * 3)])
    noisy = points_of([decode([1.0] + [0.010, 0.011, 0.012] * 3)])
    assert noisy.outliers == 1
    assert quiet.outliers == 0
    assert noisy.samples.step_s == pytest.approx(quiet.samples.step_s)


def test_rounds_are_pooled_and_compared() -> None:
    """The same batch in three rounds is one sample, and the difference between the rounds is reported."""
    points = points_of([decode([s] * 5, number=i) for i, s in enumerate((0.010, 0.011, 0.012))])
    assert points.samples.step_s.tolist() == [0.011]
    assert points.repeats is not None
    assert points.repeats.samples == 3
    assert points.repeats.median == pytest.approx(0.001 / 0.011)


def test_other_batches_are_not_pooled() -> None:
    """Steps with another count, other prompt tokens or another kind of batch are separate samples."""
    chunk = MeasuredStep(2, 40, 20, 64, 2080.0, 0.03)
    run = BatchRun(
        kind="both", round=0, wall_s=1.0, steps=[*decode([0.01]).steps, chunk, MeasuredStep(1, 9, 9, 0, 0.0, 0.008)]
    )
    points = points_of([run, decode([0.01], kind="decode")])
    assert sorted(points.samples.step_s.tolist()) == [0.008, 0.01, 0.01, 0.03]
    assert points.kind_of.count("both") == 3


def test_a_long_ramp_does_not_outweigh_the_rest() -> None:
    """A ramp of many different chunks gives only a few samples; repeated chunks are all kept."""
    ramp = [MeasuredStep(i, 100 * i, 100, 64, 2080.0 + i, 0.02) for i in range(100)]
    points = points_of([BatchRun(kind="decode 100 x 64", round=0, wall_s=2.0, steps=ramp)])
    assert len(points.samples) <= MAX_RAMP_SAMPLES
    assert points.steps == 100


@given(st.lists(st.floats(1e-4, 10.0), min_size=1, max_size=40))
def test_at_least_half_are_inliers(seconds: list[float]) -> None:
    """Whatever the steps, neither the median nor anything below it is an outlier."""
    table = np.array(seconds)
    kept = inliers(table)
    assert kept.sum() * 2 >= len(table)
    assert kept[table <= np.median(table)].all()


def test_step_share_is_of_busy_runs() -> None:
    """Step seconds over wall time, without runs of prompts alone if there are others."""
    busy = BatchRun(kind="decode", round=0, wall_s=2.0, steps=[MeasuredStep(1, 9, 9, 0, 0.0, 1.9)])
    prompts = BatchRun(kind="prompt 16", round=0, wall_s=1.0, steps=[MeasuredStep(0, 0, 0, 16, 136.0, 0.2)])
    assert step_share([busy, prompts]) == pytest.approx(0.95)
    assert step_share([prompts]) == pytest.approx(0.2)

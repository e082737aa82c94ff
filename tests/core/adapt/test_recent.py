"""The recent workload: what fades, what counts, what is left out."""

import math

import numpy as np
import pytest

from cascadeinfer.core.adapt.recent import RecentWorkload, Unfinished


def test_too_little_is_nothing() -> None:
    """There is no estimate before the first request, at the same moment, or with too few finished requests."""
    recent = RecentWorkload(60.0, 10_000)
    assert recent.look(5.0, 1) is None
    recent.note_arrival(10.0)
    recent.note_finished(100, 10, 10.0)
    assert recent.look(10.0, 1) is None
    assert recent.look(11.0, 2) is None


def test_rate_and_lengths() -> None:
    """100 arrivals in 50 s are 2 per second; the lengths are those of finished requests."""
    recent = RecentWorkload(60.0, 10_000)
    for number in range(100):
        recent.note_arrival(0.5 * number)
        recent.note_finished(100, 10 + number % 2, 0.5 * number)
    seen = recent.look(50.0, 50)
    assert seen is not None
    lengths, rate_per_s = seen
    assert rate_per_s == pytest.approx(2.0)
    assert lengths.mean_prompt_tokens == pytest.approx(100.0)
    assert lengths.mean_output_tokens == pytest.approx(10.5, rel=0.01)


def test_the_past_fades() -> None:
    """After one time constant old lengths weigh 1/e, whenever they finished; the rate follows the new arrivals."""
    recent = RecentWorkload(60.0, 10_000)
    for _ in range(100):
        recent.note_arrival(0.0)
        recent.note_finished(100, 10, 60.0)
    recent.look(60.0, 1)
    for number in range(300):
        recent.note_arrival(60.0 + 0.2 * number)
        recent.note_finished(1000, 10, 120.0)
    seen = recent.look(120.0, 1)
    assert seen is not None
    lengths, rate_per_s = seen
    old = 100 * math.exp(-1.0)
    assert lengths.requests == pytest.approx(old + 300)
    assert lengths.mean_prompt_tokens == pytest.approx((old * 100 + 300 * 1000) / (old + 300))
    assert rate_per_s == pytest.approx((old + 300) / (60 * math.exp(-1.0) + 60))


def test_aborted_and_endless_requests_are_left_out() -> None:
    """A request without output, or beyond the longest sequence, is left out."""
    recent = RecentWorkload(60.0, 1000)
    recent.note_arrival(0.0)
    recent.note_finished(500, 0, 1.0)
    recent.note_finished(500, 500, 1.0)
    recent.note_finished(500, 499, 1.0)
    seen = recent.look(1.0, 1)
    assert seen is not None
    assert seen[0].requests == pytest.approx(1.0)


def test_requests_that_still_run_count_as_what_they_may_become() -> None:
    """
    Ten seconds after the start, half of the requests (the long ones) still run: the finished ones alone give half of
    the mean.

    With the running ones at the lengths that finished requests suggest, or beyond those at the length they may reach,
    the mean is nearly right.
    """
    rng = np.random.default_rng(3)
    recent = RecentWorkload(300.0, 1 << 20)
    tokens_per_s = 50.0
    arrived = np.sort(rng.uniform(0.0, 40.0, 4000))
    outputs = np.where(rng.random(4000) < 0.9, rng.integers(1, 200, 4000), rng.integers(500, 1500, 4000))
    running = []
    for at_s, output in zip(arrived, outputs, strict=True):
        recent.note_arrival(float(at_s))
        if at_s + output / tokens_per_s <= 40.0:
            recent.note_finished(100, int(output), float(at_s))
        else:
            running.append((at_s, int((40.0 - at_s) * tokens_per_s)))
    at_s, so_far = (np.array(column) for column in zip(*running, strict=True))
    n = len(running)
    unfinished = Unfinished(at_s, np.full(n, 100), so_far.astype(np.int64), np.full(n, 100_000))
    seen = recent.look(40.0, 1, unfinished)
    assert seen is not None
    finished_only = float(np.mean([o for a, o in zip(arrived, outputs, strict=True) if a + o / tokens_per_s <= 40.0]))
    error = seen[0].mean_output_tokens / float(outputs.mean()) - 1.0
    assert finished_only / float(outputs.mean()) - 1.0 < -0.2
    assert abs(error) < 0.08
    assert seen[0].mean_prompt_tokens == pytest.approx(100.0)


def test_a_request_that_runs_is_never_taken_for_shorter_than_it_is() -> None:
    """A running request's output in the histogram always exceeds what it has, and stays within its own cap."""
    recent = RecentWorkload(60.0, 10_000)
    for _ in range(50):
        recent.note_arrival(0.0)
        recent.note_finished(10, 5, 0.0)
    seen = recent.look(1.0, 1, Unfinished(np.array([1.0]), np.array([10]), np.array([700]), np.array([800])))
    assert seen is not None
    lengths, _ = seen
    assert 10 + 700 < lengths.longest_tokens < 10 + 800 + 50
    assert (
        recent.look(2.0, 1, Unfinished(np.array([1.0]), np.array([9000]), np.array([999]), np.array([5000])))
        is not None
    )


def test_a_window_in_which_hardly_anything_long_has_ended_says_nothing() -> None:
    """
    While most requests have outlived all finished ones (at the start, with long outputs), lengths would be guesses, and
    there is no estimate.
    """
    recent = RecentWorkload(300.0, 1 << 17)
    for _ in range(500):
        recent.note_arrival(0.0)
    for _ in range(200):
        recent.note_finished(100, 50, 0.0)
    running = Unfinished(np.zeros(300), np.full(300, 100), np.full(300, 900), np.full(300, 10_000))
    assert recent.look(30.0, 100, running) is None
    for _ in range(290):
        recent.note_finished(100, 1000, 0.0)
    few = Unfinished(np.zeros(10), np.full(10, 100), np.full(10, 1100), np.full(10, 10_000))
    assert recent.look(40.0, 100, few) is not None

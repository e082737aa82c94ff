"""The recent workload: what fades, what counts, what is left out."""

import math

import pytest

from cascadeinfer.core.balance.recent import RecentWorkload


def test_too_little_is_nothing() -> None:
    """Before the first request, at the same moment, and below the least number of finished requests there is nothing to say."""
    recent = RecentWorkload(60.0, 10_000)
    assert recent.look(5.0, 1) is None
    recent.note_arrival(10.0)
    recent.note_finished(100, 10)
    assert recent.look(10.0, 1) is None
    assert recent.look(11.0, 2) is None


def test_rate_and_lengths() -> None:
    """100 arrivals in 50 s are 2 per second; the lengths are those that finished."""
    recent = RecentWorkload(60.0, 10_000)
    for number in range(100):
        recent.note_arrival(0.5 * number)
        recent.note_finished(100, 10 + number % 2)
    seen = recent.look(50.0, 50)
    assert seen is not None
    lengths, rate_per_s = seen
    assert rate_per_s == pytest.approx(2.0)
    assert lengths.mean_prompt_tokens == pytest.approx(100.0)
    assert lengths.mean_output_tokens == pytest.approx(10.5)


def test_the_past_fades() -> None:
    """After one time constant the old lengths weigh 1/e, and the rate follows the new arrivals."""
    recent = RecentWorkload(60.0, 10_000)
    for number in range(100):
        recent.note_arrival(0.6 * number)
        recent.note_finished(100, 10)
    recent.look(60.0, 1)
    for number in range(300):
        recent.note_arrival(60.0 + 0.2 * number)
        recent.note_finished(1000, 10)
    seen = recent.look(120.0, 1)
    assert seen is not None
    lengths, rate_per_s = seen
    old = 100 * math.exp(-1.0)
    assert lengths.requests == pytest.approx(old + 300)
    assert lengths.mean_prompt_tokens == pytest.approx((old * 100 + 300 * 1000) / (old + 300))
    assert rate_per_s == pytest.approx((old + 300) / (60 * math.exp(-1.0) + 60))


def test_aborted_and_endless_requests_are_left_out() -> None:
    """A request without output, and one beyond the longest sequence, are no lengths to plan for."""
    recent = RecentWorkload(60.0, 1000)
    recent.note_arrival(0.0)
    recent.note_finished(500, 0)
    recent.note_finished(500, 500)
    recent.note_finished(500, 499)
    seen = recent.look(1.0, 1)
    assert seen is not None
    assert seen[0].requests == 1

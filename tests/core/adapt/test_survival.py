"""Distribution of output lengths: the estimate against the truth, with and without requests that still run."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeinfer.core.adapt.survival import OutputSurvival

LEVELS = (0.25, 0.5, 0.75)


def test_without_running_requests_quantiles_are_those_of_the_finished() -> None:
    """A new request is expected to last as long as those before it, within a bucket (4.4 %)."""
    rng = np.random.default_rng(0)
    outputs = np.maximum(1, rng.lognormal(5.0, 0.7, 20_000)).astype(np.int64)
    survival = OutputSurvival(1 << 17)
    survival.add(outputs, np.ones(len(outputs)))
    for level, got in zip(LEVELS, survival.quantiles(np.array([0]), np.array([1e-9]), LEVELS), strict=True):
        assert got[0] == pytest.approx(np.quantile(outputs, level), rel=0.045)


def test_requests_cut_short_by_the_present_do_not_bias_the_estimate() -> None:
    """
    Outputs of which only a random first part has been seen still give the true quantiles of the future.

    Each request is seen up to a random length: those that end before are finished, the others run.
    """
    rng = np.random.default_rng(1)
    outputs = np.maximum(1, rng.lognormal(5.0, 0.7, 60_000)).astype(np.int64)
    seen = rng.integers(1, 3000, len(outputs))
    finished = outputs <= seen
    survival = OutputSurvival(1 << 17)
    survival.add(outputs[finished], np.ones(int(finished.sum())))
    running = np.concatenate(([200], seen[~finished]))
    weights = np.concatenate(([0.0], np.ones(int((~finished).sum()))))
    beyond = outputs[outputs > 200]
    for level, got in zip(LEVELS, survival.quantiles(running, weights, LEVELS), strict=True):
        assert got[0] == pytest.approx(np.quantile(beyond, level), rel=0.06)
    naive = np.quantile(outputs[finished & (outputs > 200)], 0.75)
    assert naive < 0.97 * np.quantile(beyond, 0.75)


def test_the_past_fades() -> None:
    """After a decay to nothing only new outputs count."""
    survival = OutputSurvival(10_000)
    survival.add(np.array([1000] * 10), np.ones(10))
    survival.decay(0.0)
    survival.add(np.array([10] * 10), np.ones(10))
    (median,) = survival.quantiles(np.array([0]), np.array([1e-9]), (0.5,))
    assert median[0] == pytest.approx(10, abs=1)


@given(
    ended=st.lists(st.integers(1, 5000), max_size=30),
    running=st.lists(st.integers(0, 9000), min_size=1, max_size=10),
)
def test_futures_are_beyond_the_present_and_ordered(ended: list[int], running: list[int]) -> None:
    """Every quantile exceeds the present length, higher levels are no shorter, a lone runner doubles its length."""
    survival = OutputSurvival(10_000)
    survival.add(np.array(ended, dtype=np.int64), np.ones(len(ended)))
    so_far = np.array(running, dtype=np.int64)
    low, middle, high = survival.quantiles(so_far, np.ones(len(so_far)), LEVELS)
    assert np.all(low > so_far)
    assert np.all(middle >= low)
    assert np.all(high >= middle)
    if not ended:
        assert np.all(middle == np.maximum(2 * so_far, so_far + 1))

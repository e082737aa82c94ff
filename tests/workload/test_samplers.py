"""Arrival processes and length laws against their theory, by tests that a clamped or shifted sampler would fail."""

import math

import numpy as np
import pytest
from scipy import stats

from cascadeinfer.core.errors import TraceError
from cascadeinfer.workload.arrivals import gamma_arrivals, poisson_arrivals, renewal_window
from cascadeinfer.workload.lengths import Empirical

N = 200_000
SIGNIFICANCE = 1e-4
"""
Seeds are fixed, so a test passes or fails for good; a wrong sampler of this size fails by many orders of magnitude.
"""


def rng(seed: int = 0) -> np.random.Generator:
    """A fresh generator."""
    return np.random.default_rng(seed)


def gaps(arrival_s: np.ndarray) -> np.ndarray:
    """The gaps between arrivals, the first from time 0."""
    return np.diff(arrival_s, prepend=0.0)


def mean_is(sample: np.ndarray, mean: float, deviation: float) -> bool:
    """Whether the sample's mean is within 4.5 standard errors."""
    return abs(sample.mean() - mean) < 4.5 * deviation / math.sqrt(len(sample))


@pytest.mark.parametrize("rate_rps", [0.1, 7.0, 4000.0])
def test_poisson_gaps_are_exponential(rate_rps: float) -> None:
    """Mean, and the whole distribution by Kolmogorov-Smirnov; gaps clamped at three means would fail both."""
    drawn = gaps(poisson_arrivals(rate_rps, N, rng()))
    assert mean_is(drawn, 1.0 / rate_rps, 1.0 / rate_rps)
    assert drawn.max() > 9.0 / rate_rps
    assert stats.kstest(drawn, "expon", args=(0.0, 1.0 / rate_rps)).pvalue > SIGNIFICANCE


def test_poisson_counts_have_the_variance_of_poisson() -> None:
    """Arrivals in unit windows have variance equal to their mean."""
    counts = np.bincount(poisson_arrivals(5.0, N, rng(1)).astype(int))[:-1]
    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("cv", [0.3, 1.0, 3.0])
def test_gamma_gaps_have_their_mean_and_variation(cv: float) -> None:
    """Mean 1 / rate, the requested coefficient of variation, and gamma by Kolmogorov-Smirnov."""
    drawn = gaps(gamma_arrivals(2.0, cv, N, rng(2)))
    assert mean_is(drawn, 0.5, 0.5 * cv)
    assert drawn.std() / drawn.mean() == pytest.approx(cv, rel=0.03)
    # Differences of cumulative sums lose the smallest gaps to rounding, hence the floor.
    law = stats.gamma(1.0 / cv**2, scale=cv**2 / 2.0)
    visible = drawn > 1e-6
    below = law.cdf(1e-6)
    p = stats.kstest(drawn[visible], lambda x: (law.cdf(x) - below) / (1.0 - below)).pvalue
    assert p > SIGNIFICANCE


@pytest.mark.parametrize(
    ("law", "shape"), [("gamma", 0.25), ("gamma", 1.0), ("gamma", 4.0), ("weibull", 0.6), ("weibull", 2.0)]
)
def test_a_renewal_window_has_its_expected_count(law: str, shape: float) -> None:
    """Seen through a short window, a stationary process has rate * duration arrivals on average, whatever its law."""
    counts = np.array([len(renewal_window(law, shape, 3.0, 1.0, rng(s))) for s in range(4000)])
    assert mean_is(counts, 3.0, float(counts.std()))


@pytest.mark.parametrize(("law", "shape"), [("gamma", 0.5), ("weibull", 0.7)])
def test_a_renewal_window_has_its_law_of_gaps(law: str, shape: float) -> None:
    """Gaps inside a long window follow the law with mean 1 / rate."""
    drawn = np.diff(renewal_window(law, shape, 2.0, 50_000.0, rng(5)))
    expected = (
        stats.gamma(shape, scale=1.0 / (2.0 * shape))
        if law == "gamma"
        else stats.weibull_min(shape, scale=1.0 / (2.0 * math.gamma(1.0 + 1.0 / shape)))
    )
    assert mean_is(drawn, 0.5, float(expected.std()))
    assert stats.kstest(drawn, expected.cdf).pvalue > SIGNIFICANCE


def test_impossible_processes_are_refused() -> None:
    """Rates, shapes and durations must be positive and finite, and laws known."""
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(TraceError, match="rate_rps must be positive"):
            poisson_arrivals(wrong, 1, rng())
        with pytest.raises(TraceError, match="cv must be positive"):
            gamma_arrivals(1.0, wrong, 1, rng())
    with pytest.raises(TraceError, match="unknown law"):
        renewal_window("pareto", 1.0, 1.0, 1.0, rng())


def test_no_requests_no_times() -> None:
    """Zero arrivals are an empty array."""
    for none in (
        poisson_arrivals(1.0, 0, rng()),
        gamma_arrivals(1.0, 2.0, 0, rng()),
    ):
        assert none.shape == (0,)


def test_empirical_lengths_follow_their_weights() -> None:
    """By chi-square over the values; without weights, all are equally likely."""
    values = np.array([1, 5, 9])
    drawn = Empirical(values, np.array([1.0, 2.0, 5.0])).draw(N, rng(7))
    counts = [int(np.count_nonzero(drawn == v)) for v in values]
    assert stats.chisquare(counts, np.array([1, 2, 5]) * N / 8).pvalue > SIGNIFICANCE
    equal = Empirical(values).draw(N, rng(8))
    assert stats.chisquare([int(np.count_nonzero(equal == v)) for v in values]).pvalue > SIGNIFICANCE


def test_impossible_laws_are_refused() -> None:
    """Empty samples, lengths below 1, and weights that are no law are refused."""
    with pytest.raises(TraceError, match="at least 1 token"):
        Empirical(np.array([0, 3]))
    with pytest.raises(TraceError, match="at least 1 token"):
        Empirical(np.array([], dtype=np.int64))
    with pytest.raises(TraceError, match="one per length"):
        Empirical(np.array([1, 2]), np.array([1.0]))
    with pytest.raises(TraceError, match="not negative"):
        Empirical(np.array([1, 2]), np.array([1.0, -1.0]))


def test_a_seed_is_a_sample() -> None:
    """The same generator state gives the same draws."""
    np.testing.assert_array_equal(poisson_arrivals(1.0, 9, rng(4)), poisson_arrivals(1.0, 9, rng(4)))
    law = Empirical(np.array([3, 5, 9]), np.array([1.0, 2.0, 1.0]))
    np.testing.assert_array_equal(law.draw(50, rng(4)), law.draw(50, rng(4)))

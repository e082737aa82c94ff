"""Metrics of live runs (groups, bootstrap intervals, intervals over runs, ratios), by hand and on synthetic data."""

import math

import numpy as np
import pytest
from record_rows import live_records

from cascadeinfer.results.estimates import (
    Estimate,
    block_draws,
    counted_rows,
    errors_by_kind,
    groups_of,
    long_from_tokens,
    over_runs,
    percentile_of_rows,
    ratio_over_runs,
    summarise_groups,
)
from cascadeinfer.results.summary import Slo

SLO = Slo(ttft_s=0.5, tpot_s=0.1)


def test_figures_by_hand() -> None:
    """Four requests, one failed: latencies over the finished, rates over the span; the failed one missed its SLO."""
    records = live_records(
        arrival_s=[0.0, 1.0, 2.0, 3.0],
        ttft_s=[0.1, 0.2, 0.9, math.nan],
        e2e_s=[1.0, 2.0, 7.0, math.nan],
        prompt_tokens=[10, 10, 100, 100],
        output_tokens=[11, 19, 61, 11],
    )
    groups = summarise_groups(records, SLO, 100, np.random.default_rng(0))
    whole, short, long = groups["all"], groups["short"], groups["long"]
    assert (whole.requests, whole.failed) == (4, 1)
    assert (short.requests, short.failed) == (2, 0)
    assert (long.requests, long.failed) == (2, 1)
    figures = {name: estimate.value for name, estimate in whole.figures.items()}
    assert figures["ttft_s_mean"] == pytest.approx(0.4)
    assert figures["e2e_s_p50"] == pytest.approx(2.0)
    assert figures["tpot_s_p50"] == pytest.approx(0.1)
    assert figures["normalised_latency_s_mean"] == pytest.approx((1 / 11 + 2 / 19 + 7 / 61) / 3)
    # From the first arrival at 0 to the last token at 9.
    assert figures["throughput_rps"] == pytest.approx(3 / 9)
    assert figures["throughput_tokens_per_s"] == pytest.approx((11 + 19 + 61) / 9)
    assert figures["slo_attainment"] == pytest.approx(2 / 4)
    assert figures["goodput_rps"] == pytest.approx(2 / 9)
    assert long.figures["slo_attainment"].value == 0.0
    assert short.figures["throughput_rps"].value + long.figures["throughput_rps"].value == pytest.approx(3 / 9)


def test_percentiles_of_rows_are_numpys() -> None:
    """The same as numpy's, row by row, NaN left out."""
    rng = np.random.default_rng(2)
    values = rng.exponential(1.0, (20, 33))
    values[rng.random((20, 33)) < 0.3] = np.nan
    for share in (0.0, 0.5, 0.99, 1.0):
        expected = np.nanpercentile(values, 100 * share, axis=1)
        np.testing.assert_allclose(percentile_of_rows(values, share), expected)


def test_without_a_finished_request_there_are_no_latencies() -> None:
    """All failed: latencies are NaN, rates are zero, nothing raises."""
    records = live_records([0.0, 1.0], [math.nan] * 2, [math.nan] * 2, [5, 5], [2, 2])
    whole = summarise_groups(records, SLO, 100, np.random.default_rng(0))["all"]
    assert math.isnan(whole.figures["e2e_s_p99"].value)
    assert whole.figures["goodput_rps"].value == 0.0
    assert whole.failed == 2


def test_the_interval_covers_the_true_mean() -> None:
    """Of 30 runs of independent exponential latencies, nearly all intervals hold the mean; correlation widens them."""
    rng = np.random.default_rng(5)
    n, held = 200, 0
    for _ in range(30):
        e2e_s = rng.exponential(1.0, n)
        records = live_records(np.cumsum(rng.exponential(1.0, n)), e2e_s / 2, e2e_s, [10] * n, [5] * n)
        mean = summarise_groups(records, SLO, 100, rng)["all"].figures["e2e_s_mean"]
        assert mean.low < mean.value < mean.high
        held += mean.low <= 1.0 <= mean.high
    assert held >= 25
    arrival_s = np.arange(n, dtype=np.float64) / 20.0
    waves = 1.0 + 0.9 * np.sin(arrival_s)
    shuffled = rng.permutation(waves)
    width = {}
    for name, e2e_s in (("waves", waves), ("shuffled", shuffled)):
        records = live_records(arrival_s, e2e_s / 2, e2e_s, [10] * n, [5] * n)
        mean = summarise_groups(records, SLO, 100, np.random.default_rng(0))["all"].figures["e2e_s_mean"]
        width[name] = mean.high - mean.low
    assert width["waves"] > 1.5 * width["shuffled"]


def test_blocks_are_neighbours() -> None:
    """Each draw has as many rows as the run, in stretches of neighbours, from at least four blocks."""
    draws = block_draws(40, 5, np.random.default_rng(0))
    assert draws is not None
    assert draws.shape[1] == 40
    steps = np.diff(draws.reshape(len(draws), 8, 5), axis=2) % 40
    assert np.all(steps == 1)
    assert block_draws(19, 5, np.random.default_rng(0)) is None


def test_over_runs_and_ratios_by_hand() -> None:
    """Several runs: Student's t; ratios by pairs, geometric; runs without a partner or a value do not count."""
    nan = math.nan
    runs = [Estimate(v, nan, nan) for v in (1.0, 2.0, 3.0)]
    mean = over_runs(runs)
    assert mean.value == pytest.approx(2.0)
    assert mean.high - mean.value == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert over_runs([Estimate(1.0, 0.5, 1.5)]) == Estimate(1.0, 0.5, 1.5)
    ratio = ratio_over_runs(runs, [Estimate(v, nan, nan) for v in (2.0, 1.0, 3.0)])
    assert ratio.value == pytest.approx(1.0)
    assert ratio.low < 1.0 < ratio.high
    two = ratio_over_runs(runs, [Estimate(v, nan, nan) for v in (2.0, 1.0)])
    assert two.value == pytest.approx(1.0)
    assert math.isnan(two.low)
    assert math.isnan(two.high)
    assert math.isnan(ratio_over_runs(runs, [Estimate(0.0, nan, nan), Estimate(nan, nan, nan)]).value)


def test_rates_of_one_run_have_no_interval() -> None:
    """They are the offered rate over one span of time; an interval of zero width would be a claim."""
    n = 400
    records = live_records(range(n), [0.1] * n, [0.2] * n, [10] * n, [5] * n)
    figures = summarise_groups(records, SLO, 1000, np.random.default_rng(0))["all"].figures
    for name in ("throughput_rps", "throughput_tokens_per_s", "goodput_rps"):
        assert figures[name].value > 0.0
        assert math.isnan(figures[name].low)
    assert not math.isnan(figures["slo_attainment"].low)


def test_small_things() -> None:
    """Errors are counted by kind, the warm-up drops the first, long means four medians, empty groups are left out."""
    assert errors_by_kind(["", "HTTP 429: busy", "timed out: x", "HTTP 429: no"]) == {"HTTP 429": 2, "timed out": 1}
    records = live_records(range(10), [0.1] * 10, [0.2] * 10, [10] * 10, [5] * 10)
    assert counted_rows(records, 0.25).arrival_s.tolist() == [2, 3, 4, 5, 6, 7, 8, 9]
    assert long_from_tokens(records) == 60
    assert set(groups_of(records, 60)) == {"all", "short"}

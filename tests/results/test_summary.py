"""Figures of a run, worked out by hand."""

import math

import numpy as np
import pytest

from cascadeinfer.results.records import RequestRecords
from cascadeinfer.results.summary import Slo, interval, summarise


def records(first_s: list[float], finish_s: list[float], outputs: list[int]) -> RequestRecords:
    """Requests that arrive at 0; NaN for what did not happen."""
    n = len(outputs)
    zeros = np.zeros(n, dtype=np.int64)
    finished = np.isfinite(finish_s)
    return RequestRecords(
        arrival_s=np.zeros(n),
        dispatched_s=np.zeros(n),
        scheduled_s=np.zeros(n),
        first_token_s=np.asarray(first_s),
        finish_s=np.asarray(finish_s),
        prompt_tokens=zeros + 10,
        output_tokens=np.asarray(outputs),
        produced_tokens=np.where(finished, outputs, 0),
        migrations=zeros + 1,
        preemptions=zeros,
        recomputed_tokens=zeros,
        prefix_hit_tokens=zeros,
        rejected=~finished,
        aborted=np.zeros(n, dtype=np.bool_),
    )


def test_figures_by_hand() -> None:
    """Two finished requests and one refused: means over the two, rates over the run, SLO over all three."""
    run = summarise(
        records([1.0, 3.0, math.nan], [2.0, 12.0, math.nan], [11, 10, 5]), 20.0, Slo(ttft_s=2.0, tpot_s=0.5)
    )
    assert run.requests == 3
    assert run.unfinished == 1
    assert run.ttft_s_mean == pytest.approx(2.0)
    assert run.ttft_s_p99 == pytest.approx(1.0 + 0.99 * 2.0)
    assert run.tpot_s_mean == pytest.approx((0.1 + 1.0) / 2)
    assert run.tpot_s_p99 == pytest.approx(0.1 + 0.99 * 0.9)
    assert run.normalised_latency_s_mean == pytest.approx((2.0 / 11 + 1.2) / 2)
    assert run.e2e_s_p50 == pytest.approx(7.0)
    assert run.throughput_rps == pytest.approx(0.1)
    assert run.throughput_tokens_per_s == pytest.approx(21 / 20)
    assert run.slo_attainment == pytest.approx(1 / 3)
    assert run.goodput_rps == pytest.approx(1 / 20)
    assert run.migrations == 3


def test_one_token_outputs_have_no_tpot_to_miss() -> None:
    """An output of one token meets the TPOT part of every SLO, and does not affect the mean TPOT."""
    run = summarise(records([1.0], [1.0], [1]), 2.0, Slo(ttft_s=1.0, tpot_s=0.0))
    assert run.slo_attainment == 1.0
    assert math.isnan(run.tpot_s_mean)
    assert math.isnan(run.tpot_s_p99)


def test_interval_is_students() -> None:
    """Of 1, 2, 3 the 95 % half-width is t(0.975, 2) / sqrt(3) = 2.484; one value has none."""
    assert interval([1.0, 2.0, 3.0]).mean == pytest.approx(2.0)
    assert interval([1.0, 2.0, 3.0]).half_width == pytest.approx(2.4841, abs=1e-4)
    assert math.isnan(interval([5.0]).half_width)
    assert str(interval([5.0])) == "5"


def test_an_empty_run_has_no_summary() -> None:
    """No requests, or no duration, is an error and not a row of zeros."""
    with pytest.raises(ValueError, match="positive duration"):
        summarise(records([], [], []), 1.0, Slo(1.0, 1.0))
    with pytest.raises(ValueError, match="positive duration"):
        summarise(records([1.0], [1.0], [1]), 0.0, Slo(1.0, 1.0))

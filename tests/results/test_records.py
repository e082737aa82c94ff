"""Derived columns of records, worked out by hand."""

import math

import numpy as np

from cascadeinfer.results.records import InstanceSamples, MigrationRecords, RequestRecords

ZEROS = np.zeros(3, dtype=np.int64)
REQUESTS = RequestRecords(
    arrival_s=np.array([1.0, 2.0, 3.0]),
    dispatched_s=np.array([1.0, 2.0, math.nan]),
    scheduled_s=np.array([1.5, 2.0, math.nan]),
    first_token_s=np.array([2.0, 2.5, math.nan]),
    finish_s=np.array([4.0, 2.5, math.nan]),
    prompt_tokens=ZEROS + 10,
    output_tokens=np.array([5, 1, 7]),
    produced_tokens=np.array([5, 1, 0]),
    migrations=ZEROS,
    preemptions=ZEROS,
    recomputed_tokens=ZEROS,
    prefix_hit_tokens=ZEROS,
    rejected=np.array([False, False, True]),
    aborted=np.array([False, False, False]),
)


def test_latencies_of_requests() -> None:
    """TTFT and end-to-end latency count from arrival, TPOT from the first token; what never happened is NaN."""
    np.testing.assert_allclose(REQUESTS.ttft_s, [1.0, 0.5, math.nan])
    np.testing.assert_allclose(REQUESTS.tpot_s, [0.5, math.nan, math.nan])
    np.testing.assert_allclose(REQUESTS.e2e_s, [3.0, 0.5, math.nan])
    np.testing.assert_allclose(REQUESTS.normalised_latency_s, [0.6, 0.5, math.nan])
    np.testing.assert_allclose(REQUESTS.queueing_s, [0.5, 0.0, math.nan])
    assert REQUESTS.finished.tolist() == [True, True, False]


def test_a_window_of_arrivals_is_half_open() -> None:
    """`[2, 3)` has the request of 2.0 and not that of 3.0."""
    assert REQUESTS.arrived_in(2.0, 3.0).output_tokens.tolist() == [1]
    assert len(REQUESTS.rows(REQUESTS.finished)) == 2


def test_the_pause_of_a_migration() -> None:
    """The pause lasts from the cut to the target's first token; without a cut there is none."""
    two = np.zeros(2, dtype=np.int64)
    moves = MigrationRecords(
        started_s=np.array([1.0, 1.0]),
        cut_s=np.array([1.25, math.nan]),
        ended_s=np.array([1.5, 2.0]),
        row=two,
        source=two,
        target=two,
        tokens=two,
        pulled_tokens=two,
        outcome=("moved", "stayed"),
        reason=("rebalance", "rebalance"),
        detail=("", "room_refused"),
    )
    np.testing.assert_allclose(moves.pause_s, [0.25, math.nan])
    assert len(moves) == 2


def test_samples_of_instances() -> None:
    """The mean length is over running requests, NaN without any; a timeline belongs to one instance."""
    samples = InstanceSamples(
        time_s=np.array([0.1, 0.2, 0.3]),
        instance=np.array([0, 1, 0]),
        stage=ZEROS,
        running=np.array([2, 1, 0]),
        waiting=ZEROS,
        running_tokens=np.array([100, 7, 0]),
        kv_use=np.zeros(3),
        step_s=np.zeros(3),
    )
    np.testing.assert_allclose(samples.mean_tokens, [50.0, 7.0, math.nan])
    assert samples.of_instance(0).time_s.tolist() == [0.1, 0.3]
    assert len(samples) == 3

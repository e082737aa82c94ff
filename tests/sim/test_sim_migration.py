"""Migrations that fail at each step, and those that policies request."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim_builders import ROUND_MODEL, MoveOnce, config, policy_named, same, tight

from cascadeinfer.core.events import InstanceLost, RequestFinished
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.migration import MigrationLimits
from cascadeinfer.core.policies.static_stages import StaticStages
from cascadeinfer.core.types import InstanceCapacity
from cascadeinfer.sim.faults import Crash, Disconnect, Drain, FaultPlan, LateJoin
from cascadeinfer.sim.run import SimResult, simulate
from cascadeinfer.sim.settings import NetworkConfig, SimConfig, instance_ids
from cascadeinfer.workload.trace import Trace

NETWORK = NetworkConfig(link_bytes_per_s=1e9, pull_overhead_s=0.005, control_s=0.001)
TRACE = Trace.from_columns([100], [100], [0.0])
# The run of test_sim_golden: asked 100, granted 102, cut command 103, cut 108, pull [114, 222), first token 233 ms.
MOMENTS = {
    "before the ask": 0.1005,
    "before the answer": 0.1015,
    "before the cut command": 0.1025,
    "before the cut": 0.105,
    "before the pull": 0.110,
    "in the pull": 0.150,
    "after the pull": 0.225,
}


def moving(faults: FaultPlan, **changes: object) -> tuple[SimResult, MoveOnce]:
    """The golden migration with faults."""
    policy = MoveOnce(0.1)
    settings = config(
        step_model=ROUND_MODEL, kv_bytes_per_token=1e6, network=NETWORK, faults=faults, detect_s=0.0, **changes
    )
    return simulate(TRACE, policy, settings, check=True), policy


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("detect_s", [0.0, 0.004, 0.3])
@pytest.mark.parametrize("victim", ["i0", "i1"])
def test_a_crash_at_each_step_loses_nothing(moment: str, detect_s: float, victim: str) -> None:
    """Whichever side dies, however late it is noticed: one MigrationEnded, each token once, the request finishes."""
    at_s = MOMENTS[moment]
    policy = MoveOnce(0.1)
    settings = config(
        step_model=ROUND_MODEL,
        kv_bytes_per_token=1e6,
        network=NETWORK,
        faults=FaultPlan(crashes=(Crash(at_s, victim, 1.0),)),
        detect_s=detect_s,
    )
    result = simulate(TRACE, policy, settings, check=True)
    assert result.requests.finished.all()
    assert result.requests.produced_tokens.tolist() == [100]
    assert len(policy.ended) == 1
    same(result, simulate(TRACE, MoveOnce(0.1), replace(settings, fast_forward=False)))


@pytest.mark.parametrize(
    ("moment", "victim", "outcome", "recomputed"),
    [
        ("before the ask", "i0", "lost", True),
        ("before the ask", "i1", "stayed", False),
        ("before the cut", "i0", "lost", True),
        ("before the cut", "i1", "stayed", False),
        ("in the pull", "i0", "recomputed", True),
        ("in the pull", "i1", "lost", True),
        ("after the pull", "i0", "recomputed", True),
        ("after the pull", "i1", "lost", True),
    ],
)
def test_a_crash_ends_a_migration_as_the_table_says(moment: str, victim: str, outcome: str, recomputed: bool) -> None:
    """A death noticed at once has the outcome of `core/migration/`; only losing the target before the cut is free."""
    result, policy = moving(FaultPlan(crashes=(Crash(MOMENTS[moment], victim, 1.0),)))
    assert [event.outcome.value for event in policy.ended] == [outcome]
    assert (result.requests.recomputed_tokens[0] > 0) == recomputed
    assert result.requests.finished.all()


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_client_that_leaves_at_each_step_leaves_nothing_behind(moment: str) -> None:
    """The migration and the request end once, and (checked after every event) all blocks are freed."""
    at_s = MOMENTS[moment]
    finished: list[RequestFinished] = []

    def look(_: float, event: object, __: object) -> None:
        if isinstance(event, RequestFinished):
            finished.append(event)

    policy = MoveOnce(0.1)
    trace = Trace.from_columns([100, 10], [100, 5], [0.0, 3.0])  # the second keeps the clock going
    settings = config(
        step_model=ROUND_MODEL,
        kv_bytes_per_token=1e6,
        network=NETWORK,
        faults=FaultPlan(disconnects=(Disconnect(at_s, 0),)),
    )
    result = simulate(trace, policy, settings, check=True, observer=look)
    assert [event.outcome.value for event in policy.ended] == ["ended"]
    assert [event.request_id for event in finished] == ["r0", "r1"]
    assert result.requests.aborted.tolist() == [True, False]
    assert result.samples.kv_use[result.samples.time_s > at_s + 0.2][:4].max() == 0.0


def test_a_pull_slower_than_the_lease_is_given_up() -> None:
    """If the time limit of RESUMING passes during the pull, the source takes the request back."""
    result, policy = moving(FaultPlan(), migration=MigrationLimits(resume_s=0.05, least_pull_s=0.0))
    assert [event.outcome.value for event in policy.ended] == ["stayed"]
    assert policy.ended[0].detail == "timed_out"
    assert result.requests.recomputed_tokens[0] == 108
    # The cut was sent at 102 ms: 50 ms later, then a prompt of 109 tokens on an idle instance: 10 + 10.9 ms.
    assert result.migrations.ended_s[0] == pytest.approx(0.152 + 0.0209)


def test_a_full_target_refuses() -> None:
    """The target's only slot is taken: the request stays and never pauses."""
    capacity = InstanceCapacity(kv_blocks=4096, block_size_tokens=16, max_num_seqs=1, max_batched_tokens=2048)
    trace = Trace.from_columns([100, 100], [50, 100], [0.0, 0.0])
    policy = MoveOnce(0.1)
    settings = config(step_model=ROUND_MODEL, network=NETWORK, capacity=capacity)
    result = simulate(trace, policy, settings, check=True)
    assert [(e.outcome.value, e.detail) for e in policy.ended] == [("stayed", "room_refused:no_slot")]
    assert result.requests.finish_s[0] == pytest.approx(0.020 + 49 * 0.011)


def test_a_request_about_to_end_ends_where_it_is() -> None:
    """If its last token comes before the cut, the migration ends and the target's room is free again."""
    trace = Trace.from_columns([100, 10], [9, 5], [0.0, 1.0])  # its last token is due at 108 ms, when the cut would be
    policy = MoveOnce(0.1)
    result = simulate(trace, policy, config(step_model=ROUND_MODEL, network=NETWORK), check=True)
    assert [(e.outcome.value, e.detail) for e in policy.ended] == [("ended", "request_ended")]
    assert result.requests.finish_s[0] == pytest.approx(0.108)


def test_a_move_of_what_is_gone_ends_at_once() -> None:
    """Moving a request that has ended, or is elsewhere, gives exactly one answer: stale."""
    policy = MoveOnce(0.5)
    trace = Trace.from_columns([10, 10], [3, 3], [0.0, 1.0])
    simulate(trace, policy, config(step_model=ROUND_MODEL), check=True)
    assert [(e.outcome.value, e.detail) for e in policy.ended] == [("ended", "stale")]
    elsewhere = MoveOnce(0.1, source_id="i1", target_id="i0")
    simulate(TRACE, elsewhere, config(step_model=ROUND_MODEL), check=True)
    assert [(e.outcome.value, e.detail) for e in elsewhere.ended] == [("stayed", "stale")]


def mixed_trace(n: int, rate_rps: float, seed: int) -> Trace:
    """Chats that grow from a few hundred tokens past 512, and some long ones."""
    rng = np.random.default_rng(seed)
    return Trace.from_columns(
        np.where(rng.random(n) < 0.8, rng.integers(50, 500, n), rng.integers(600, 2500, n)),
        rng.integers(20, 600, n),
        np.cumsum(rng.exponential(1.0 / rate_rps, n)),
    )


def staged() -> tuple[SimConfig, StaticStages]:
    """Four instances in two stages, cut at 512."""
    ids = instance_ids(4)
    layout = StageLayout.from_boundaries((512,), (ids[:2], ids[2:]))
    return config(instances=4), StaticStages(layout=layout)


def test_static_stages_hand_over_for_real() -> None:
    """On a mixed trace requests that outgrow 512 tokens move to the second stage, and none is recomputed."""
    settings, policy = staged()
    trace = mixed_trace(300, 12.0, 1)
    result = simulate(trace, policy, settings, check=True)
    moves = result.migrations
    outcomes = Counter(moves.outcome)
    grew = (trace.prompt_tokens < 512) & (trace.total_tokens > 540)
    assert outcomes["moved"] > 0.8 * grew.sum()
    moved = np.array([outcome == "moved" for outcome in moves.outcome])
    assert set(moves.source[moved].tolist()) <= {0, 1}
    assert set(moves.target[moved].tolist()) <= {2, 3}
    assert (moves.tokens[moved] >= 512).all()
    assert (moves.pulled_tokens[moved] == moves.tokens[moved] - 1).all()
    assert set(moves.reason) == {"outgrew_stage"}
    assert result.requests.recomputed_tokens.sum() == 0
    assert result.requests.finished.all()
    assert set(result.samples.stage.tolist()) == {0, 1}
    in_second = result.samples.mean_tokens[(result.samples.stage == 1) & (result.samples.running > 0)]
    in_first = result.samples.mean_tokens[(result.samples.stage == 0) & (result.samples.running > 0)]
    assert in_second.mean() > 2 * in_first.mean()


def test_a_drained_instance_empties_and_leaves() -> None:
    """Its requests move to the other stage or finish; then it is removed, without orphans, and gets nothing more."""
    settings, policy = staged()
    lost: list[tuple[float, InstanceLost]] = []

    def look(now_s: float, event: object, _: object) -> None:
        if isinstance(event, InstanceLost):
            lost.append((now_s, event))

    faults = FaultPlan(drains=(Drain(5.0, "i1"),))
    trace = mixed_trace(200, 12.0, 2)
    result = simulate(trace, policy, replace(settings, faults=faults), check=True, observer=look)
    assert [event.instance_id for _, event in lost] == ["i1"]
    assert lost[0][1].orphan_ids == ()
    assert lost[0][0] > 5.0
    assert result.requests.finished.all()
    assert result.requests.recomputed_tokens.sum() == 0
    assert result.samples.time_s[result.samples.instance == 1].max() <= lost[0][0]


def test_an_instance_that_joins_late_gets_work() -> None:
    """It is absent before, and takes requests afterwards."""
    faults = FaultPlan(late_joins=(LateJoin(2.0, "i1"),))
    trace = mixed_trace(100, 10.0, 3)
    result = simulate(trace, policy_named("round_robin", 2), config(faults=faults), check=True)
    second = result.samples.instance == 1
    assert result.samples.time_s[second].min() > 2.0
    assert result.samples.running[second].max() > 0


def test_requests_of_a_dead_instance_go_on_elsewhere() -> None:
    """They are recomputed from the prompt and output so far, and every one finishes with all its tokens."""
    trace = mixed_trace(60, 20.0, 4)
    faults = FaultPlan(crashes=(Crash(2.0, "i1", 3.0),))
    result = simulate(trace, policy_named("least_loaded", 2), config(faults=faults), check=True)
    requests = result.requests
    assert requests.finished.all()
    assert (requests.produced_tokens == requests.output_tokens).all()
    assert (requests.recomputed_tokens > 0).any()
    on_the_dead = result.samples.time_s[result.samples.instance == 1]
    assert not ((on_the_dead > 2.0) & (on_the_dead < 5.0)).any(), "no reports from the dead"


@settings(max_examples=40)
@given(
    crash_s=st.floats(0.05, 0.4),
    victim=st.sampled_from(["i0", "i1", "i2"]),
    detect_s=st.sampled_from([0.0, 0.05, 3.0]),
    leave_s=st.floats(0.05, 0.4),
    seed=st.integers(0, 1000),
)
def test_crash_and_departure_around_moves(
    crash_s: float, victim: str, detect_s: float, leave_s: float, seed: int
) -> None:
    """Three requests with a move, a departing client and a death at any times: invariants hold, the others finish."""
    trace = Trace.from_columns([20, 30, 10], [60, 40, 50], [0.0, 0.0, 0.01])
    faults = FaultPlan(
        crashes=(Crash(crash_s, victim, 0.5),), disconnects=(Disconnect(leave_s, seed % 3),), message_drop=0.1
    )
    policy = MoveOnce(0.1 + (seed % 7) * 0.013, request_id=f"r{seed % 2}", source_id=f"i{seed % 2}", target_id="i2")
    settings = tight(step_model=ROUND_MODEL, faults=faults, detect_s=detect_s, seed=seed)
    result = simulate(trace, policy, settings, check=True)
    assert (result.requests.finished | result.requests.aborted).all()
    assert len(policy.ended) <= 1

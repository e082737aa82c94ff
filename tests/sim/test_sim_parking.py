"""Requests that stop with their first token, are parked, and are pushed to the instance that decodes them."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim_builders import ROUND_MODEL, config, faulty, random_trace, same, tight

from cascadeinfer.core.effects import Dispatch, Effect
from cascadeinfer.core.events import Event, FirstToken, InstanceLost, MigrationEnded, RequestArrived
from cascadeinfer.core.layout import RoleLayout, Stage, StageLayout
from cascadeinfer.core.parking import ParkingLimits
from cascadeinfer.core.policies.pd_fixed import PdFixed
from cascadeinfer.core.policies.roles import Roles
from cascadeinfer.core.types import InstanceCapacity, LengthRange
from cascadeinfer.sim.faults import Crash, Disconnect, Drain, FaultPlan
from cascadeinfer.sim.run import SimResult, simulate
from cascadeinfer.sim.settings import NetworkConfig, SimConfig, instance_ids
from cascadeinfer.workload.trace import Trace

NETWORK = NetworkConfig(link_bytes_per_s=1e9, pull_overhead_s=0.005, control_s=0.001)
TRACE = Trace.from_columns([100], [50], [0.0])
SPLIT = RoleLayout(StageLayout.single(("i1",)), (Stage(LengthRange(0), ("i0",)),))
# The first token comes after 10 + 10 ms; asked 20, room 21, granted 22, pull [28, 128): 100 tokens of 1 MB at 1 GB/s.
MOMENTS = {"in the prompt": 0.010, "before the ask": 0.0205, "before the answer": 0.0215, "in the pull": 0.080}


class Seen:
    """Keeps the events of a run by type."""

    def __init__(self) -> None:
        self.events: list[tuple[float, Event, list[Effect]]] = []

    def __call__(self, now_s: float, event: Event, effects: list[Effect]) -> None:
        """Keep one."""
        self.events.append((now_s, event, effects))

    def of(self, kind: type) -> list[Event]:
        """Those of one type."""
        return [event for _, event, _ in self.events if isinstance(event, kind)]


def pushed(trace: Trace = TRACE, **changes: object) -> tuple[SimResult, Seen]:
    """A run of one prefill and one decode instance, with times that can be added up by hand."""
    seen = Seen()
    plain: SimConfig = config(step_model=ROUND_MODEL, kv_bytes_per_token=1e6, network=NETWORK, detect_s=0.0, **changes)
    return simulate(trace, PdFixed(roles=SPLIT), plain, check=True, observer=seen), seen


def test_a_push_takes_the_time_that_it_should() -> None:
    """Prompt, park, ask, pull, decode: each moment is known, and the prefill instance decodes nothing."""
    result, seen = pushed()
    assert result.requests.first_token_s.tolist() == pytest.approx([0.020])
    first = next(entry for entry in seen.events if isinstance(entry[1], FirstToken))
    assert first[0] == pytest.approx(0.020)
    moves = result.migrations
    assert (list(moves.outcome), list(moves.reason)) == (["moved"], ["prefilled"])
    assert moves.cut_s.tolist() == pytest.approx([0.020])
    assert moves.ended_s.tolist() == pytest.approx([0.128 + 0.011])
    assert moves.pulled_tokens.tolist() == [100]
    assert result.requests.finish_s.tolist() == pytest.approx([0.128 + 49 * 0.011])
    assert result.requests.recomputed_tokens.tolist() == [0]


def test_an_output_of_one_token_is_not_parked() -> None:
    """It ends with its first token: nothing is pinned, nobody is told, nothing moves."""
    result, seen = pushed(Trace.from_columns([100, 10], [1, 1], [0.0, 1.0]))
    assert result.requests.finished.all()
    assert not seen.of(FirstToken)
    assert len(result.migrations) == 0


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("detect_s", [0.0, 0.3])
@pytest.mark.parametrize("victim", ["i0", "i1"])
def test_a_crash_at_each_step_loses_nothing(moment: str, detect_s: float, victim: str) -> None:
    """Whichever side dies, the request finishes with each token once; a parked one of a dead instance is recomputed."""
    seen = Seen()
    faults = FaultPlan(crashes=(Crash(MOMENTS[moment], victim, 1.0),))
    plain = config(step_model=ROUND_MODEL, kv_bytes_per_token=1e6, network=NETWORK, faults=faults, detect_s=detect_s)
    result = simulate(TRACE, PdFixed(roles=SPLIT), plain, check=True, observer=seen)
    assert result.requests.finished.all()
    assert result.requests.produced_tokens.tolist() == [50]
    if victim == "i0":
        assert seen.of(InstanceLost)
        assert (result.requests.recomputed_tokens[0] > 0) == (moment != "in the prompt")


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_client_that_leaves_at_each_step_leaves_nothing_behind(moment: str) -> None:
    """All blocks are free afterwards (checked after every event), and the run goes on."""
    trace = Trace.from_columns([100, 10], [50, 5], [0.0, 3.0])
    result, _ = pushed(trace, faults=FaultPlan(disconnects=(Disconnect(MOMENTS[moment], 0),)))
    assert result.requests.aborted.tolist() == [True, False]
    assert result.samples.kv_use[(result.samples.time_s > 0.5) & (result.samples.time_s < 2.9)].max() == 0.0


def test_a_request_stays_parked_while_nobody_has_room() -> None:
    """The only slot of the decode instance is taken: the second request waits, without decoding, until it is free."""
    slots = InstanceCapacity(kv_blocks=4096, block_size_tokens=16, max_num_seqs=1, max_batched_tokens=2048)
    trace = Trace.from_columns([100, 100], [100, 10], [0.0, 0.3])
    result, seen = pushed(trace, capacity=slots)
    assert len(seen.of(FirstToken)) == 2
    assert result.requests.finished.all()
    assert result.requests.recomputed_tokens.tolist() == [0, 0]
    assert result.requests.first_token_s[1] < result.requests.finish_s[0] < result.requests.finish_s[1]


def test_a_request_that_is_parked_for_too_long_is_taken_back() -> None:
    """Nobody takes it within `park_s`: it is recomputed and decodes where it is, on an instance for prompts."""
    slots = InstanceCapacity(kv_blocks=4096, block_size_tokens=16, max_num_seqs=1, max_batched_tokens=2048)
    trace = Trace.from_columns([100, 100], [200, 10], [0.0, 0.3])
    result, _ = pushed(trace, capacity=slots, parking=ParkingLimits(park_s=0.3))
    assert result.requests.finished.all()
    assert result.requests.recomputed_tokens.tolist() == [0, 100]
    assert result.requests.finish_s[1] < result.requests.finish_s[0]


def test_a_refused_push_is_tried_again() -> None:
    """The target dies unnoticed before it answers: the ask times out, the request stays parked and is pushed again."""
    faults = FaultPlan(crashes=(Crash(0.0205, "i1", 0.1),))
    seen = Seen()
    layout = RoleLayout(StageLayout.single(("i1", "i2")), (Stage(LengthRange(0), ("i0",)),))
    plain = config(
        instances=3, step_model=ROUND_MODEL, kv_bytes_per_token=1e6, network=NETWORK, detect_s=3.0, faults=faults
    )
    result = simulate(TRACE, PdFixed(roles=layout), plain, check=True, observer=seen)
    ended = [event for event in seen.of(MigrationEnded) if isinstance(event, MigrationEnded)]
    assert next((event.outcome.value, event.detail) for event in ended) == ("stayed", "timed_out")
    assert ended[-1].outcome.value == "moved"
    assert result.requests.recomputed_tokens.tolist() == [0]


def test_a_draining_prefill_instance_empties() -> None:
    """What it has is pushed, new prompts are computed where they decode, and it leaves without orphans."""
    trace = Trace.from_columns([100] * 10, [30] * 10, [0.05 * n for n in range(10)])
    result, seen = pushed(trace, faults=FaultPlan(drains=(Drain(0.2, "i0"),)))
    lost = [event for event in seen.of(InstanceLost) if isinstance(event, InstanceLost)]
    assert [event.orphan_ids for event in lost] == [()]
    assert result.requests.finished.all()
    late = [
        effect
        for at_s, event, effects in seen.events
        if at_s > 0.21 and isinstance(event, RequestArrived)
        for effect in effects
    ]
    assert late
    assert all(isinstance(effect, Dispatch) and not effect.park and effect.instance_id == "i1" for effect in late)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    rate_rps=st.sampled_from([5.0, 40.0]),
    threshold=st.sampled_from([0, 25]),
    name=st.sampled_from(["pd_fixed", "roles"]),
    caching=st.booleans(),
)
def test_pushes_under_any_faults(seed: int, rate_rps: float, threshold: int, name: str, caching: bool) -> None:
    """With deaths, departures and lost messages on tiny instances, invariants hold, and nothing is lost or doubled."""
    ids = instance_ids(3)
    layout = RoleLayout(
        StageLayout.from_boundaries((60,), (ids[1:2], ids[2:])), (Stage(LengthRange(threshold), ids[:1]),)
    )
    trace = random_trace(np.random.default_rng(seed), 60, rate_rps)
    plain = tight(faults=faulty(seed, trace, 3), prefix_caching=caching, seed=seed)
    make = PdFixed if name == "pd_fixed" else Roles
    seen = Seen()
    result = simulate(trace, make(roles=layout), plain, check=True, observer=seen)
    assert (result.requests.finished | result.requests.aborted).all()
    begun = Counter(e.migration_id for _, _, effects in seen.events for e in effects if hasattr(e, "migration_id"))
    ended = Counter(e.migration_id for e in seen.of(MigrationEnded) if isinstance(e, MigrationEnded))
    assert begun == ended
    from dataclasses import replace

    same(result, simulate(trace, make(roles=layout), replace(plain, fast_forward=False)))

"""Admission: the rate at which requests end, when a refused client may retry, who is refused, who runs first."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeinfer.core.effects import Reject
from cascadeinfer.core.placing.admission import MAX_RETRY_S, MIN_RETRY_S, DrainRate
from cascadeinfer.core.policies.cascade import Cascade
from cascadeinfer.core.types import InstanceCapacity
from support.policy_world import World

ONE_AT_A_TIME = InstanceCapacity(kv_blocks=64, block_size_tokens=16, max_num_seqs=1, max_batched_tokens=512)


def world_with(max_queued: int) -> World:
    """One instance that runs one request at a time."""
    world = World(Cascade(max_queued=max_queued, retry_after_s=5.0), ONE_AT_A_TIME, may_hold_back=True)
    world.join("a")
    return world


def place(world: World, request_id: str) -> str | None:
    """Where a request is."""
    return world.requests[request_id].instance_id


def test_the_wait_follows_the_rate() -> None:
    """With two ends per second and nine waiting, the tenth may come after five seconds; a stall makes it longer."""
    rate = DrainRate()
    for number in range(21):
        rate.note_end(0.5 * number)
    assert rate.per_second(10.0) == pytest.approx(2.0)
    assert rate.retry_after_s(9, 10.0, 7.0) == pytest.approx(5.0)
    assert rate.retry_after_s(9, 20.0, 7.0) == pytest.approx(10.0)


def test_an_unknown_rate_is_not_guessed() -> None:
    """Before the second end, if all came at the same moment, or after an idle minute, the default is used."""
    rate = DrainRate()
    assert rate.retry_after_s(9, 0.0, 7.0) == 7.0
    rate.note_end(1.0)
    assert rate.retry_after_s(9, 2.0, 7.0) == 7.0
    rate.note_end(1.0)
    assert rate.retry_after_s(9, 1.0, 7.0) == 7.0
    assert rate.retry_after_s(9, 100.0, 7.0) == 7.0


@given(st.lists(st.floats(0.0, 20.0), max_size=200), st.integers(0, 10**6))
def test_the_wait_is_bounded(gaps_s: list[float], n_queued: int) -> None:
    """Whenever requests end, the wait is between a second and a minute, and never shorter for a longer queue."""
    rate, now_s = DrainRate(), 0.0
    for gap_s in gaps_s:
        now_s += gap_s
        rate.note_end(now_s)
    told = rate.retry_after_s(n_queued, now_s, 7.0)
    assert MIN_RETRY_S <= told <= MAX_RETRY_S
    assert rate.retry_after_s(n_queued + 1, now_s, 7.0) >= told


def test_lower_priorities_run_first_and_equal_ones_in_order() -> None:
    """Waiting requests run by priority, then by arrival."""
    world = world_with(8)
    world.arrive("running", 50)
    for request_id, priority in (("late", 5), ("first", 0), ("second", 0), ("urgent", -1)):
        world.arrive(request_id, 50, priority=priority)
    order = []
    running = "running"
    for _ in range(4):
        world.finish(running)
        (running,) = [request.request_id for request in world.on("a")]
        order.append(running)
    assert order == ["urgent", "first", "second", "late"]


def test_a_full_queue_refuses_who_would_run_last() -> None:
    """An urgent newcomer displaces the youngest of the least urgent; one less urgent than all is itself refused."""
    world = world_with(2)
    world.arrive("running", 50)
    world.arrive("old", 50, priority=1)
    world.arrive("young", 50, priority=1)
    world.arrive("urgent", 50)
    world.arrive("idle", 50, priority=9)
    assert world.rejected == ["young", "idle"]
    world.finish("running")
    assert place(world, "urgent") == "a"


def test_refused_clients_are_told_the_observed_wait() -> None:
    """One request ends every two seconds: with three waiting, the fourth may come after eight."""
    world = world_with(3)
    for number in range(4):
        world.arrive(f"r{number}", 50)
    for number in range(12):
        world.advance(2.0)
        world.finish(f"r{number}")
        world.arrive(f"r{number + 4}", 50)
    world.arrive("refused", 50)
    (refused,) = [effect for effect in world.log if isinstance(effect, Reject)]
    assert refused.request_id == "refused"
    assert refused.retry_after_s == pytest.approx(8.0)


def test_orphans_with_output_are_not_refused() -> None:
    """A client that is reading is not told to retry: after its instance's death, it waits beside a full queue."""
    world = world_with(1)
    world.join("b")
    world.arrive("reading", 50)
    world.arrive("other", 50)
    (here,) = {place(world, "reading")}
    assert here is not None
    world.report(here)
    world.grow(here, 10)
    world.report(here)
    world.lose(here)
    world.arrive("new", 50)
    world.arrive("newer", 50)
    assert "reading" not in world.rejected
    assert world.rejected == ["new", "newer"]


def test_a_prompt_as_long_as_the_cache_is_taken_by_an_idle_instance() -> None:
    """A request that never fits together with a spare block does not wait for ever."""
    world = world_with(4)
    world.arrive("small", 50)
    world.arrive("whole", ONE_AT_A_TIME.kv_tokens, 1)
    assert place(world, "whole") is None
    world.finish("small")
    assert place(world, "whole") == "a"

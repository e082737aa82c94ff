"""Each baseline follows its formula, on examples small enough to work out by hand."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeinfer.core.effects import MigrationReason, PublishLayout, StartMigration
from cascadeinfer.core.errors import PlanError
from cascadeinfer.core.events import (
    InstanceDraining,
    InstanceJoined,
    InstanceLost,
    InstanceReport,
    InstanceReported,
    MigrationOutcome,
    PinReason,
    RequestArrived,
)
from cascadeinfer.core.kind import InstanceKind
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.placing.prefix_index import PrefixIndex
from cascadeinfer.core.policies.least_loaded import LeastLoaded
from cascadeinfer.core.policies.llumnix import Llumnix
from cascadeinfer.core.policies.prefix_aware import PrefixAware
from cascadeinfer.core.policies.round_robin import RoundRobin
from cascadeinfer.core.policies.static_length import StaticLength
from cascadeinfer.core.policies.static_stages import StaticStages
from cascadeinfer.core.policies.vllm_dp import VllmDp
from cascadeinfer.core.policy import Policy
from support.policy_world import SMALL, World

# --- vllm_dp ---------------------------------------------------------------------------------------------------------


def report(policy: Policy, instance_id: str, *, running: int, waiting: int, kv_use: float) -> None:
    """An engine's statistics; its requests are unknown here, as those of another API server are."""
    names = tuple(f"x{number}" for number in range(running + waiting))
    ones = (1,) * len(names)
    blocks = round(kv_use * SMALL.kv_blocks)
    lists = (names[:running], ones[:running], names[running:], ones[running:])
    policy.handle(InstanceReported("c", instance_id, InstanceReport(*lists, blocks)), 0.0)


def vllm(**options: int) -> VllmDp:
    """The balancer of vLLM, with three engines."""
    policy = VllmDp(**options)
    for instance_id in ("i0", "i1", "i2"):
        policy.handle(InstanceJoined("c", instance_id, InstanceKind(SMALL)), 0.0)
    return policy


def chosen(policy: Policy, number: int) -> str:
    """Where the next request goes."""
    (effect,) = policy.handle(RequestArrived("c", f"r{number}", 10, 10), 0.0)
    return getattr(effect, "instance_id", "")


def test_vllm_takes_turns_when_idle() -> None:
    """Equal scores take turns, because the scan starts one engine further each time."""
    policy = vllm()
    assert [chosen(policy, n) for n in range(6)] == ["i0", "i1", "i2"] * 2


def test_vllm_counts_waiting_and_running() -> None:
    """The score is waiting + running in the last statistics, if that exceeds what is in flight."""
    policy = vllm()
    report(policy, "i0", running=3, waiting=0, kv_use=0.1)
    report(policy, "i1", running=0, waiting=2, kv_use=0.1)
    report(policy, "i2", running=1, waiting=0, kv_use=0.1)
    assert [chosen(policy, n) for n in range(3)] == [
        "i2",
        "i1",
        "i2",
    ]  # 1; then 2 and 2, from i1 on; then 2 against 3, 3


def test_vllm_penalises_queues_on_full_engines() -> None:
    """Waiting requests count for up to three more at full KV cache, and for nothing more below half."""
    policy = vllm()
    report(policy, "i0", running=1, waiting=2, kv_use=1.0)  # 3 + 2 * 6 * 0.5 = 9
    report(policy, "i1", running=6, waiting=2, kv_use=0.5)  # 8
    report(policy, "i2", running=12, waiting=0, kv_use=1.0)  # 12
    assert chosen(policy, 0) == "i1"
    report(policy, "i0", running=1, waiting=2, kv_use=0.9)  # 3 + 2 * 6 * 0.4 = 7.8
    report(policy, "i1", running=6, waiting=2, kv_use=0.5)
    assert chosen(policy, 1) == "i0"


def test_vllm_counts_its_own_between_statistics() -> None:
    """Each request sent counts as waiting until the next statistics, times the number of clients."""
    policy = vllm(clients=3)
    report(policy, "i0", running=0, waiting=0, kv_use=0.0)
    report(policy, "i1", running=2, waiting=0, kv_use=0.0)
    report(policy, "i2", running=4, waiting=0, kv_use=0.0)
    assert [chosen(policy, n) for n in range(2)] == ["i0", "i1"]
    report(policy, "i0", running=0, waiting=0, kv_use=0.0)
    assert chosen(policy, 2) == "i0"  # in flight 1 x 3 clients against 5 and 4


def test_vllm_forgets_a_lost_engine() -> None:
    """An engine that comes back starts with empty statistics."""
    policy = vllm()
    report(policy, "i0", running=9, waiting=9, kv_use=1.0)
    policy.handle(InstanceLost("c", "i0"), 0.0)
    policy.handle(InstanceJoined("c", "i0", InstanceKind(SMALL)), 0.0)
    report(policy, "i1", running=1, waiting=0, kv_use=0.0)
    report(policy, "i2", running=1, waiting=0, kv_use=0.0)
    assert chosen(policy, 0) == "i0"


# --- llumnix ---------------------------------------------------------------------------------------------------------


def test_llumnix_dispatches_to_the_freest() -> None:
    """Free blocks per request: one long request beats four short ones while blocks are plentiful."""
    world = World(Llumnix())
    world.join("i0", "i1")
    world.arrive("a", 1000)  # i0: 193 blocks free for one
    world.arrive("b", 10)  # i1: 255 for one
    world.arrive("c", 10)  # 193 against 255
    assert world.requests["c"].instance_id == "i1"
    world.arrive("d", 10)  # 193 against 127
    assert world.requests["d"].instance_id == "i0"


def loaded_pair(**options: float) -> World:
    """Two instances; i0 has three requests of 1,200 tokens and one of 300, i1 has none."""
    world = World(Llumnix(**options), max_migrations=1)
    world.join("i0")
    for name, prompt in (("a", 1195), ("b", 1195), ("c", 1195), ("short", 295)):
        world.arrive(name, prompt)
    world.report("i0")
    world.grow("i0", 5)
    world.join("i1")
    world.advance(0.2)
    return world


def test_llumnix_moves_the_shortest_from_full_to_free() -> None:
    """The instance below the threshold gives its shortest request to the freest, one at a time."""
    world = loaded_pair()
    effects = world.report("i0")  # 256 - 244 = 12 blocks for four requests: 48 steps are not below the threshold of 48
    assert effects == []
    world.grow("i0", 16)
    world.advance(0.2)
    (move,) = world.report("i0")
    assert isinstance(move, StartMigration)
    assert (move.request_id, move.target_id, move.reason) == ("short", "i1", MigrationReason.REBALANCE)
    world.advance(0.2)
    assert world.report("i0") == []  # one migration per instance at a time


def test_llumnix_leaves_a_balanced_pair_alone() -> None:
    """Nothing moves between two instances below the threshold, or when the move would reverse the difference."""
    world = loaded_pair(migrate_steps=1e6)
    world.grow("i0", 16)
    assert world.report("i0") == []
    world = World(Llumnix(migrate_steps=60.0), max_migrations=1)
    world.join("i0")
    world.arrive("a", 3500)
    world.report("i0")
    world.grow("i0", 2)
    world.join("i1")
    world.arrive("b", 2000)
    world.advance(0.2)
    assert world.report("i0") == []


def test_llumnix_retries_after_a_while() -> None:
    """A migration that ended where it began is not retried for `retry_s`."""
    world = loaded_pair(migrate_steps=100.0)
    (move,) = world.report("i0")
    assert isinstance(move, StartMigration)
    world.end(move.migration_id, MigrationOutcome.STAYED)
    world.advance(0.5)
    (other,) = world.report("i0")
    assert isinstance(other, StartMigration)
    assert other.request_id != move.request_id
    world.end(other.migration_id, MigrationOutcome.STAYED)
    world.advance(0.6)
    (again,) = world.report("i0")
    assert isinstance(again, StartMigration)
    assert again.request_id == move.request_id


def test_llumnix_empties_a_draining_instance() -> None:
    """All requests move off a draining instance, however free it is."""
    world = World(Llumnix(), max_migrations=1)
    world.join("i0")
    world.arrive("a", 100)
    world.report("i0")
    world.grow("i0", 2)
    world.join("i1")
    world.drain("i0")
    world.advance(0.2)
    (move,) = world.report("i0")
    assert isinstance(move, StartMigration)
    assert move.reason is MigrationReason.DRAIN


# --- prefix_aware ----------------------------------------------------------------------------------------------------


def prefix_world(**options: float) -> World:
    """Two instances; a request with blocks 1 to 4 has gone to i0."""
    world = World(PrefixAware(**options))
    world.join("i0", "i1")
    world.arrive("first", 64, prefix_hashes=(1, 2, 3, 4))
    return world


def test_prefix_wins_while_balanced() -> None:
    """If more than half of the blocks are known, the request goes where they are, even to a longer queue."""
    world = prefix_world()
    world.arrive("same", 64, prefix_hashes=(1, 2, 3, 9))
    assert world.requests["same"].instance_id == "i0"


def test_half_a_match_is_not_enough() -> None:
    """At the threshold, but not above it, the shortest queue wins; likewise without hashes."""
    world = prefix_world()
    world.arrive("half", 64, prefix_hashes=(1, 2, 8, 9))
    assert world.requests["half"].instance_id == "i1"
    world.arrive("none", 64)
    assert world.requests["none"].instance_id == "i0"


def test_out_of_balance_the_shortest_queue_wins() -> None:
    """A difference above both thresholds sends even a perfect match elsewhere."""
    world = prefix_world(balance_abs=1, balance_rel=1.5)
    world.arrive("second", 64, prefix_hashes=(1, 2, 3, 4))
    assert world.requests["second"].instance_id == "i0"
    world.arrive("third", 64, prefix_hashes=(1, 2, 3, 4))
    assert world.requests["third"].instance_id == "i1"


def test_cache_of_a_lost_instance_is_forgotten() -> None:
    """The blocks of an instance that has gone attract nothing when it comes back."""
    policy = PrefixAware()
    world = World(policy)
    world.join("i0", "i1")
    world.arrive("first", 64, prefix_hashes=(1, 2, 3, 4))
    world.finish("first")
    assert policy._index.match((1, 2)) == (2, "i0")
    world.lose("i0")
    assert policy._index.match((1, 2)) == (0, None)


def test_prefix_index_keeps_the_young() -> None:
    """Beyond the bound, the least recently used blocks go, leaves before their parents."""
    index = PrefixIndex(4)
    index.add((1, 2, 3), "a")
    index.add((1, 7), "a")
    assert len(index) == 4
    index.add((1, 8), "b")
    assert index.match((1, 2, 3)) == (1, "b")  # the oldest path went, leaf first
    assert index.match((1, 8)) == (2, "b")
    assert len(index) == 4


@given(st.lists(st.tuples(st.lists(st.integers(0, 5), max_size=5), st.sampled_from("ab")), max_size=30))
def test_prefix_index_counts(prompts: list[tuple[list[int], str]]) -> None:
    """The index counts its blocks, never exceeds its bound, and finds what was added last."""
    index = PrefixIndex(12)
    for blocks, instance_id in prompts:
        path = tuple(hash((n, *blocks[: n + 1])) for n in range(len(blocks)))
        index.add(path, instance_id)
        assert len(index) == sum(len(node) for node in index._nodes.values()) <= 12
        if path:
            assert index.match(path) == (len(path), instance_id)
    index.forget("a")
    index.forget("b")
    assert len(index) == 0
    assert not index._nodes


# --- the simple ones -------------------------------------------------------------------------------------------------


def places(world: World, prompts: list[int]) -> list[str | None]:
    """Where requests with these prompts go, one after the other."""
    for number, prompt in enumerate(prompts):
        world.arrive(f"p{number}", prompt)
    return [world.requests[f"p{number}"].instance_id for number in range(len(prompts))]


def test_round_robin_goes_round() -> None:
    """Instances take turns in order of id; a newcomer takes its turn."""
    world = World(RoundRobin())
    world.join("b", "a")
    assert places(world, [1, 1, 1]) == ["a", "b", "a"]
    world.join("c")
    assert places(world, [1, 1, 1]) == ["b", "c", "a"]


def test_least_loaded_weighs_tokens() -> None:
    """The instance with the fewest tokens takes the next request, whatever the number of requests."""
    world = World(LeastLoaded())
    world.join("a", "b")
    assert places(world, [2000, 100, 100, 1000, 900]) == ["a", "b", "b", "b", "b"]


def test_static_length_sorts_by_prompt() -> None:
    """Buckets with their instances: requests go by prompt length and stay."""
    layout = StageLayout.from_boundaries((500,), (("i0",), ("i1", "i2")))
    world = World(StaticLength(layout=layout))
    world.join("i0", "i1", "i2")
    assert places(world, [499, 500, 600, 10]) == ["i0", "i1", "i2", "i0"]
    world.drain("i0")
    world.arrive("short", 10)
    assert world.requests["short"].instance_id in {"i1", "i2"}


def test_static_length_deals_instances_out() -> None:
    """Without a layout, instances are dealt out evenly; an empty bucket is served by the nearest one."""
    world = World(StaticLength(boundaries_tokens=(100, 1000)))
    world.join("i0", "i1", "i2")
    assert places(world, [5, 500, 2000]) == ["i0", "i1", "i2"]
    world = World(StaticLength(boundaries_tokens=(100, 1000)))
    world.join("i0")
    assert places(world, [5, 500, 2000]) == ["i0"] * 3


@pytest.mark.parametrize("boundaries", [(0, 5), (5, 5), (7, 3)])
def test_static_length_refuses_nonsense(boundaries: tuple[int, ...]) -> None:
    """Boundaries that do not increase from above zero are refused."""
    with pytest.raises(PlanError, match="increasing"):
        StaticLength(boundaries_tokens=boundaries)


def test_static_stages_hands_over_and_drains() -> None:
    """A request that outgrows its range moves on; a draining instance's requests go to the stage of their length."""
    layout = StageLayout.from_boundaries((500,), (("i0", "i1"), ("i2",)))
    world = World(StaticStages(layout=layout))
    world.join("i0", "i1", "i2")
    world.arrive("r", 490)
    world.report("i0")
    world.grow("i0", 20)
    (move,) = world.report("i0")
    assert isinstance(move, StartMigration)
    assert (move.target_id, move.reason) == ("i2", MigrationReason.OUTGREW_STAGE)
    world.end(move.migration_id, MigrationOutcome.MOVED)
    world.arrive("s", 100)
    world.report("i0")
    world.grow("i0", 1)
    world.report("i0")
    (published, drained) = world.drain("i0")
    assert isinstance(published, PublishLayout)
    assert [stage.instance_ids for stage in published.layout.stages] == [("i1",), ("i2",)]
    assert isinstance(drained, StartMigration)
    assert (drained.target_id, drained.reason) == ("i1", MigrationReason.DRAIN)


def test_static_stages_follow_who_is_there() -> None:
    """A stage without instances is served by the next longer one; an unnamed instance takes its place."""
    layout = StageLayout.from_boundaries((500, 900), (("i0",), ("i1",), ("i2",)))
    world = World(StaticStages(layout=layout))
    world.join("i0", "i1", "i2")
    world.drain("i1")
    world.lose("i1")
    world.arrive("r", 600)
    assert world.requests["r"].instance_id == "i2"
    (published,) = world.join("i9")
    assert isinstance(published, PublishLayout)
    assert [stage.instance_ids for stage in published.layout.stages] == [("i0",), ("i9",), ("i2",)]
    world.arrive("s", 600)
    assert world.requests["s"].instance_id == "i9"


@pytest.mark.parametrize("make", [LeastLoaded, RoundRobin, VllmDp, PrefixAware, StaticLength])
def test_simple_policies_empty_a_draining_instance(make: Callable[[], Policy]) -> None:
    """Running requests move off it, longest first, three at once; a failed move is retried; pinned requests stay."""
    world = World(make())
    world.join("a")
    lengths = {"r0": 100, "r1": 200, "r2": 300, "r3": 400, "pinned": 500}
    for name, tokens in lengths.items():
        world.arrive(name, tokens, pin_reason=PinReason.LORA if name == "pinned" else None)
    world.report("a")
    world.grow("a", 1)
    world.report("a")
    world.join("b")
    moves = world.drain("a")
    assert [m.request_id for m in moves if isinstance(m, StartMigration)] == ["r3", "r2", "r1"]
    assert {m.reason for m in moves if isinstance(m, StartMigration)} == {MigrationReason.DRAIN}
    world.end("drain1", MigrationOutcome.STAYED)
    (second,) = world.report("a")
    assert isinstance(second, StartMigration)
    assert second.request_id == "r0"
    for migration_id in list(world.moves):
        world.end(migration_id, MigrationOutcome.MOVED)
    assert world.report("a") == []
    world.advance(1.0)
    (again,) = world.report("a")
    assert isinstance(again, StartMigration)
    assert again.request_id == "r3"


def test_draining_twice_is_once() -> None:
    """A second notice changes nothing."""
    world = World(LeastLoaded())
    world.join("a", "b")
    world.drain("a")
    assert world.emit(InstanceDraining("again", "a")) == []

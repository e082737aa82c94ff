"""Several agents on a bad network: no place is held for ever, no request asks for ever, no stage is flooded."""

from hypothesis import given, settings
from hypothesis import strategies as st

from cascadeinfer.core.bidask.rounds import State
from cascadeinfer.core.effects import SendMessage, StartMigration
from cascadeinfer.core.events import MigrationOutcome
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.messages import Ask
from cascadeinfer.core.policies.cascade import Cascade
from support.policy_world import LARGE, SMALL, World

LAYOUT = StageLayout.from_boundaries((100, 300), (("i0", "i1"), ("i2", "i3"), ("i4",)))
NETWORK = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 10_000)), min_size=30, max_size=120)


def staged(**options: object) -> tuple[Cascade, World]:
    """Five instances in three fixed stages."""
    policy = Cascade(layout=LAYOUT, refine=False, **options)
    world = World(policy, SMALL)
    world.join("i0", "i1", "i2", "i3", "i4")
    return policy, world


def moves_of(world: World) -> list[StartMigration]:
    """Migrations that have been started."""
    return [effect for effect in world.log if isinstance(effect, StartMigration)]


def asks_of(world: World) -> list[SendMessage]:
    """Asks that have been sent."""
    return [e for e in world.log if isinstance(e, SendMessage) and isinstance(e.message, Ask)]


@settings(max_examples=60)
@given(steps=NETWORK)
def test_nothing_is_held_for_ever(steps: list[tuple[int, int]]) -> None:
    """Whatever was lost, late or duplicated, nothing is held or open once the network is quiet and time has passed."""
    policy, world = staged()
    for number in range(8):
        world.arrive(f"r{number}", 20 + 40 * number)
    for kind, a in steps:
        instance_id = f"i{a % 5}"
        if kind < 3:
            world.grow(instance_id, a % 50)
            world.report(instance_id)
        elif kind < 6 and world.flying:
            world.deliver(a % len(world.flying), twice=a % 7 == 0)
        elif kind == 6 and world.flying:
            world.flying.pop(a % len(world.flying))
        elif kind == 7 and world.moves:
            outcome = (MigrationOutcome.MOVED, MigrationOutcome.STAYED)[a % 2]
            world.end(next(iter(world.moves)), outcome)
        elif kind == 8 and len(world.requests) > 2:
            world.finish(list(world.requests)[a % len(world.requests)])
        else:
            world.advance(a / 30_000.0)
    world.flying.clear()
    for migration_id in list(world.moves):
        world.end(migration_id, MigrationOutcome.STAYED)
    world.advance(2.0)
    world.flying.clear()
    for agent in policy.agents.values():
        assert not agent.bidder.offers
        assert {a_round.state for a_round in agent.asker.rounds.values()} <= {State.RESTING}
        assert agent.slots_taken() == 0
    assert policy.next_timer_s() is None


def test_a_full_stage_is_asked_less_and_less() -> None:
    """While no instance has room, asks thin out to one round per `rest_s_max`, and decoding continues."""
    policy, world = staged(rebalance=False)
    for number in range(16):
        world.arrive(f"full{number}", 150)  # eight on each of the next stage's two instances: their batches are full
    for number in range(6):
        world.arrive(f"r{number}", 95, 400)
    for instance_id in ("i0", "i1", "i2", "i3", "i4"):
        world.report(instance_id)
    counts = []
    for _ in range(4):
        before = len(asks_of(world))
        for step in range(80):
            world.grow("i0", step % 2)
            world.report("i0")
            world.deliver_all()
            world.advance(0.1)
        counts.append(len(asks_of(world)) - before)
    assert counts[0] > counts[-1] > 0
    assert counts[-1] <= 12
    assert not moves_of(world)
    assert all(request.instance_id == "i0" for request in world.on("i0"))
    assert policy.view.instances["i0"].request_ids


def test_near_a_boundary_nothing_wanders() -> None:
    """Requests around a boundary that moves to and fro within the margin move at most once each."""
    policy, world = staged(rebalance=False)
    for number in range(4):
        world.arrive(f"r{number}", 96 + number)
    for step in range(60):
        policy.roster.move_boundary(0, 100 + (3 if step % 2 else -3))
        policy._follow_roster("test", [])
        for instance_id in world.open_instances():
            world.grow(instance_id, 1)
            world.report(instance_id)
        world.deliver_all()
        for migration_id in list(world.moves):
            world.end(migration_id, MigrationOutcome.MOVED)
        world.advance(0.1)
    moved = [move.request_id for move in moves_of(world)]
    assert sorted(moved) == sorted(set(moved))
    assert len(moved) == 4


def test_balance_settles() -> None:
    """Of four requests of 800 tokens on one of two peers, two move, then no more."""
    policy = Cascade(migrate=True)
    world = World(policy, LARGE)
    world.join("i0")
    for number in range(4):
        world.arrive(f"r{number}", 60_000)
    world.report("i0")
    world.grow("i0", 5)
    world.report("i0")
    world.join("i1")
    for _ in range(100):
        for instance_id in ("i0", "i1"):
            world.grow(instance_id, 1)
            world.report(instance_id)
        world.deliver_all()
        for migration_id in list(world.moves):
            world.end(migration_id, MigrationOutcome.MOVED)
        world.advance(0.1)
    assert [move.request_id for move in moves_of(world)] == ["r0", "r1"]
    assert [len(world.on(i)) for i in ("i0", "i1")] == [2, 2]


def test_refused_migration_rests() -> None:
    """A migration that the target refuses is retried later, not at once."""
    policy, world = staged(rebalance=False)
    world.arrive("r", 95)
    world.report("i0")
    world.grow("i0", 30)
    world.report("i0")
    world.deliver_all()
    (first,) = moves_of(world)
    world.end(first.migration_id, MigrationOutcome.STAYED, "room_refused:no_blocks")
    for _ in range(2):
        world.advance(0.1)
        world.report("i0")
        world.deliver_all()
    assert moves_of(world) == [first]
    world.advance(0.1)
    world.report("i0")
    world.deliver_all()
    assert len(moves_of(world)) == 2
    assert policy.agents["i0"].asker.failures("r") == 1


def test_pinned_and_ending_requests_stay() -> None:
    """Requests that are pinned, waiting, or allowed only a few more tokens are not offered."""
    _, world = staged(rebalance=False)
    world.arrive("ends", 90, 45)
    world.grow("i0", 0)
    world.report("i0")
    world.grow("i0", 40)
    world.report("i0")
    assert not asks_of(world)

"""
What every policy owes its shell, under random legal sequences of events.

`World` (tests/support) checks each effect as it is carried out. Each request is dispatched exactly once while an
instance takes requests, never to one that drains or is gone, nor to one that does not answer while another does.
Orphans are dispatched anew. Pinned, waiting and moving requests do not start to move, a migration starts where the
request is, and no instance has more migrations than allowed.
"""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascadeinfer.core.adapt.replanning import PlanSettings
from cascadeinfer.core.cost.histogram import LengthHistogram
from cascadeinfer.core.events import MigrationEnded, MigrationOutcome, PinReason, RequestFinished, TimerFired
from cascadeinfer.core.kind import InstanceKind
from cascadeinfer.core.layout import Proposal, RoleLayout, Stage, StageLayout
from cascadeinfer.core.policies import POLICIES
from cascadeinfer.core.policies.cascade import Cascade
from cascadeinfer.core.policy import Policy
from cascadeinfer.core.types import InstanceCapacity, InstanceId, LengthRange
from support.policy_world import SMALL, World

IDS = ("i0", "i1", "i2", "i3", "i4")
HALF = InstanceCapacity(kv_blocks=64, block_size_tokens=16, max_num_seqs=4, max_batched_tokens=512)
"""1,024 tokens: the longest requests here do not fit."""
KINDS = {"i0": InstanceKind(HALF), "i3": InstanceKind(HALF, "slow")}
LAYOUT = StageLayout.from_boundaries((60, 200), (("i0", "i1"), ("i2", "i3"), ("i4",)))
ROLES = RoleLayout(
    StageLayout.from_boundaries((200,), (("i2", "i3"), ("i4",))),
    (Stage(LengthRange(40, 150), ("i0",)), Stage(LengthRange(150), ("i1",))),
)


def flip(_: LengthHistogram, __: float, ___: InstanceCapacity, n: int, current: StageLayout) -> Proposal | None:
    """A planner that wants two stages, and next time the other way round."""
    if n < 2:
        return None
    first = 1 if len(current.stages[0].instance_ids) > 1 else n - 1
    return Proposal((40 * first,), (first, n - first))


MAKERS: dict[str, Callable[[], Policy]] = {
    **{name: POLICIES[name].make for name in POLICIES if name != "static_stages"},
    "static_stages": lambda: POLICIES["static_stages"].make(layout=LAYOUT),
    "static_length in buckets": lambda: POLICIES["static_length"].make(layout=LAYOUT),
    "llumnix, eager": lambda: POLICIES["llumnix"].make(migrate_steps=400.0, max_migrations=3, retry_s=0.1),
    "cascade in stages": lambda: Cascade(layout=LAYOUT),
    "cascade without migration": lambda: Cascade(layout=LAYOUT, migrate=False),
    "cascade with a queue": lambda: Cascade(layout=LAYOUT, max_queued=3),
    "roles in stages": lambda: POLICIES["roles"].make(roles=ROLES),
    "pd_fixed, split": lambda: POLICIES["pd_fixed"].make(roles=ROLES),
    "cascade that replans": lambda: Cascade(
        layout=LAYOUT, planner=flip, planning=PlanSettings(interval_s=0.3, min_requests=3)
    ),
}

command = st.tuples(st.sampled_from(range(106)), st.integers(0, 1_000_000), st.integers(0, 1_000_000))
commands = st.lists(command, min_size=20, max_size=160)
OUTCOMES = (MigrationOutcome.MOVED, MigrationOutcome.MOVED, MigrationOutcome.STAYED, MigrationOutcome.RECOMPUTED)


def act(world: World, kind: int, a: int, b: int) -> None:  # noqa: C901, PLR0912 - one arm per command
    """One random command; commands that make no sense at present do nothing."""
    there = sorted(world.draining)
    live = list(world.requests)
    if kind < 20:
        pin = PinReason.LORA if b % 7 == 0 else None
        hashes = tuple(range(b % 3 * 100, b % 3 * 100 + a % 10))
        world.arrive(f"r{len(world.log)}.{a}", 1 + a % 260, 1 + b % 1200, pin_reason=pin, prefix_hashes=hashes)
    elif kind < 45 and there:
        instance_id = there[a % len(there)]
        world.grow(instance_id, b % 60)
        world.report(instance_id)
    elif kind < 55 and live:
        world.finish(live[a % len(live)])
    elif kind < 62 and world.flying:
        world.deliver_all()
    elif kind < 72 and world.flying:
        world.deliver(a % len(world.flying), twice=b % 10 == 0)
    elif kind < 75 and world.flying:
        world.flying.pop(a % len(world.flying))
    elif kind < 83 and world.moves:
        world.end(list(world.moves)[a % len(world.moves)], OUTCOMES[b % len(OUTCOMES)])
    elif kind < 93:
        world.advance(a % 1000 / 1000.0 if b % 8 == 0 else a % 1000 / 20_000.0)
    elif kind < 96:
        absent = [i for i in IDS if i not in world.draining]
        if absent:
            world.join(absent[a % len(absent)])
    elif kind < 98 and there:
        world.drain(there[a % len(there)])
    elif kind >= 103 and world.suspects:
        world.trust(sorted(world.suspects)[a % len(world.suspects)])
    elif kind >= 100 and there:
        world.suspect(there[a % len(there)])
    elif there:
        world.lose(there[a % len(there)], name_lost=bool(b % 2), at_target=bool(b % 3))


def run(name: str, steps: list[tuple[int, int, int]], kinds: dict[InstanceId, InstanceKind] | None = None) -> World:
    """A run of these commands, started with three instances and ended with all instances up and all requests placed."""
    world = World(MAKERS[name](), SMALL, may_hold_back=name == "cascade with a queue", kinds=kinds or {})
    world.join("i0", "i2", "i4")
    for kind, a, b in steps:
        act(world, kind, a, b)
    return world


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=30)
@given(steps=commands)
def test_contract(name: str, steps: list[tuple[int, int, int]]) -> None:
    """Whatever happens, the policy keeps the contract, and in the end every request has been placed."""
    world = run(name, steps)
    for instance_id in IDS:
        if instance_id not in world.draining:
            world.join(instance_id)
    for request_id in list(world.requests):
        if len(world.requests) > 4:
            world.finish(request_id)
    for instance_id in world.open_instances():
        world.report(instance_id)
    assert all(request.instance_id is not None for request in world.requests.values())


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=20)
@given(steps=commands)
def test_contract_with_kinds(name: str, steps: list[tuple[int, int, int]]) -> None:
    """
    The contract also holds with instances too small for some requests: none is placed or moved there (`World` checks).

    What only an absent instance could hold waits for it, and holds up nobody else.
    """
    world = run(name, steps, KINDS)
    for instance_id, draining in list(world.draining.items()):
        if draining:
            world.lose(instance_id)
    world.join(*(instance_id for instance_id in IDS if instance_id not in world.draining))
    for instance_id in list(world.suspects):
        world.trust(instance_id)
    for request_id in list(world.requests):
        if len(world.requests) > 4:
            world.finish(request_id)
    for instance_id in world.open_instances():
        world.report(instance_id)
    assert all(request.instance_id is not None for request in world.requests.values())


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=10)
@given(steps=commands)
def test_same_events_same_effects(name: str, steps: list[tuple[int, int, int]]) -> None:
    """Two fresh policies answer equal events with equal effects."""
    assert run(name, steps).log == run(name, steps).log


@pytest.mark.parametrize("name", MAKERS)
def test_unknown_ids_are_ignored(name: str) -> None:
    """A finish, a migration's end and a timer that the policy does not know have no effect."""
    world = World(MAKERS[name]())
    world.join("i0")
    for event in (
        RequestFinished("x", "nobody", 3),
        MigrationEnded("x", "m?", "nobody", "i0", "gone", MigrationOutcome.MOVED),
        TimerFired("x"),
    ):
        assert world.emit(event) == []


@pytest.mark.parametrize("name", MAKERS)
def test_requests_wait_for_the_first_instance(name: str) -> None:
    """Requests that arrive before any instance is up are dispatched once one is, in order of arrival."""
    world = World(MAKERS[name]())
    for number in range(3):
        world.arrive(f"r{number}", 10)
    assert [request.dispatches for request in world.requests.values()] == [0, 0, 0]
    world.join("i0")
    assert [(request.instance_id, request.dispatches) for request in world.requests.values()] == [("i0", 1)] * 3


@pytest.mark.parametrize("name", MAKERS)
def test_nothing_new_goes_to_a_silent_instance(name: str) -> None:
    """New and waiting requests avoid silent instances unless all are silent; once they answer, all is as before."""
    world = World(MAKERS[name](), may_hold_back=name == "cascade with a queue")
    world.join("i0", "i2", "i4")
    for number in range(6):
        world.arrive(f"a{number}", 1 + number * 50)
    before = {instance_id for instance_id in IDS if world.on(instance_id)}
    for instance_id in ("i0", "i2"):
        world.suspect(instance_id)
    for number in range(6):
        world.arrive(f"b{number}", 1 + number * 50)
    world.report("i4")
    assert {request.instance_id for request in world.requests.values()} <= {"i4", None}
    world.suspect("i4")
    world.arrive("c", 10)
    for instance_id in ("i0", "i2", "i4"):
        world.trust(instance_id)
    for request_id in list(world.requests):
        world.finish(request_id)
    for instance_id in ("i0", "i2", "i4"):
        world.report(instance_id)
    world.advance(6.0)  # `bucket` remembers for 5 s where it sent prompts
    for number in range(6):
        world.arrive(f"d{number}", 1 + number * 50)
    assert {instance_id for instance_id in IDS if world.on(instance_id)} == before


DIGEST = """
import hashlib, random, sys
sys.path[:0] = ["tests", "tests/core/policies"]
from test_policy_contract import MAKERS, run
for name in MAKERS:
    rng = random.Random(7)
    steps = [(rng.randrange(106), rng.randrange(10**6), rng.randrange(10**6)) for _ in range(200)]
    print(name, hashlib.sha256(repr(run(name, steps).log).encode()).hexdigest())
"""


def test_hash_seed_decides_nothing() -> None:
    """The same run with different string hashing gives the same effects: nothing depends on the order of sets."""
    digests = [
        subprocess.run(
            [sys.executable, "-c", DIGEST],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    ]
    assert digests[0] == digests[1]
    assert len(digests[0].splitlines()) == len(MAKERS)

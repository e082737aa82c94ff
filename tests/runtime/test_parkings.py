"""Requests that are parked with their first token: every way in which parking can end, on a running runtime."""

import asyncio

import pytest
from runtime_cluster import Cluster, ScriptedPolicy

from cascadeinfer.core.events import FirstToken, MigrationOutcome
from cascadeinfer.core.migration import MigrationLimits
from cascadeinfer.core.parking import TRANSITIONS, ParkingEvent, ParkingState
from cascadeinfer.core.refusals import Refusal
from cascadeinfer.engines.simulated import SimulatedEngine
from support.virtual_time import virtual_time

N_PROMPT = 100
N_OUTPUT = 60
LIMITS = MigrationLimits(ask_s=1.0, cut_s=0.3, resume_s=2.0)


def parking_policy() -> ScriptedPolicy:
    """Request `r` is parked on instance a."""
    policy = ScriptedPolicy({"r": "a"})
    policy.parks.add("r")
    return policy


def told(policy: ScriptedPolicy) -> list[FirstToken]:
    """The first tokens of parked requests that the policy has heard of."""
    return [event for event in policy.events if isinstance(event, FirstToken)]


def visits(cluster: Cluster) -> list[tuple[str, str]]:
    """Where request `r` has been so far, and how it came there."""
    journey = cluster.runtime.journey_of("r")
    assert journey is not None
    return [(visit.instance_id, visit.how) for visit in journey.visits]


@virtual_time
async def test_a_parked_request_holds_no_slot_and_moves_with_its_cache() -> None:
    """It stops with its first token; the target pulls its whole prompt and goes on, and the pause is measured."""
    policy = parking_policy()
    async with Cluster(policy, migration=LIMITS) as cluster:
        client = await (await cluster.submit("r", N_PROMPT, N_OUTPUT)).until_tokens(1)
        await cluster.until(lambda: bool(told(policy)), "told")
        await asyncio.sleep(0.5)
        assert len(client.token_ids) == 1
        assert not cluster["a"].core.running
        assert cluster.runtime._performer.parkings.n_parked == 1
        assert cluster.where("r") == "a"
        cluster.move("r", "b")
        await client.until_tokens(5)
        assert cluster["b"].core.pulled_tokens == N_PROMPT
        assert visits(cluster) == [("a", "dispatched"), ("b", "moved")]
        await client.until_end()
        (ended,) = policy.ended_migrations()
        assert (ended.outcome, ended.detail) == (MigrationOutcome.MOVED, "")
        assert (
            cluster.registry.get_sample_value("cascadeinfer_migration_pause_seconds_count", {"outcome": "moved"}) == 1
        )


@virtual_time
async def test_nobody_takes_it() -> None:
    """After its time it decodes where it is, as any other request; its pin is free."""
    policy = parking_policy()
    async with Cluster(policy, migration=LIMITS) as cluster:
        client = await (await cluster.submit("r", N_PROMPT, N_OUTPUT)).until_tokens(1)
        await asyncio.sleep(LIMITS.resume_s - 0.1)
        assert len(client.token_ids) == 1
        await client.until_tokens(3)
        assert not cluster["a"].core.pins
        assert visits(cluster) == [("a", "dispatched"), ("a", "taken back")]
        cluster.move("r", "b")
        await client.until_end()
        assert policy.ended_migrations()[0].outcome is MigrationOutcome.MOVED


@virtual_time
async def test_a_lease_is_renewed_until_somebody_takes_it() -> None:
    """Refused again and again for longer than a lease lasts, it is still pinned when it is taken at last."""
    policy = parking_policy()
    limits = MigrationLimits(ask_s=3.0, cut_s=0.3, resume_s=7.0)  # the simulated lease is 10 s
    async with Cluster(policy, migration=limits) as cluster:
        await (await cluster.submit("r", N_PROMPT, N_OUTPUT)).until_tokens(1)
        for number in range(4):
            cluster["b"].hold_answers("reserve")
            cluster.move("r", "b")  # its time for an answer ends; nobody may take the request back meanwhile
            await cluster.until(lambda number=number: len(policy.ended_migrations()) == number + 1, "refused")
            cluster["b"].release_answers("reserve")
        assert cluster["a"].core.pins
        cluster.move("r", "c")
        await cluster.clients["r"].until_end()
        assert [ended.detail for ended in policy.ended_migrations()] == ["timed_out"] * 4 + [""]
        assert cluster["c"].core.pulled_tokens == N_PROMPT


@virtual_time
async def test_one_that_is_refused_goes_elsewhere() -> None:
    """It stays parked, and the next target takes it."""
    policy = parking_policy()
    async with Cluster(policy, migration=LIMITS) as cluster:
        client = await (await cluster.submit("r", N_PROMPT, N_OUTPUT)).until_tokens(1)
        cluster["b"].refuse_room(Refusal.NO_SLOT)
        cluster.move("r", "b")
        await cluster.until(lambda: bool(policy.ended_migrations()), "refused")
        assert len(client.token_ids) == 1
        cluster.move("r", "c")
        await client.until_end()
        assert [ended.outcome for ended in policy.ended_migrations()] == [
            MigrationOutcome.STAYED,
            MigrationOutcome.MOVED,
        ]


@pytest.mark.parametrize("n_tokens", [0, 1], ids=["prefilling", "parked"])
@pytest.mark.parametrize("how", ["client leaves", "instance dies"])
@virtual_time
async def test_it_ends_where_it_is(how: str, n_tokens: int) -> None:
    """A client that leaves frees everything; a dead instance makes an orphan, which runs elsewhere."""
    policy = parking_policy()
    async with Cluster(policy, migration=LIMITS) as cluster:
        if n_tokens == 0:
            cluster["a"].pause()
        client = await (await cluster.submit("r", N_PROMPT, N_OUTPUT)).until_tokens(n_tokens)
        await asyncio.sleep(0.1)
        assert len(told(policy)) == n_tokens
        if how == "client leaves":
            cluster.abort(client)
            cluster["a"].unpause()
            return
        cluster["a"].kill()
        await client.until_end()
        await cluster.all_up()
        assert client.finish_reason == "length"
        assert not policy.ended_migrations()


@virtual_time
async def test_a_client_leaves_while_its_first_token_is_on_the_way() -> None:
    """The instance has parked it, and nobody has heard of that: its pin is released all the same."""
    policy = parking_policy()
    async with Cluster(policy, migration=LIMITS) as cluster:
        cluster["a"].hold_outputs()
        client = await cluster.submit("r", N_PROMPT, N_OUTPUT)
        await cluster.until(lambda: bool(cluster["a"].core.pins), "pinned")
        cluster.abort(client)
        await cluster.until(lambda: not cluster["a"].core.pins, "released")
        cluster["a"].release_outputs()


@virtual_time
async def test_a_move_before_the_first_token_does_not_begin() -> None:
    """The request is on its way to being parked: a move that somebody wants meanwhile is stale."""
    policy = parking_policy()
    async with Cluster(policy, migration=LIMITS) as cluster:
        cluster["a"].pause()
        client = await cluster.submit("r", N_PROMPT, N_OUTPUT)
        cluster.move("r", "b")
        await cluster.until(lambda: bool(policy.ended_migrations()), "stale")
        cluster["a"].unpause()
        await client.until_tokens(1)
        cluster.move("r", "b")
        await client.until_end()
        assert [ended.detail for ended in policy.ended_migrations()] == ["stale", ""]


@virtual_time
async def test_one_that_ends_with_its_first_token_was_never_parked() -> None:
    """A real end pins nothing, and nobody is told of a first token."""
    policy = parking_policy()
    async with Cluster(policy, migration=LIMITS) as cluster:
        client = await (await cluster.submit("r", N_PROMPT, N_OUTPUT, stop_at=1)).until_end()
        assert client.finish_reason == "stop"
        assert not told(policy)


@virtual_time
async def test_an_engine_that_does_not_park_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The request decodes on, the policy is told all the same, and its answer is an ordinary move."""
    add = SimulatedEngine.add

    async def without(engine: SimulatedEngine, *args: object, park: bool = False) -> None:  # noqa: ARG001 - unheard
        await add(engine, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(SimulatedEngine, "add", without)
    policy = parking_policy()
    async with Cluster(policy, migration=LIMITS) as cluster:
        client = await (await cluster.submit("r", N_PROMPT, N_OUTPUT)).until_tokens(5)
        assert len(told(policy)) == 1
        cluster.move("r", "b")
        await client.until_end()
        (ended,) = policy.ended_migrations()
        assert ended.outcome is MigrationOutcome.MOVED


@virtual_time
async def test_its_cache_is_gone_when_it_is_to_move() -> None:
    """The source has lost the blocks: it takes the request back and computes it anew."""
    policy = parking_policy()
    async with Cluster(policy, migration=LIMITS) as cluster:
        client = await (await cluster.submit("r", N_PROMPT, N_OUTPUT)).until_tokens(1)
        cluster["a"].lose_pins()
        cluster.move("r", "b")
        await client.until_end()
        (ended,) = policy.ended_migrations()
        assert (ended.outcome, ended.detail) == (MigrationOutcome.STAYED, "pin_lost")
        assert not sum(cluster[name].core.pulls for name in "abc")


@virtual_time
async def test_a_drain_waits_for_what_is_parked() -> None:
    """The instance is empty only when its parked request has left."""
    policy = parking_policy()
    async with Cluster(policy, migration=LIMITS) as cluster:
        client = await (await cluster.submit("r", N_PROMPT, N_OUTPUT)).until_tokens(1)
        cluster.runtime.elastic.drain("a", 100.0)
        await asyncio.sleep(0.5)
        assert "a" in cluster.runtime.fleet.records
        cluster.move("r", "b")
        assert (await cluster.gone("a")).how == "drained"
        await client.until_end()


@virtual_time
async def test_its_story_says_so() -> None:
    """An operator who asks reads where it waits, and why."""
    policy = parking_policy()
    async with Cluster(policy, migration=LIMITS) as cluster:
        client = await (await cluster.submit("r", N_PROMPT, N_OUTPUT)).until_tokens(1)
        await cluster.until(lambda: bool(told(policy)), "told")
        story = cluster.runtime.lookout.story("r")
        assert story is not None
        texts = [chapter["text"] for chapter in story["chapters"]]
        assert texts[1:] == [
            "dispatched to a, to be parked with its first token",
            "has its first token and is parked on a",
        ]
        cluster.abort(client)


def test_the_table_is_closed() -> None:
    """Every state but the last has a way to end."""
    for state in ParkingState:
        ways = {event for before, event in TRANSITIONS if before is state}
        assert (ParkingEvent.LEFT in ways) == (state is not ParkingState.OVER)

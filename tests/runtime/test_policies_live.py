"""Complete policies on simulated engines: stages, limits, rejection, and their bookkeeping."""

import asyncio
from collections import Counter

import pytest
from runtime_cluster import MANY_DEATHS, MIGRATION, Cluster, ScriptedPolicy

from cascadeinfer.core.effects import Dispatch, Effect, MigrationReason, Reject, StartMigration
from cascadeinfer.core.errors import RequestRejectedError
from cascadeinfer.core.events import Event, MigrationEnded, PinReason, RequestArrived, RequestFinished
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.policies import POLICIES
from cascadeinfer.core.policies.static_stages import MAX_MIGRATIONS_PER_INSTANCE, StaticStages
from cascadeinfer.core.policy import Policy
from cascadeinfer.runtime.supervise import SupervisionTimes
from support.virtual_time import virtual_time

OFTEN = SupervisionTimes(report_s=0.02, hang_s=2.0)


class Logged:
    """A policy that logs its events and effects."""

    def __init__(self, policy: Policy) -> None:
        """Wrap this policy."""
        self.policy = policy
        self.events: list[Event] = []
        self.effects: list[Effect] = []

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """See Policy."""
        self.events.append(event)
        effects = self.policy.handle(event, now_s)
        self.effects += effects
        return effects

    def next_timer_s(self) -> float | None:
        """See Policy."""
        return self.policy.next_timer_s()


LAYOUT = StageLayout.from_boundaries((100, 200), (("a",), ("b",), ("c",)))


def stages() -> StaticStages:
    """Three stages of one instance each."""
    return StaticStages(layout=LAYOUT)


@virtual_time
async def test_requests_climb_the_stages() -> None:
    """Each request starts in the stage of its prompt and moves by KV pull as it grows; all complete."""
    policy = Logged(stages())
    async with Cluster(policy, supervision=OFTEN) as cluster:
        clients = [await cluster.submit(f"r{i}", 20 + 9 * i, 200) for i in range(8)]
        for client in clients:
            await client.until_end()
        moved = [e for e in policy.events if isinstance(e, MigrationEnded) and e.outcome == "moved"]
        assert len(moved) >= 8
        assert {(e.source_id, e.target_id) for e in moved} == {("a", "b"), ("b", "c")}
        assert sum(cluster[name].core.pulls for name in "abc") == len(moved)
        assert cluster.runtime.fleet.layout == LAYOUT


@virtual_time
async def test_never_more_than_three_migrations_per_instance() -> None:
    """However many requests outgrow their stage at once, at most three migrations touch an instance at a time."""
    async with Cluster(stages(), supervision=OFTEN) as cluster:
        cluster["b"].hold_answers("reserve")  # each request for room lasts until it times out
        clients = [await cluster.submit(f"r{i}", 95, 600) for i in range(7)]
        most = 0
        while not all(client.finish_reason for client in clients):
            cluster.check_pump()
            records = cluster.runtime._migrator._records.values()
            ends = Counter(i for r in records for i in (r.migration.source_id, r.migration.target_id))
            most = max(most, *ends.values(), 0)
            assert most <= MAX_MIGRATIONS_PER_INSTANCE
            await asyncio.sleep(0.01)
        assert most == MAX_MIGRATIONS_PER_INSTANCE
        cluster["b"].release_answers("reserve")


@virtual_time
async def test_stages_stay_whole_when_their_instances_die() -> None:
    """Killing each instance in turn while requests climb the stages loses no token."""
    async with Cluster(stages(), supervision=OFTEN, poison_deaths=MANY_DEATHS) as cluster:
        clients = [await cluster.submit(f"r{i}", 20 + 20 * i, 300) for i in range(8)]
        for name in "bca":
            await asyncio.sleep(0.4)
            cluster[name].kill()
        for client in clients:
            await client.until_end()
            assert client.finish_reason == "length"
        await cluster.all_up()


@virtual_time
async def test_pinned_requests_stay() -> None:
    """A pinned request is never moved and is counted; if its instance dies it goes on elsewhere, counted as inexact."""
    policy = Logged(stages())
    async with Cluster(policy, supervision=OFTEN) as cluster:
        client = await cluster.submit("r", 90, 100, pin_reason=PinReason.SEEDED_SAMPLING)
        await client.until_tokens(60)
        assert cluster.where("r") == "a"
        cluster["a"].kill()
        await client.until_end()
        await cluster.all_up()
        assert not [e for e in policy.effects if isinstance(e, StartMigration)]
        read = cluster.registry.get_sample_value
        assert read("cascadeinfer_pinned_requests_total", {"reason": "seeded_sampling"}) == 1
        assert read("cascadeinfer_recovered_requests_total", {"exact": "no"}) == 1


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"static_stages"}))
@virtual_time
async def test_every_policy_serves(name: str) -> None:
    """Each registered policy that needs no options serves a burst and survives a death."""
    policy = Logged(POLICIES[name].make())
    async with Cluster(policy, supervision=OFTEN) as cluster:
        clients = [await cluster.submit(f"r{i}", 20 + 20 * i, 100) for i in range(12)]
        await asyncio.sleep(0.3)
        cluster["b"].kill()
        for client in clients:
            await client.until_end()
            assert client.finish_reason == "length"
        await cluster.all_up()
        assert {e.request_id for e in policy.effects if isinstance(e, Dispatch)} == set(cluster.clients)


class Full(ScriptedPolicy):
    """Refuses every request beyond the second."""

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """Apply admission before anything else."""
        if isinstance(event, RequestArrived) and len(self.view.requests) >= 2:
            self.events.append(event)
            self.view.apply(event)
            return [Reject(event.cause, event.request_id, "queue full", 3.5)]
        return super().handle(event, now_s)


@virtual_time
async def test_rejection_leaves_nothing() -> None:
    """A refused request raises with its retry delay, is forgotten by runtime and policy, and is counted."""
    policy = Full()
    async with Cluster(policy) as cluster:
        accepted = [await cluster.submit(f"r{i}", 50, 40) for i in range(2)]
        with pytest.raises(RequestRejectedError, match="queue full") as raised:
            await cluster.submit("r2", 50, 40)
        cluster.clients.pop("r2")
        assert raised.value.retry_after_s == 3.5
        assert cluster.runtime.n_live_requests == 2
        assert [e.request_id for e in policy.events if isinstance(e, RequestFinished)] == ["r2"]
        for client in accepted:
            await client.until_end()
        again = await cluster.submit("r2", 50, 40)
        await again.until_end()
        read = cluster.registry.get_sample_value
        assert read("cascadeinfer_requests_total", {"outcome": "rejected"}) == 1
        assert read("cascadeinfer_requests_total", {"outcome": "finished"}) == 3


@virtual_time
async def test_stale_migrations_end_at_once() -> None:
    """Migrating a request that has ended or is elsewhere by now ends before it begins, and the policy is told."""
    policy = ScriptedPolicy({"r": "a", "s": "b"})
    async with Cluster(policy) as cluster:
        client = await cluster.submit("r", 50, 40)
        cluster.do(
            StartMigration("x", "m1", "gone", "a", "b", MigrationReason.OPERATOR),
            StartMigration("x", "m2", "r", "c", "b", MigrationReason.OPERATOR),
        )
        assert [(e.migration_id, e.outcome, e.detail) for e in policy.ended_migrations()] == [
            ("m1", "ended", "stale"),
            ("m2", "stayed", "stale"),
        ]
        await client.until_end()


@virtual_time
async def test_no_room_no_move() -> None:
    """A target without free slots or blocks refuses, and the request stays where it is."""
    policy = ScriptedPolicy({"r": "a", "big": "b"} | {f"s{i}": "c" for i in range(8)})
    async with Cluster(policy) as cluster:
        client = await cluster.submit("r", 300, 200)
        beside = [await cluster.submit("big", 1800, 100)] + [await cluster.submit(f"s{i}", 10, 300) for i in range(8)]
        await beside[0].until_tokens(1)
        cluster.move("r", "b")
        await cluster.until(lambda: cluster.migration("r") is None)
        cluster.move("r", "c")
        await cluster.until(lambda: cluster.migration("r") is None)
        assert cluster.where("r") == "a"
        assert [e.detail for e in policy.ended_migrations()] == ["room_refused:no_blocks", "room_refused:no_slot"]
        for each in [client, *beside]:
            await each.until_end()


@virtual_time
async def test_no_move_to_an_instance_that_is_down() -> None:
    """A migration to an instance that is down ends at once, and the request decodes on."""
    policy = ScriptedPolicy({"r": "a"})
    async with Cluster(policy) as cluster:
        client = await cluster.submit("r", 50, 40)
        cluster["b"].kill()
        await client.until_tokens(10)
        cluster.move("r", "b")
        await asyncio.sleep(0.01)
        assert [(e.outcome, e.detail) for e in policy.ended_migrations()] == [("stayed", "room_refused:target_down")]
        await client.until_end()
        await cluster.all_up()


@virtual_time
@pytest.mark.parametrize("cut_takes_effect", [False, True])
async def test_a_cut_that_took_too_long_is_named(cut_takes_effect: bool) -> None:
    """Whether undone or taken back, the migration records that the cut timed out, not how it was reverted."""
    policy = ScriptedPolicy({"r": "a"})
    async with Cluster(policy, supervision=SupervisionTimes(hang_s=60.0)) as cluster:
        client = await cluster.submit("r", 50, 60)
        await client.until_tokens(10)
        cluster["a"].hold_outputs() if cut_takes_effect else cluster["a"].pause()
        cluster.move("r", "b")
        await asyncio.sleep(MIGRATION.cut_s + 1)
        cluster["a"].unpause()
        cluster["a"].release_outputs()
        await client.until_end()
        assert [(e.outcome, e.detail) for e in policy.ended_migrations()] == [("stayed", "timed_out")]


@virtual_time
async def test_no_pull_after_the_lease() -> None:
    """A target that wakes up after the lease decodes nothing: the source has taken the request back."""
    policy = ScriptedPolicy({"r": "a"})
    async with Cluster(policy, supervision=SupervisionTimes(hang_s=60.0)) as cluster:
        client = await cluster.submit("r", 100, 60)
        await client.until_tokens(5)
        cluster["b"].pause()
        cluster.move("r", "b")
        await asyncio.sleep(cluster["a"].times.lease_s + 1)
        cluster["b"].unpause()
        await client.until_end()
        (ended,) = policy.ended_migrations()
        assert (ended.outcome, ended.detail) == ("stayed", "timed_out")
        assert cluster["b"].core.pulls == 0


@virtual_time
async def test_failed_pull_is_no_failed_migration() -> None:
    """If the pinned blocks are gone, the target recomputes them: same tokens, and its counter records it."""
    policy = ScriptedPolicy({"r": "a"})
    async with Cluster(policy) as cluster:
        client = await cluster.submit("r", 100, 60)
        await client.until_tokens(5)
        cluster["b"].pause()
        cluster.move("r", "b")
        await cluster.until(lambda: bool(cluster["a"].core.pins))
        cluster["a"].lose_pins()
        await asyncio.sleep(0.05)
        cluster["b"].unpause()
        await client.until_end()
        assert cluster["b"].core.failed_pulls == 1
        assert [e.outcome for e in policy.ended_migrations()] == ["moved"]

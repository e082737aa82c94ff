"""A new instance connects to all that are up, in parallel; a pair that cannot connect does not kill it."""

import asyncio
import itertools
import random
from dataclasses import replace

import pytest
from runtime_cluster import MIGRATION, SUPERVISION, TIMES, Cluster, ScriptedPolicy

from cascadeinfer.core.events import MigrationOutcome
from cascadeinfer.runtime.pairs import PATIENCE_S, RETRY_FIRST_S
from support.virtual_time import virtual_time


def broken(cluster: Cluster) -> list[list[str]]:
    """Pairs that `/admin/instances` shows as not connected."""
    return [pair["instances"] for pair in cluster.runtime.snapshot()["broken_pairs"]]


def assert_all_connected(cluster: Cluster) -> None:
    """Every pair of UP instances is connected, according to the runtime and to the instances themselves."""
    assert not broken(cluster)
    for one, other in itertools.combinations(cluster.runtime.live_engines(), 2):
        assert cluster.runtime.fleet.connected(one.instance_id, other.instance_id)
        assert cluster[other.instance_id].core.core_id in cluster[one.instance_id]._peers
        assert cluster[one.instance_id].core.core_id in cluster[other.instance_id]._peers


async def restarted(cluster: Cluster, name: str) -> None:
    """Kill an instance and wait until its next life has begun."""
    n = len(cluster.engines[name])
    cluster[name].kill()
    await cluster.until(lambda: len(cluster.engines[name]) == n + 1)


@virtual_time
async def test_newcomers_that_come_at_the_same_time_meet() -> None:
    """Instances connect at the start, when two restart together, and when one is added meanwhile."""
    async with Cluster() as cluster:
        assert_all_connected(cluster)
        cluster["a"].kill()
        cluster["b"].kill()
        (added,) = cluster.runtime.elastic.add()
        await cluster.until(lambda: len(cluster.runtime.live_engines()) == 1, "both are down")
        await cluster.all_up()
        assert added in [engine.instance_id for engine in cluster.runtime.live_engines()]
        assert_all_connected(cluster)


@virtual_time
async def test_one_that_hangs_in_its_handshake_keeps_nobody_waiting() -> None:
    """Another newcomer, and an added one, come up while the sick one is still trying."""
    async with Cluster() as cluster:
        await restarted(cluster, "a")
        cluster["a"].hold_answers("handshake")
        await cluster.until(lambda: cluster["a"].serves)
        await restarted(cluster, "b")
        cluster.runtime.elastic.add()
        began_s = asyncio.get_running_loop().time()
        await cluster.until(lambda: len(cluster.runtime.live_engines()) == 3, "b and the new one")
        assert asyncio.get_running_loop().time() - began_s < TIMES.start_s + 0.5
        assert cluster.runtime.fleet["a"].engine is None
        cluster["a"].release_answers("handshake")
        await cluster.all_up()
        assert len(cluster.engines["a"]) == 2
        assert_all_connected(cluster)


@virtual_time
async def test_a_peer_that_answers_late_does_not_keep_a_newcomer_waiting() -> None:
    """After a while it joins those whose handshakes succeeded; the missing pair is connected when the answer comes."""
    async with Cluster() as cluster:
        await restarted(cluster, "a")
        cluster["b"].hold_answers("handshake")
        began_s = asyncio.get_running_loop().time()
        await cluster.all_up()
        assert PATIENCE_S <= asyncio.get_running_loop().time() - began_s < PATIENCE_S + TIMES.start_s + 1.0
        assert broken(cluster) == [["a", "b"]]
        cluster["b"].release_answers("handshake")
        await cluster.until(lambda: not broken(cluster), "connected")
        assert_all_connected(cluster)


@virtual_time
async def test_a_deaf_peer_is_restarted_not_the_newcomer() -> None:
    """
    The newcomer joins without the deaf instance, moves between the two are
    refused, and one that stays deaf is restarted.
    """
    policy = ScriptedPolicy({"r": "a"})
    async with Cluster(policy) as cluster:
        cluster["b"].turn_deaf()
        await restarted(cluster, "a")
        await cluster.all_up()
        assert len(cluster.engines["a"]) == 2
        assert broken(cluster) == [["a", "b"]]
        assert cluster.registry.get_sample_value(
            "cascadeinfer_instance_broken_pairs", {"instance": "a", "stage": ""}
        ) == pytest.approx(1.0)
        client = await cluster.submit("r", 50, 100)
        await client.until_tokens(5)
        cluster.move("r", "b")
        await cluster.until(lambda: len(policy.ended_migrations()) == 1)
        (ended,) = policy.ended_migrations()
        assert ended.outcome is MigrationOutcome.STAYED
        cluster.move("r", "c")  # with others it moves as usual
        await client.until_end()
        assert [e.outcome for e in policy.ended_migrations()][1:] == [MigrationOutcome.MOVED]
        await cluster.until(lambda: len(cluster.engines["b"]) == 2, "the deaf one is restarted")
        assert "side channel" in cluster.runtime.snapshot()["instances"][1]["last_error"]
        await cluster.all_up()
        assert [len(cluster.engines[name]) for name in "abc"] == [2, 2, 1]
        assert_all_connected(cluster)


@virtual_time
async def test_the_only_peer_is_deaf() -> None:
    """With two instances the newcomer joins anyway, so that the other can be restarted while one is up."""
    async with Cluster(instance_ids="ab") as cluster:
        cluster["b"].turn_deaf()
        await restarted(cluster, "a")
        await cluster.all_up()
        client = await cluster.submit("r", 50, 4000)
        await cluster.until(lambda: len(cluster.engines["b"]) == 2)
        assert cluster.runtime.live_engines()
        await cluster.all_up()
        cluster.abort(client)
        assert len(cluster.engines["a"]) == 2
        assert_all_connected(cluster)


@virtual_time
async def test_a_deaf_newcomer_is_restarted() -> None:
    """Its own side channel does not answer: it does not come up, and all others stay."""
    async with Cluster() as cluster:
        await restarted(cluster, "a")
        cluster["a"].turn_deaf()
        await cluster.until(lambda: len(cluster.engines["a"]) == 3)
        assert "side channel" in cluster.runtime.snapshot()["instances"][0]["deaths"][-1]["error"]
        await cluster.all_up()
        assert [len(cluster.engines[name]) for name in "abc"] == [3, 1, 1]
        assert_all_connected(cluster)


@virtual_time
async def test_a_pair_that_fails_is_tried_again() -> None:
    """Neither side is at fault: both stay, and the pair heals."""
    async with Cluster() as cluster:
        await restarted(cluster, "a")
        cluster["a"].refuse_connection()
        await cluster.all_up()
        assert len(broken(cluster)) == 1
        await asyncio.sleep(RETRY_FIRST_S + 0.5)
        assert [len(cluster.engines[name]) for name in "abc"] == [2, 1, 1]
        assert_all_connected(cluster)


@virtual_time
async def test_one_that_cannot_listen_again_is_restarted() -> None:
    """An instance whose load reports say that its side channel is closed for good is restarted; its requests go on."""
    policy = ScriptedPolicy({"r": "a"})
    async with Cluster(policy) as cluster:
        client = await cluster.submit("r", 50, 400)
        await client.until_tokens(5)
        cluster["a"].close_side_channel()
        await cluster.until(lambda: len(cluster.engines["a"]) == 2)
        assert "side channel" in cluster.runtime.snapshot()["instances"][0]["last_error"]
        await client.until_end()
        assert client.finish_reason == "length"
        await cluster.all_up()


@virtual_time
async def test_the_wait_for_a_restart_is_shown() -> None:
    """`/admin/instances` shows how often it died, why, and when it will be restarted."""
    async with Cluster(start_error=lambda name, n: "broken" if name == "b" and 0 < n < 3 else None) as cluster:
        cluster["b"].kill()
        await cluster.until(lambda: len(cluster.engines["b"]) == 3)
        await cluster.until(lambda: cluster.runtime.snapshot()["instances"][1]["deaths_in_window"] == 3)
        shown = cluster.runtime.snapshot()["instances"][1]
        assert shown["phase"] == "down"
        assert shown["restart_in_s"] == pytest.approx(4.0, abs=0.1)
        assert [death["error"] for death in shown["deaths"]][1:] == ["instance b: did not start: broken"] * 2
        await cluster.all_up()
        assert cluster.runtime.snapshot()["instances"][1]["restart_in_s"] is None
        await asyncio.sleep(SUPERVISION.window_s)
        assert cluster.runtime.snapshot()["instances"][1]["deaths_in_window"] == 0


@pytest.mark.parametrize("seed", range(12))
@virtual_time
async def test_in_the_end_everybody_knows_everybody(seed: int) -> None:
    """Deaths, refusals, deaf or slow instances and adds, in any order: in the end all are up and connected."""
    dice = random.Random(seed)
    async with Cluster(max_instances=6) as cluster:
        for _ in range(25):
            await asyncio.sleep(dice.choice((0.0, 0.01, 0.3, 1.5)))
            engine = cluster[dice.choice(sorted(cluster.runtime.fleet.records))]
            match dice.randrange(6):
                case 0 | 1:
                    engine.kill()
                case 2:
                    engine.refuse_connection(dice.randint(1, 3))
                case 3:
                    engine.turn_deaf()
                case 4:
                    engine.hold_answers("handshake")
                    asyncio.get_running_loop().call_later(dice.random() * 20.0, engine.release_answers, "handshake")
                case 5 if len(cluster.runtime.fleet.records) < 6:
                    cluster.runtime.elastic.add()
        await asyncio.sleep(120.0)
        for engine in cluster.runtime.live_engines():
            engine._deaf = False
        await asyncio.sleep(120.0)
        await cluster.all_up()
        assert_all_connected(cluster)


@virtual_time
async def test_a_pull_that_hangs_stops_other_moves() -> None:
    """
    Two instances cannot reach each other any more: the request that finds out pauses until its pull is given up and
    goes on at its source; others stay without a pause, move elsewhere, and cross again when the network is back.
    """
    policy = ScriptedPolicy({"r": "a", "s": "a"})
    async with Cluster(policy) as cluster:

        async def move(name: str, target: str) -> tuple[MigrationOutcome, str]:
            before = len(policy.ended_migrations())
            cluster.move(name, target)
            await cluster.until(lambda: len(policy.ended_migrations()) > before)
            ended = policy.ended_migrations()[before]
            return ended.outcome, ended.detail

        cluster["b"].set_apart(cluster["a"])
        clients = [await cluster.submit(name, 50, 4000) for name in "rs"]
        for client in clients:
            await client.until_tokens(5)
        assert await move("r", "b") == (MigrationOutcome.STAYED, "timed_out")
        assert broken(cluster) == [["a", "b"]]
        assert "cannot reach" in cluster.runtime.snapshot()["broken_pairs"][0]["error"]
        for name in "rs":
            assert await move(name, "b") == (MigrationOutcome.STAYED, "room_refused:not_connected")
        assert (await move("s", "c"))[0] is MigrationOutcome.MOVED
        cluster["b"].set_apart(cluster["a"], apart=False)
        await cluster.until(lambda: not broken(cluster), "they reach each other")
        assert (await move("r", "b"))[0] is MigrationOutcome.MOVED
        for client in clients:
            cluster.abort(client)


@virtual_time
async def test_a_pull_that_was_only_slow_stops_nothing() -> None:
    """It was given up, but its target reaches the source: the next move goes the same way."""
    policy = ScriptedPolicy({"r": "a"})
    async with Cluster(policy) as cluster:
        times = cluster["b"].core.times
        cluster["b"].core.times = replace(times, pull_s=MIGRATION.resume_s + 1.0)
        client = await cluster.submit("r", 50, 4000)
        await client.until_tokens(5)
        cluster.move("r", "b")
        await cluster.until(lambda: len(policy.ended_migrations()) == 1)
        assert policy.ended_migrations()[0].outcome is MigrationOutcome.STAYED
        cluster["b"].core.times = times
        began_s = asyncio.get_running_loop().time()
        await cluster.until(lambda: not broken(cluster), "trusted")
        assert asyncio.get_running_loop().time() - began_s < RETRY_FIRST_S
        cluster.move("r", "b")
        await cluster.until(lambda: len(policy.ended_migrations()) == 2)
        assert policy.ended_migrations()[1].outcome is MigrationOutcome.MOVED
        cluster.abort(client)


@virtual_time
async def test_a_copy_ahead_that_hangs_stops_other_moves() -> None:
    """The request that finds out decodes meanwhile: nobody pauses at all."""
    policy = ScriptedPolicy({"r": "a"})
    async with Cluster(policy, migration=replace(MIGRATION, precopy=True)) as cluster:
        cluster["b"].set_apart(cluster["a"])
        client = await cluster.submit("r", 200, 4000)
        await client.until_tokens(5)
        cluster.move("r", "b")
        await cluster.until(lambda: len(policy.ended_migrations()) == 1)
        assert policy.ended_migrations()[0].detail == "timed_out"
        assert broken(cluster) == [["a", "b"]]
        cluster["b"].set_apart(cluster["a"], apart=False)
        await cluster.until(lambda: not broken(cluster), "they reach each other")
        cluster.move("r", "b")
        await cluster.until(lambda: len(policy.ended_migrations()) == 2)
        assert policy.ended_migrations()[1].outcome is MigrationOutcome.MOVED
        cluster.abort(client)


@pytest.mark.parametrize("how", ["ends", "is left"])
@virtual_time
async def test_a_request_that_goes_while_its_copy_hangs(how: str) -> None:
    """Its read holds blocks at the target until it fails: the pair is looked at, so that others do not add to them."""
    policy = ScriptedPolicy({"r": "a"})
    async with Cluster(policy, migration=replace(MIGRATION, precopy=True)) as cluster:
        cluster["b"].set_apart(cluster["a"])
        client = await cluster.submit("r", 200, 20)
        await client.until_tokens(5)
        cluster.move("r", "b")
        if how == "is left":
            await client.until_tokens(10)
            cluster.abort(client)
        await cluster.until(lambda: len(policy.ended_migrations()) == 1)
        assert policy.ended_migrations()[0].outcome is MigrationOutcome.ENDED
        assert broken(cluster) == [["a", "b"]]
        cluster["b"].set_apart(cluster["a"], apart=False)
        await cluster.until(lambda: not broken(cluster), "they reach each other")


@virtual_time
async def test_an_internal_error_of_a_look_does_not_end_the_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pair that is doubted is asked about again, whatever went wrong the first time."""
    async with Cluster() as cluster:
        one, other = cluster["b"], cluster["a"]
        answers = iter([ValueError("a bug")])

        async def reaches(_: object) -> bool:
            if (error := next(answers, None)) is not None:
                raise error
            return True

        monkeypatch.setattr(one, "reaches", reaches)
        cluster.runtime.fleet.doubt("b", "a", "a test says so")
        assert broken(cluster) == [["a", "b"]]
        await cluster.until(lambda: not broken(cluster), "asked again")
        assert other.serves
        cluster.defects.clear()

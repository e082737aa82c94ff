"""A request that kills its instances, in a running runtime: it is ended, the others complete, and nothing is left."""

import asyncio
from dataclasses import replace

import pytest
from runtime_cluster import CAPACITY, SUPERVISION, Client, Cluster, ScriptedPolicy

from cascadeinfer.core.events import MigrationOutcome
from support.virtual_time import virtual_time


async def kill_whatever_runs(cluster: Cluster, poison: Client, n_tokens: int) -> int:
    """Kill any engine that has this many of the request's tokens; returns the number of deaths."""
    name, n_dead, dead = poison.request.request_id, 0, None
    while poison.finish_reason is None:
        place = cluster.where(name)
        engine = None if place is None else cluster.runtime.fleet.engine(place)
        stream = cluster.runtime._streams.get(name)
        if engine is not None and engine is not dead and stream is not None and not _is_held(cluster, name):
            begun = len(stream.output_token_ids) - stream.tokens_before >= n_tokens
            if begun and stream.attempts > n_dead:
                engine.kill()
                n_dead, dead = n_dead + 1, engine
        await asyncio.sleep(0.001)
    return n_dead


def _is_held(cluster: Cluster, name: str) -> bool:
    return any(shown["id"] == name and shown["held"] for shown in cluster.runtime.snapshot()["suspected"])


@pytest.mark.parametrize("n_tokens", [0, 1, 3])
@virtual_time
async def test_poison_is_ended_and_others_are_not(n_tokens: int) -> None:
    """It ends with an error after two deaths (three if others could have caused them); all others complete."""
    async with Cluster(ScriptedPolicy(), "ab") as cluster:
        others = [await cluster.submit(f"r{i}", 20, 60) for i in range(6)]
        poison = await cluster.submit("poison", 30, 200)
        n_dead = await kill_whatever_runs(cluster, poison, n_tokens)
        assert poison.finish_reason == "error"
        # If others were present at the deaths and then produced tokens, it takes a third death to tell them apart.
        assert n_dead == 2 if n_tokens == 0 else n_dead in {2, 3}
        for client in others:
            await client.until_end()
            assert client.finish_reason == "length"
        shown = cluster.runtime.snapshot()
        assert [(ended["id"], ended["deaths"]) for ended in shown["poison"]] == [("poison", n_dead)]
        assert shown["suspected"] == []
        assert cluster.runtime.metrics.poison_requests._value.get() == 1
        await cluster.all_up()


@virtual_time
async def test_the_client_is_told_why() -> None:
    """If the front end can be told, it gets the explanation; the request has ended by then."""
    async with Cluster(ScriptedPolicy(), "ab") as cluster:
        told: list[tuple[str, str, int]] = []

        def hear(request_id: str, sentence: str) -> None:
            told.append((request_id, sentence, cluster.runtime.n_live_requests))
            poison.finish_reason = "error"

        cluster.runtime.on_failure = hear
        poison = await cluster.submit("poison", 30, 200)
        await kill_whatever_runs(cluster, poison, 0)
        [(request_id, sentence, n_live)] = told
        assert (request_id, n_live) == ("poison", 0)
        assert "died under it" in sentence
        await cluster.all_up()


@virtual_time
async def test_an_ordinary_death_ends_nobody() -> None:
    """All go on, one at a time on each instance, and are cleared of suspicion by their next token."""
    async with Cluster(ScriptedPolicy(dict.fromkeys([f"r{i}" for i in range(8)], "a")), "abc") as cluster:
        clients = [await cluster.submit(f"r{i}", 20, 60) for i in range(8)]
        for client in clients:
            await client.until_tokens(5)
        cluster["a"].kill()
        await cluster.until(lambda: bool(cluster.runtime.snapshot()["suspected"]), "suspected")
        await cluster.until(lambda: not cluster.runtime.snapshot()["suspected"], "nobody is suspected")
        for client in clients:
            await client.until_end()
            assert client.finish_reason == "length"
        await cluster.all_up()


@virtual_time
async def test_a_request_without_a_client_is_not_tried_again() -> None:
    """If its client leaves before its instance dies, no part of it goes elsewhere."""
    async with Cluster(ScriptedPolicy({"r": "a"}), "ab") as cluster:
        client = await cluster.submit("r", 20, 60)
        await client.until_tokens(3)
        cluster.abort(client)
        cluster["a"].kill()
        await cluster.all_up()
        assert cluster.runtime.snapshot()["suspected"] == []
        assert cluster.runtime.n_live_requests == 0


@virtual_time
async def test_one_that_is_held_back_can_be_aborted() -> None:
    """Its turn never comes, and the request behind it is not forgotten."""
    names = ["a0", "a1", "a2", "a3"]
    async with Cluster(ScriptedPolicy(dict.fromkeys(names, "a")), "ab") as cluster:
        clients = {name: await cluster.submit(name, 20, 60) for name in names}
        for client in clients.values():
            await client.until_tokens(2)
        cluster["b"].pause()
        cluster["a"].kill()
        await cluster.until(lambda: len(cluster.runtime.snapshot()["suspected"]) == len(names), "all are suspected")
        held = [shown["id"] for shown in cluster.runtime.snapshot()["suspected"] if shown["held"]]
        cluster.abort(clients[held[0]])
        cluster["b"].unpause()
        for name in names:
            if name != held[0]:
                await clients[name].until_end()
        await cluster.all_up()


@virtual_time
async def test_a_suspected_request_does_not_move() -> None:
    """Neither a running nor a held-back suspect is resumed elsewhere, which would bypass the isolation there."""
    policy = ScriptedPolicy({"r0": "a", "r1": "a"})
    async with Cluster(policy, "ab") as cluster:
        clients = [await cluster.submit(f"r{i}", 40, 60) for i in range(2)]
        for client in clients:
            await client.until_tokens(5)
        policy.places = {"r0": "b", "r1": "b"}
        cluster["a"].kill()
        await cluster.until(
            lambda: {suspect["held"] for suspect in cluster.runtime.snapshot()["suspected"]} == {False, True}
        )
        for client in clients:
            cluster.move(client.request.request_id, "a")
        shown = cluster.runtime.snapshot()["suspected"]
        assert sorted(suspect["held"] for suspect in shown) == [False, True]
        ended = [(event.outcome, event.detail) for event in policy.ended_migrations()]
        assert ended == [(MigrationOutcome.STAYED, "suspected")] * 2
        for client in clients:
            await client.until_end()
            assert client.finish_reason == "length"
        await cluster.all_up()


@virtual_time
async def test_planned_ends_are_no_deaths() -> None:
    """An instance whose drain times out blames no request."""
    async with Cluster(ScriptedPolicy({"r": "a"}), "ab") as cluster:
        client = await cluster.submit("r", 20, 200)
        await client.until_tokens(3)
        cluster["a"].pause()
        cluster.runtime.elastic.drain("a", 0.5)
        await cluster.gone("a")
        assert cluster.runtime.snapshot()["suspected"] == []
        await client.until_end()
        assert client.finish_reason == "length"


@virtual_time
async def test_a_request_that_cannot_be_sent_ends() -> None:
    """An engine that cannot accept a request (too large for a message) has not died; only that request fails."""
    async with Cluster(ScriptedPolicy({"bad": "a", "good": "a"}), "ab") as cluster:
        engine = cluster["a"]
        add = engine.add

        async def fail(engine_request_id: str, request: object, resume: object = None, **_: object) -> None:
            if engine_request_id == "bad":
                raise OverflowError("integer out of range")
            await add(engine_request_id, request, resume)  # type: ignore[arg-type]

        engine.add = fail  # type: ignore[method-assign, assignment]
        bad = await cluster.submit("bad", 20, 10)
        good = await cluster.submit("good", 20, 10)
        await bad.until_end()
        await good.until_end()
        assert (bad.finish_reason, good.finish_reason) == ("error", "length")
        assert len(cluster.defects) == 1, "it is in the log"
        cluster.defects.clear()
        assert cluster.runtime.n_live_requests == 0


@pytest.mark.parametrize("apart_s", [0.0, 0.001, 0.02])
@pytest.mark.parametrize("n_instances", [2, 3])
@virtual_time
async def test_instances_that_die_together_end_nobody(n_instances: int, apart_s: float) -> None:
    """An orphan placed on an instance that is dead, or about to die of the same cause, has no part in that death."""
    dying = "abc"[:n_instances]
    policy = ScriptedPolicy({f"r{i}": dying[i % n_instances] for i in range(12)})
    async with Cluster(policy, "abcd") as cluster:
        clients = [await cluster.submit(f"r{i}", 20, 60) for i in range(12)]
        for client in clients:
            await client.until_tokens(3)
        policy.places = {f"r{i}": dying[(i + 1) % n_instances] for i in range(12)}
        for name in dying:
            cluster[name].kill()
            await asyncio.sleep(apart_s)
        for client in clients:
            await client.until_end()
            assert client.finish_reason == "length"
        assert cluster.runtime.snapshot()["poison"] == []
        await cluster.all_up()


@virtual_time
async def test_two_ordinary_deaths_under_many_requests() -> None:
    """No request is ended, and all are cleared of suspicion long before the first of them completes."""
    policy = ScriptedPolicy({f"r{i}": "a" for i in range(24)})
    async with Cluster(policy, "abc", capacity=replace(CAPACITY, kv_blocks=2048, max_num_seqs=32)) as cluster:
        clients = [await cluster.submit(f"r{i}", 20, 1500) for i in range(24)]
        for client in clients:
            await client.until_tokens(5)
        policy.places = {f"r{i}": "b" for i in range(24)}
        cluster["a"].kill()
        await cluster.until(lambda: bool(cluster.runtime.snapshot()["suspected"]), "suspected")
        await cluster.until(lambda: not cluster.runtime.snapshot()["suspected"], "nobody is suspected")
        cluster["b"].kill()
        await cluster.until(lambda: len(cluster.runtime.snapshot()["suspected"]) == len(clients), "suspected again")
        await cluster.until(lambda: not cluster.runtime.snapshot()["suspected"], "nobody is suspected")
        assert all(client.finish_reason is None for client in clients)
        for client in clients:
            cluster.abort(client)
        await cluster.all_up()


async def hang_whatever_admits(cluster: Cluster, name: str) -> int:
    """Make any engine hang as soon as it has the request; returns how many did once it is over."""
    hung: set[int] = set()
    while (stream := cluster.runtime._streams.get(name)) is not None:
        place = stream.instance_id
        engine = None if place is None else cluster.runtime.fleet.engine(place)
        if engine is not None and id(engine) not in hung and not _is_held(cluster, name):
            cluster[place].hang()  # type: ignore[index]
            hung.add(id(engine))
        await asyncio.sleep(0.001)
    return len(hung)


@pytest.mark.parametrize("n_others", [0, 6])
@virtual_time
async def test_a_request_that_hangs_what_admits_it_costs_two_instances(n_others: int) -> None:
    """Moved off a silent instance, it silences a second one, stays there, and ends once both are given up."""
    supervision = replace(SUPERVISION, suspect_s=0.3)
    async with Cluster(ScriptedPolicy(), "abcde", supervision=supervision) as cluster:
        others = [await cluster.submit(f"r{i}", 20, 60) for i in range(n_others)]
        poison = await cluster.submit("poison", 30, 200)
        assert await hang_whatever_admits(cluster, "poison") == 2
        assert poison.finish_reason == "error"
        assert [ended["id"] for ended in cluster.runtime.snapshot()["poison"]] == ["poison"]
        for client in others:
            await client.until_end()
            assert client.finish_reason == "length"
        await cluster.all_up()


@virtual_time
async def test_one_that_was_taken_away_and_had_a_token_is_not_blamed() -> None:
    """It is not blamed, whatever becomes of the instance that was silent."""
    async with Cluster(ScriptedPolicy({"r": "a"}), "ab", supervision=replace(SUPERVISION, suspect_s=0.3)) as cluster:
        cluster["a"].freeze()
        client = await cluster.submit("r", 20, 400)
        await client.until_tokens(1)
        assert cluster.where("r") == "b"
        await cluster.until(lambda: len(cluster.engines["a"]) == 2, "a is given up")
        assert cluster.runtime.snapshot()["suspected"] == []
        await client.until_end()
        assert client.finish_reason == "length"
        await cluster.all_up()


@virtual_time
async def test_a_restart_of_ours_is_no_death() -> None:
    """An instance whose side channel is dead is restarted, and no request is blamed."""
    async with Cluster(ScriptedPolicy({"r": "a"}), "ab", poison_deaths=1) as cluster:
        client = await cluster.submit("r", 20, 600)
        await client.until_tokens(3)
        cluster["a"].close_side_channel()
        await cluster.until(lambda: len(cluster.engines["a"]) == 2, "it is restarted")
        assert cluster.runtime.snapshot()["suspected"] == []
        await client.until_end()
        assert client.finish_reason == "length"
        await cluster.all_up()


@virtual_time
async def test_an_answer_to_an_older_question_says_nothing() -> None:
    """An instance polled before the death may have died since: a suspected request waits for the next answer."""
    policy = ScriptedPolicy({"r": "a"})
    async with Cluster(policy, "ab") as cluster:
        client = await cluster.submit("r", 20, 60)
        await client.until_tokens(3)
        policy.places = {"r": "b"}
        cluster["b"].hold_answers("report")
        await asyncio.sleep(2 * SUPERVISION.report_s)
        cluster["a"].kill()
        await cluster.until(lambda: cluster.where("r") == "b", "it is placed anew")
        cluster["b"].release_answers("report")
        await asyncio.sleep(SUPERVISION.report_s / 2)
        assert _is_held(cluster, "r")
        await client.until_end()
        assert client.finish_reason == "length"
        await cluster.all_up()


@virtual_time
async def test_a_request_that_was_sent_to_a_dead_instance_is_not_blamed_for_long() -> None:
    """It had no part in that death: an ordinary death after its first token elsewhere counts as its first."""
    policy = ScriptedPolicy({"r": "a"})
    async with Cluster(policy, "abc") as cluster:
        cluster["a"].kill()
        client = await cluster.submit("r", 20, 400)
        policy.places = {"r": "b"}
        await client.until_tokens(3)
        assert cluster.where("r") == "b"
        assert cluster.runtime._isolation._quarantine.is_idle
        cluster["b"].kill()
        await client.until_end()
        assert client.finish_reason == "length"
        await cluster.all_up()

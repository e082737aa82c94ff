"""Instances that fail at the start, while serving, or by silence, singly or together, and their requests."""

import asyncio
from dataclasses import replace

import pytest
from runtime_cluster import SUPERVISION, TIMES, Cluster, ScriptedPolicy

from cascadeinfer.core.errors import EngineError
from cascadeinfer.core.events import InstanceJoined, InstanceLost, MigrationOutcome
from cascadeinfer.core.migration import State
from cascadeinfer.runtime.given_up import GRACE_S
from support.virtual_time import virtual_time


def now_s() -> float:
    """Virtual seconds."""
    return asyncio.get_running_loop().time()


@virtual_time
async def test_orphans_go_on_elsewhere() -> None:
    """If an instance dies, its running and waiting requests go on elsewhere and complete."""
    policy = ScriptedPolicy({f"r{i}": "a" for i in range(12)})
    async with Cluster(policy) as cluster:
        clients = [await cluster.submit(f"r{i}", 50 + i, 40) for i in range(12)]
        await clients[0].until_tokens(10)
        cluster["a"].kill()
        for client in clients:
            await client.until_end()
            assert client.finish_reason == "length"
        await cluster.all_up()
        (lost,) = [e for e in policy.events if isinstance(e, InstanceLost)]
        assert sorted(lost.orphan_ids) == sorted(f"r{i}" for i in range(12))
        lengths = dict(zip(lost.orphan_ids, lost.orphan_tokens, strict=True))
        assert lengths["r0"] >= 50 + 10


@virtual_time
async def test_all_down_then_one_returns() -> None:
    """With no instance up, old and new requests wait; once one is back all complete."""
    failing = {"b", "c"}
    start_error = lambda name, n: "broken" if n > 0 and name in failing else None  # noqa: E731
    async with Cluster(start_error=start_error) as cluster:
        before = [await cluster.submit(f"r{i}", 50, 40) for i in range(6)]
        await before[0].until_tokens(10)
        for name in "abc":
            cluster[name].kill()
        await cluster.until(lambda: not cluster.runtime.live_engines())
        assert cluster.runtime.snapshot()["requests"]["unplaced"] == 6
        after = await cluster.submit("late", 50, 40)
        left = await cluster.submit("left", 50, 40)
        cluster.abort(left)
        await asyncio.sleep(0.5)
        assert not after.token_ids
        for client in [*before, after]:
            await client.until_end()
            assert client.finish_reason == "length"
        assert [e.instance_id for e in cluster.runtime.live_engines()] == ["a"]
        failing.clear()
        await cluster.all_up()


@virtual_time
async def test_back_off_doubles_and_starts_anew() -> None:
    """Restart delays are 1, 2, 4, 8, 8 s ...; a steady period resets the delay, another death keeps it growing."""
    async with Cluster(start_error=lambda name, n: "broken" if name == "b" and 0 < n < 6 else None) as cluster:
        made_s: list[float] = []
        died_s = now_s()
        cluster["b"].kill()
        for n in range(1, 7):
            await cluster.until(lambda n=n: len(cluster.engines["b"]) == n + 1)
            made_s.append(now_s())
        gaps = [b - a for a, b in zip([died_s + TIMES.notice_s, *made_s], made_s, strict=False)]
        waits = [gaps[0]] + [gap - TIMES.start_s for gap in gaps[1:]]
        assert waits == pytest.approx([1, 2, 4, 8, 8, 8], abs=0.1)
        await cluster.all_up()
        cluster["b"].kill()  # at once: not steady
        await cluster.until(lambda: len(cluster.engines["b"]) == 8)
        again_s = now_s()
        assert again_s - made_s[-1] >= 8
        await cluster.all_up()
        await asyncio.sleep(SUPERVISION.window_s + 1)
        died_s = now_s()
        cluster["b"].kill()
        await cluster.until(lambda: len(cluster.engines["b"]) == 9)
        assert now_s() - died_s == pytest.approx(1, abs=0.1)
        await cluster.all_up()
        assert cluster.runtime.snapshot()["instances"][1]["restarts"] == 8


@virtual_time
async def test_dead_instance_that_cannot_be_stopped() -> None:
    """Errors while cleaning up a dead engine are logged, and the instance is restarted anyway."""
    async with Cluster() as cluster:
        engine, stop = cluster["a"], cluster["a"].stop

        async def fail(timeout_s: float) -> None:
            await stop(timeout_s)
            raise ProcessLookupError("no such process")

        engine.stop = fail  # type: ignore[method-assign]
        engine.kill()
        await cluster.until(lambda: len(cluster.engines["a"]) == 2)
        await cluster.all_up()
        assert "internal error while instance a was stopped" in cluster.defects.pop()


@virtual_time
async def test_hung_instance_is_replaced() -> None:
    """An instance that answers nothing for `hang_s` is killed and restarted; its requests go on elsewhere."""
    policy = ScriptedPolicy({"r": "a"})
    async with Cluster(policy) as cluster:
        client = await cluster.submit("r", 50, 40)
        await client.until_tokens(5)
        hung_s = now_s()
        cluster["a"].hang()
        await cluster.until(lambda: len(cluster.runtime.live_engines()) == 2)
        assert SUPERVISION.hang_s <= now_s() - hung_s <= SUPERVISION.hang_s + 2 * SUPERVISION.report_s
        assert "hung" in cluster.runtime.snapshot()["instances"][0]["last_error"]
        await client.until_end()
        assert client.finish_reason == "length"
        await cluster.all_up()


@virtual_time
async def test_hung_instance_that_dies_before_it_is_found_out() -> None:
    """A death is noticed at once, even while waiting for an answer."""
    async with Cluster() as cluster:
        cluster["a"].hang()
        await asyncio.sleep(0.5)
        cluster["a"].kill()
        died_s = now_s()
        await cluster.until(lambda: len(cluster.runtime.live_engines()) == 2)
        assert now_s() - died_s < 0.1
        await cluster.all_up()


@pytest.mark.parametrize("victim", ["a", "b"])
@virtual_time
async def test_hang_in_mid_migration(victim: str) -> None:
    """A source or target that hangs when it owes the migration an answer delays the request, but loses nothing."""
    policy = ScriptedPolicy({"r": "a"})
    async with Cluster(policy) as cluster:
        client = await cluster.submit("r", 50, 200)
        await client.until_tokens(5)
        cluster["b"].hold_answers("reserve")
        cluster.move("r", "b")
        await asyncio.sleep(0.02)
        cluster[victim].hang()
        cluster["b"].release_answers("reserve")
        await client.until_end()
        assert client.finish_reason == "length"
        await cluster.all_up()


@virtual_time
async def test_a_hung_peer_delays_a_restart_but_does_not_block_it() -> None:
    """An instance that returns while another hangs joins once the hang has been detected."""
    async with Cluster() as cluster:
        cluster["a"].kill()
        await asyncio.sleep(0.5)
        cluster["b"].hang()
        await cluster.until(lambda: len(cluster.engines["a"]) == 2)
        await cluster.all_up()
        assert len(cluster.engines["a"]) == 2
        assert len(cluster.engines["b"]) == 2


@virtual_time
async def test_an_instance_that_hangs_before_it_joins_blocks_nobody() -> None:
    """An instance that hangs while connecting is detected like any other; those waiting to join then do."""
    async with Cluster() as cluster:
        cluster["a"].kill()
        await cluster.until(lambda: len(cluster.engines["a"]) == 2)
        cluster["a"].hold_answers("handshake")
        await cluster.until(lambda: cluster["a"].serves)
        cluster["a"].hang()
        cluster["b"].kill()
        await cluster.until(lambda: len(cluster.runtime.live_engines()) == 1)
        await cluster.all_up()
        assert len(cluster.engines["a"]) == 3


@virtual_time
async def test_no_reports_before_an_instance_joins() -> None:
    """While an instance is connecting, its reports prove that it is alive but are not passed to the policy."""
    policy = ScriptedPolicy()
    async with Cluster(policy) as cluster:
        cluster["a"].kill()
        await cluster.until(lambda: len(cluster.engines["a"]) == 2)
        cluster["a"].hold_answers("handshake")
        await asyncio.sleep(TIMES.start_s + SUPERVISION.hang_s / 2)
        cluster["a"].release_answers("handshake")
        await cluster.all_up()
        about_a = [type(e) for e in policy.events if getattr(e, "instance_id", None) == "a"]
        joined_again = len(about_a) - about_a[::-1].index(InstanceJoined) - 1
        assert about_a[joined_again - 1] is InstanceLost


@virtual_time
async def test_one_that_does_not_start_stops_all() -> None:
    """If one instance does not start, `start` raises its error and everything else is stopped."""
    cluster = Cluster(start_error=lambda name, _: "no memory" if name == "b" else None)
    with pytest.raises(EngineError, match=r"instance b: .*no memory") as raised:
        await cluster.runtime.start()
    assert raised.value.instance_id == "b"
    for name in "abc":
        assert not cluster[name].serves
        assert not cluster[name].core.alive
        assert len(cluster.engines[name]) == 1
    assert not list(cluster.registry.collect())


@virtual_time
async def test_one_that_cannot_connect_stops_all() -> None:
    """If two instances cannot connect at the first start, `start` raises instead of retrying for ever."""
    cluster = Cluster()

    def refusing(n_start: int) -> object:
        engine = make(n_start)
        engine.refuse_connection()
        return engine

    supervisor = cluster.runtime.fleet["c"].supervisor
    make = supervisor._make_engine
    supervisor._make_engine = refusing
    with pytest.raises(EngineError, match="handshake"):
        await cluster.runtime.start()
    assert not any(cluster[name].core.alive for name in "abc")


@virtual_time
async def test_an_engine_that_cannot_be_made_is_tried_again() -> None:
    """If making an engine for a restart fails (say, no port is left), the next attempt follows after the back-off."""
    async with Cluster() as cluster:
        supervisor = cluster.runtime.fleet["c"].supervisor
        make = supervisor._make_engine

        def sometimes(n_start: int) -> object:
            if n_start == 1:
                raise OSError("no port")
            return make(n_start)

        supervisor._make_engine = sometimes
        cluster["c"].kill()
        await cluster.until(lambda: len(cluster.runtime.live_engines()) == 2)
        await cluster.all_up()
        assert cluster.runtime.snapshot()["instances"][2]["restarts"] == 2


@virtual_time
async def test_start_can_be_cancelled() -> None:
    """A signal during the start (cancellation) stops what has been started."""
    cluster = Cluster()
    start = asyncio.ensure_future(cluster.runtime.start())
    await asyncio.sleep(TIMES.start_s / 2)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert not any(cluster[name].core.alive for name in "abc")


@virtual_time
async def test_a_restart_that_cannot_connect_is_tried_again() -> None:
    """A restarted instance that cannot connect to any healthy peer does not join; its next attempt does."""
    policy = ScriptedPolicy()
    async with Cluster(policy) as cluster:
        cluster["c"].kill()
        await cluster.until(lambda: len(cluster.engines["c"]) == 2)
        cluster["c"].refuse_connection(2)
        await cluster.until(lambda: len(cluster.engines["c"]) == 3)
        await cluster.all_up()
        joined = [e.instance_id for e in policy.events if isinstance(e, InstanceJoined)]
        assert joined.count("c") == 2


@virtual_time
async def test_shutdown_of_an_instance_is_no_end_of_its_requests() -> None:
    """An instance that gets SIGTERM drops its requests first: they go on elsewhere, and no client sees an abort."""
    policy = ScriptedPolicy({f"r{i}": "a" for i in range(3)})
    async with Cluster(policy) as cluster:
        clients = [await cluster.submit(f"r{i}", 50, 40) for i in range(3)]
        await clients[0].until_tokens(5)
        cluster["a"].end_all("abort")
        await asyncio.sleep(0.2)
        cluster["a"].kill()
        for client in clients:
            await client.until_end()
            assert client.finish_reason == "length"
        await cluster.all_up()


@pytest.mark.parametrize("state", [None, State.ASKING, State.CUTTING, State.RESUMING], ids=str)
@virtual_time
async def test_a_request_dropped_by_an_instance_that_lives_is_aborted(state: State | None) -> None:
    """If an instance drops a request but lives on, the client is told after the grace period and any migration ends."""
    policy = ScriptedPolicy({"r": "a"})
    async with Cluster(policy) as cluster:
        client = await cluster.submit("r", 50, 40)
        await client.until_tokens(5)
        if state is State.ASKING:
            cluster["b"].hold_answers("reserve")
        if state is State.CUTTING:
            cluster["a"].pause()
        if state is State.RESUMING:
            cluster["b"].pause()
        if state is not None:
            cluster.move("r", "b")
            await cluster.until(lambda: cluster.migration("r") is not None and cluster.migration("r").state is state)
            await asyncio.sleep(0.015)
        cluster["b" if state is State.RESUMING else "a"].end_all("abort")
        dropped_s = now_s()
        await asyncio.sleep(0.1)
        for name in "ab":
            cluster[name].unpause()
        cluster["b"].release_answers("reserve")
        await client.until_end()
        if state is not State.RESUMING:
            assert client.finish_reason == "abort"
            assert now_s() - dropped_s == pytest.approx(GRACE_S, abs=0.1)


@virtual_time
async def test_clients_of_a_pause_that_aborts_are_told_at_once() -> None:
    """An instance that was told to abort says so in its next report; nobody waits for a death that does not come."""
    async with Cluster(ScriptedPolicy({"r": "a", "s": "b"})) as cluster:
        client, other = await cluster.submit("r", 50, 40), await cluster.submit("s", 50, 40)
        await client.until_tokens(5)
        cluster["a"].pause_by_aborting()
        paused_s = now_s()
        await client.until_end()
        assert client.finish_reason == "abort"
        assert now_s() - paused_s <= 2 * SUPERVISION.report_s
        await other.until_end()
        assert other.finish_reason == "length"


@virtual_time
async def test_stop_in_the_middle_leaves_nothing() -> None:
    """Stopping with requests, migrations and restarts under way leaves no engine, task, timer or metric."""
    cluster = Cluster(ScriptedPolicy({"r": "a", "s": "b"}))
    await cluster.runtime.start()
    await cluster.submit("r", 50, 400)
    await cluster.submit("s", 50, 400)
    await asyncio.sleep(0.3)
    cluster["b"].hold_answers("reserve")
    cluster.move("r", "b")
    cluster["b"].end_all("abort")
    cluster["c"].kill()
    await asyncio.sleep(0.1)
    await cluster.runtime.stop(1.0)
    assert not any(cluster[name].serves for name in "abc")
    assert not list(cluster.registry.collect())
    assert not asyncio.get_running_loop().timers()
    await asyncio.sleep(2 * GRACE_S)


@virtual_time
async def test_a_slow_step_is_no_death() -> None:
    """An instance that stalls for less than `hang_s` keeps its requests."""
    async with Cluster(supervision=replace(SUPERVISION, hang_s=5.0)) as cluster:
        client = await cluster.submit("r", 50, 40)
        await client.until_tokens(5)
        cluster[cluster.where("r")].hold_answers("report")
        await asyncio.sleep(4.0)
        for name in "abc":
            cluster[name].release_answers("report")
        await client.until_end()
        assert all(len(generation) == 1 for generation in cluster.engines.values())


@virtual_time
async def test_target_restarts_while_the_request_returns() -> None:
    """A second death of the target, after its restart, does not disturb a request that goes back to its source."""
    policy = ScriptedPolicy({"r": "a"})
    async with Cluster(policy) as cluster:
        client = await cluster.submit("r", 50, 200)
        await client.until_tokens(5)
        cluster["a"].pause()
        cluster.move("r", "b")
        await asyncio.sleep(0.1)
        cluster["b"].kill()
        await cluster.until(lambda: len(cluster.engines["b"]) == 2)
        await cluster.all_up()
        cluster["b"].kill()
        await asyncio.sleep(0.1)
        cluster["a"].unpause()
        await client.until_end()
        assert client.finish_reason == "length"
        assert [e.outcome for e in policy.ended_migrations()] == [MigrationOutcome.STAYED]
        await cluster.all_up()

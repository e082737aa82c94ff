"""Instances are added and removed at run time: clients notice nothing, nothing is lost, and ids are never reused."""

import asyncio
import contextlib
import dataclasses

import pytest
from runtime_cluster import SUPERVISION, Cluster, ScriptedPolicy

from cascadeinfer.core.errors import ScalingRefusedError, UnknownInstanceError
from cascadeinfer.core.events import InstanceJoined, InstanceLost, PinReason
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.migration import State
from cascadeinfer.core.policies import POLICIES
from cascadeinfer.core.policies.cascade import Cascade
from cascadeinfer.core.policies.static_stages import StaticStages
from cascadeinfer.core.policy import Policy
from support.virtual_time import VirtualTimeLoop, virtual_time

LONG_S = 600.0
LAYOUT = StageLayout.from_boundaries((100, 200), (("a",), ("b",), ("c",)))


def phases(cluster: Cluster) -> dict[str, str]:
    """What `/admin/instances` shows of each instance."""
    return {shown["id"]: shown["phase"] for shown in cluster.runtime.snapshot()["instances"]}


def policy_named(name: str) -> Policy:
    """A policy with its defaults."""
    return StaticStages(layout=LAYOUT) if name == "static_stages" else POLICIES[name].make()


@virtual_time
async def test_an_added_instance_gets_work() -> None:
    """
    An added instance starts while the others serve without a pause,
    connects to all, and takes requests and moves.
    """
    policy = ScriptedPolicy()
    async with Cluster(policy) as cluster:
        client = await cluster.submit("r", 50, 400)
        await client.until_tokens(5)
        (added,) = cluster.runtime.elastic.add()
        assert added == "3"
        assert phases(cluster)[added] == "starting"
        before = len(client.token_ids)
        await cluster.all_up()
        assert len(client.token_ids) > before
        policy.places["s"] = added
        await (await cluster.submit("s")).until_end()
        cluster.move("r", added)
        await cluster.until(lambda: cluster.where("r") == added)
        await client.until_end()
        assert cluster[added].core.pulls == 1
        assert [e.outcome for e in policy.ended_migrations()] == ["moved"]


@pytest.mark.parametrize("name", sorted(POLICIES))
@virtual_time
async def test_a_drained_instance_hands_over_and_goes(name: str) -> None:
    """
    Under every policy, a draining instance's requests move off live, without
    recomputation; it gets no new ones and ends.
    """
    async with Cluster(policy_named(name)) as cluster:
        clients = [await cluster.submit(f"r{i}", 30 + 30 * i, 500) for i in range(6)]
        for client in clients:
            await client.until_tokens(4)
        victim = cluster.where("r0")
        assert victim is not None
        cluster.runtime.elastic.drain(victim, LONG_S)
        assert phases(cluster)[victim] == "draining"
        later = [await cluster.submit(f"s{i}", 40, 30) for i in range(4)]
        assert victim not in {cluster.where(client.request.request_id) for client in later}
        assert (await cluster.gone(victim)).error is None
        assert any(client.finish_reason is None for client in clients), "it waited for them instead"
        for client in clients + later:
            await client.until_end()
        assert set(cluster.runtime.snapshot()["migrations"]["ended"]) == {"moved"}
        assert cluster.registry.get_sample_value("cascadeinfer_recovered_requests_total", {"exact": "yes"}) is None
        assert victim not in phases(cluster)
        assert not [g for g in cluster.runtime.fleet.gauges().instances if g.instance_id == victim]


@virtual_time
async def test_what_cannot_move_ends_where_it_is() -> None:
    """A pinned request keeps the draining instance alive until it has finished there."""
    policy = ScriptedPolicy({"r": "a"})
    async with Cluster(policy) as cluster:
        client = await cluster.submit("r", 50, 200, pin_reason=PinReason.SEEDED_SAMPLING)
        await client.until_tokens(5)
        cluster.runtime.elastic.drain("a", LONG_S)
        await client.until_end()
        assert len(client.token_ids) == 200
        await cluster.gone("a")
        assert not policy.ended_migrations()


@virtual_time
async def test_an_instance_that_another_process_uses_stays() -> None:
    """Though nothing runs there; each process says which instances it uses: those that it may choose, or is on."""
    policy = ScriptedPolicy({"r": "a"})
    async with Cluster(policy) as cluster:
        elastic = cluster.runtime.elastic
        used = {"a", "b"}
        elastic.used_elsewhere = used.__contains__
        client = await cluster.submit("r", 50, 200, pin_reason=PinReason.SEEDED_SAMPLING)
        await client.until_tokens(5)
        elastic.drain("a", LONG_S)
        elastic.drain("b", LONG_S)
        assert elastic.in_use() == ["a", "c"]
        await client.until_end()
        assert elastic.in_use() == ["c"]
        await asyncio.sleep(5.0)
        assert phases(cluster) == {"a": "draining", "b": "draining", "c": "up"}
        used.clear()
        elastic.look_at_all()
        await cluster.gone("a")
        await cluster.gone("b")


@virtual_time
async def test_the_time_is_up() -> None:
    """When the drain times out, what is left goes on elsewhere, is recomputed, and is counted as recomputed."""
    policy = ScriptedPolicy({"r": "a"})
    async with Cluster(policy) as cluster:
        client = await cluster.submit("r", 50, 400, pin_reason=PinReason.LORA)
        await client.until_tokens(5)
        cluster.runtime.elastic.drain("a", 0.5)
        gone = await cluster.gone("a")
        assert gone.how == "drained"
        assert gone.error == "time-out after 0.5 s: 1 requests were taken from it"
        await client.until_end()
        assert cluster.registry.get_sample_value("cascadeinfer_recovered_requests_total", {"exact": "no"}) == 1


@virtual_time
async def test_bad_requests_change_nothing() -> None:
    """Unknown ids, a second drain, the last instance and a full machine are refused with the reason."""
    async with Cluster(instance_ids="ab", max_instances=3) as cluster:
        elastic = cluster.runtime.elastic
        with pytest.raises(UnknownInstanceError, match="no instance x"):
            elastic.drain("x", 1.0)
        with pytest.raises(ScalingRefusedError, match="no place left"):
            elastic.add(2)
        assert cluster.placed == {"a", "b"}
        pinned = await cluster.submit("r", 50, 100, pin_reason=PinReason.LORA)
        busy = cluster.where("r")
        assert busy is not None
        other = {"a": "b", "b": "a"}[busy]
        elastic.drain(busy, LONG_S)
        with pytest.raises(ScalingRefusedError, match="drains already"):
            elastic.drain(busy, 1.0)
        with pytest.raises(ScalingRefusedError, match="nowhere to go"):
            elastic.drain(other, 1.0)
        await pinned.until_end()
        await cluster.gone(busy)
        (added,) = elastic.add()
        await cluster.all_up()
        elastic.drain(other, LONG_S)
        await cluster.gone(other)
        assert set(phases(cluster)) == {added}
        (again,) = elastic.add()
        assert again not in {added, "a", "b"}
        await cluster.all_up()


@virtual_time
async def test_a_failed_start_is_told_and_harms_nobody() -> None:
    """The reason is shown, the place is free again, and requests go on."""
    async with Cluster(start_error=lambda name, _: "no memory" if name == "3" else None) as cluster:
        client = await cluster.submit("r", 50, 300)
        await client.until_tokens(5)
        added = cluster.runtime.elastic.add(2)
        gone = await cluster.gone(added[0])
        assert (gone.how, gone.error) == ("did not start", "instance 3: did not start: no memory")
        (shown,) = cluster.runtime.snapshot()["departed"]
        assert [(p["event"], p["state"], p["why"]) for p in shown["history"]] == [
            ("start", "starting", None),
            ("start_failed", "removing", gone.error),
            ("removed", "gone", "did not start"),
        ]
        await cluster.all_up()
        assert set(phases(cluster)) == {"a", "b", "c", added[1]}
        await client.until_end()


@virtual_time
async def test_killed_while_it_is_connected() -> None:
    """An added instance that dies during its handshakes is restarted like any other; the others are not affected."""
    policy = ScriptedPolicy()
    async with Cluster(policy) as cluster:
        client = await cluster.submit("r", 50, 300)
        cluster["b"].hold_answers("handshake")
        (added,) = cluster.runtime.elastic.add()
        await cluster.until(lambda: bool(cluster.engines[added]))
        await asyncio.sleep(cluster[added].times.start_s + 0.01)
        assert phases(cluster)[added] == "starting"
        cluster[added].kill()
        await cluster.until(lambda: phases(cluster)[added] == "down")
        cluster["b"].release_answers("handshake")
        await cluster.all_up()
        assert len(cluster.engines[added]) == 2
        await client.until_end()


@pytest.mark.parametrize("stage", ["starting", "connecting", "down"])
@virtual_time
async def test_removed_before_it_serves(stage: str) -> None:
    """An instance that is starting, connecting or down can be removed; the policy never hears of it, or never again."""
    policy = ScriptedPolicy()
    async with Cluster(policy) as cluster:
        client = await cluster.submit("r", 50, 200)
        if stage == "connecting":
            cluster["b"].hold_answers("handshake")
        (added,) = cluster.runtime.elastic.add()
        await asyncio.sleep(0.001)
        if stage == "connecting":
            await asyncio.sleep(cluster[added].times.start_s + 0.01)
        elif stage == "down":
            await cluster.all_up()
            cluster[added].kill()
            await cluster.until(lambda: phases(cluster)[added] == "down")
        cluster.runtime.elastic.drain(added, LONG_S)
        gone = await cluster.gone(added)
        assert gone.how == ("removed while down" if stage == "down" else "removed before it was up")
        cluster["b"].release_answers("handshake")
        await client.until_end()
        joined = [e for e in policy.events if isinstance(e, InstanceJoined) and e.instance_id == added]
        assert len(joined) == (1 if stage == "down" else 0)
        assert len(cluster.engines[added]) == 1


@pytest.mark.parametrize("how", ["kill", "hang"])
@virtual_time
async def test_killed_while_it_drains(how: str) -> None:
    """Its requests go on elsewhere and it is not restarted."""
    policy = ScriptedPolicy({"r": "a", "s": "a"})
    async with Cluster(policy) as cluster:
        clients = [
            await cluster.submit("r", 50, 300, pin_reason=PinReason.LORA),
            await cluster.submit("s", 100, 300),
        ]
        for client in clients:
            await client.until_tokens(5)
        cluster.runtime.elastic.drain("a", LONG_S)
        cluster["a"].kill() if how == "kill" else cluster["a"].hang()
        gone = await cluster.gone("a")
        assert gone.how == "died while it drained"
        for client in clients:
            await client.until_end()
        await asyncio.sleep(SUPERVISION.backoff_max_s)
        assert len(cluster.engines["a"]) == 1
        assert [e.instance_id for e in policy.events if isinstance(e, InstanceLost)] == ["a"]


@pytest.mark.parametrize("victim", ["source", "target"])
@pytest.mark.parametrize("state", [State.ASKING, State.CUTTING, State.RESUMING])
@virtual_time
async def test_killed_in_mid_move_of_a_drain(state: State, victim: str) -> None:
    """Source or target dies in any state of the move: the request completes, and the drain ends."""
    policy = ScriptedPolicy({"r": "a"})
    async with Cluster(policy, "ab") as cluster:
        client = await cluster.submit("r", 60, 300)
        await client.until_tokens(5)
        if state is State.ASKING:
            cluster["b"].hold_answers("reserve")
        else:
            cluster["a" if state is State.CUTTING else "b"].pause()
        cluster.runtime.elastic.drain("a", LONG_S)
        await cluster.until(lambda: (m := cluster.migration("r")) is not None and m.state is state)
        cluster["a" if victim == "source" else "b"].kill()
        await asyncio.sleep(0.1)
        for engine in (cluster["a"], cluster["b"]):
            engine.unpause()
            engine.release_answers("reserve")
        await client.until_end()
        await cluster.gone("a")
        await cluster.all_up()


@virtual_time
async def test_the_only_other_instance_dies_during_a_drain() -> None:
    """Its requests wait until it is back; those of the draining instance end there."""
    policy = ScriptedPolicy({"r": "a", "s": "b"})
    async with Cluster(policy, "ab") as cluster:
        kept = await cluster.submit("r", 50, 200, pin_reason=PinReason.LORA)
        moved = await cluster.submit("s", 50, 200)
        await moved.until_tokens(5)
        cluster.runtime.elastic.drain("a", LONG_S)
        cluster["b"].kill()
        await kept.until_end()
        await moved.until_end()
        await cluster.gone("a")


class ServerStops(Exception):  # noqa: N818 - no error
    """Leave the cluster's `async with` block without waiting for its requests."""


@pytest.mark.parametrize("what", ["adding", "connecting", "draining"])
@virtual_time
async def test_stopped_on_the_way(what: str) -> None:
    """A server that stops during an add or a drain leaves no process, timer or task behind and starts nothing new."""
    cluster = Cluster(ScriptedPolicy({"r": "a"}))
    with contextlib.suppress(ServerStops):
        async with cluster:
            client = await cluster.submit("r", 50, 4000, pin_reason=PinReason.LORA)
            await client.until_tokens(5)
            if what == "draining":
                cluster.runtime.elastic.drain("a", LONG_S)
            else:
                if what == "connecting":
                    cluster["b"].hold_answers("handshake")
                cluster.runtime.elastic.add()
                await asyncio.sleep(0.01 if what == "adding" else cluster["a"].times.start_s + 0.01)
            raise ServerStops
    with pytest.raises(ScalingRefusedError, match="stopping"):
        cluster.runtime.elastic.add()
    assert not [engine for engines in cluster.engines.values() for engine in engines if engine.serves]
    assert not cluster.defects
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    assert not loop.timers()


@pytest.mark.parametrize("fault", ["kill", "drain", "add"])
@virtual_time
async def test_faults_while_a_new_layout_is_rolled_out(fault: str) -> None:
    """A layout change moves requests between all instances; a death, a drain or an add in the middle loses none."""
    policy = Cascade(layout=LAYOUT)
    quick = dataclasses.replace(SUPERVISION, report_s=0.02)
    async with Cluster(policy, supervision=quick) as cluster:
        clients = [await cluster.submit(f"r{i}", 20 + 25 * i, 300) for i in range(10)]
        for client in clients:
            await client.until_tokens(3)
        policy.roster.adopt(StageLayout.from_boundaries((60, 120), (("c",), ("a",), ("b",))))
        policy._follow_roster("test", [])
        await cluster.until(lambda: len(cluster.runtime._migrator) > 0, "moves under way")
        if fault == "kill":
            cluster["b"].kill()
        elif fault == "drain":
            cluster.runtime.elastic.drain("b", LONG_S)
        else:
            cluster.runtime.elastic.add()
        for client in clients:
            await client.until_end()
        await cluster.all_up()
        if fault == "drain":
            await cluster.gone("b")
        expected = {"kill": {"a", "b", "c"}, "drain": {"a", "c"}, "add": {"a", "b", "c", "3"}}[fault]
        layout = cluster.runtime.fleet.layout
        assert layout is not None
        assert {i for stage in layout.stages for i in stage.instance_ids} == expected

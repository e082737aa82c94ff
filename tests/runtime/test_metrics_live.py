"""What operators see: the snapshot and the Prometheus metrics, with their names, labels and values."""

import asyncio
from dataclasses import replace

import pytest
from runtime_cluster import CAPACITY, Cluster, ScriptedPolicy

from cascadeinfer.core.effects import Dispatch, Effect, PublishLayout
from cascadeinfer.core.events import Event, RequestArrived
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.policies.least_loaded import LeastLoaded
from cascadeinfer.core.refusals import Refusal
from cascadeinfer.runtime.gauges import FleetGauges
from cascadeinfer.runtime.metrics import RuntimeMetrics
from support.virtual_time import virtual_time

GAUGES = ("up", "running", "waiting", "kv_usage", "kv_pulls", "failed_pulls", "pinned", "restarts")
LAYOUT = StageLayout.from_boundaries((100,), (("a", "b"), ("c",)))


async def moved_once(cluster: Cluster) -> None:
    """Two stages; one request moves from a to c and runs on there, three others run on a."""
    cluster.do(PublishLayout("x", LAYOUT))
    client = await cluster.submit("r", 90, 300)
    for i in range(3):
        await cluster.submit(f"s{i}", 20, 300)
    await client.until_tokens(20)
    cluster.move("r", "c")
    await cluster.until(lambda: cluster.migration("r") is None)
    await asyncio.sleep(0.25)


def places() -> ScriptedPolicy:
    """Everything starts on a."""
    return ScriptedPolicy({"r": "a"} | {f"s{i}": "a" for i in range(3)})


@virtual_time
async def test_gauges() -> None:
    """Every instance has every gauge, labelled with its stage, and the stages add up."""
    async with Cluster(places()) as cluster:
        await moved_once(cluster)
        read = cluster.registry.get_sample_value
        seen = {
            name: tuple(
                read(f"cascadeinfer_instance_{name}", {"instance": i, "stage": "1" if i == "c" else "0"}) for i in "abc"
            )
            for name in GAUGES
        }
        assert seen["up"] == (1, 1, 1)
        assert seen["running"] == (3, 0, 1)
        assert seen["waiting"] == (0, 0, 0)
        assert seen["kv_pulls"] == (0, 0, 1)
        assert seen["failed_pulls"] == seen["pinned"] == seen["restarts"] == (0, 0, 0)
        for name, engine in zip("abc", map(cluster.__getitem__, "abc"), strict=True):
            used = CAPACITY.kv_blocks - engine.core.free_blocks()
            assert seen["kv_usage"]["abc".index(name)] == pytest.approx(used / CAPACITY.kv_blocks, abs=0.03)
        assert [read("cascadeinfer_stage_running", {"stage": s}) for s in "01"] == [3, 1]
        assert [read("cascadeinfer_stage_waiting", {"stage": s}) for s in "01"] == [0, 0]
        assert read("cascadeinfer_stage_kv_usage", {"stage": "0"}) == pytest.approx(sum(seen["kv_usage"][:2]) / 2)
        labels = {"instance": "c", "stage": "1"}
        assert read("cascadeinfer_instance_held_blocks", {**labels, "reason": "pins"}) == 0
        assert await cluster["c"].reserve("somebody", 64) is None
        await asyncio.sleep(0.25)
        n_held = read("cascadeinfer_instance_held_blocks", {**labels, "reason": "reservations"})
        assert n_held == CAPACITY.blocks_for(64) + 1
        [shown] = [entry for entry in cluster.runtime.snapshot()["instances"] if entry["id"] == "c"]
        assert shown["held_blocks"] == {"reservations": n_held, "pins": 0, "precopies": 0}
        await cluster["c"].release_reservation("somebody")


@virtual_time
async def test_counters_and_pause() -> None:
    """Migrations are counted by outcome, reason and detail; the pause of a moved request is observed once."""
    async with Cluster(places()) as cluster:
        await moved_once(cluster)
        cluster["b"].refuse_room(Refusal.NO_BLOCKS)
        cluster.move("s0", "b")
        await asyncio.sleep(0.1)
        read = cluster.registry.get_sample_value
        labels = {"outcome": "moved", "reason": "operator", "detail": ""}
        assert read("cascadeinfer_migrations_total", labels) == 1
        labels = {"outcome": "stayed", "reason": "operator", "detail": "room_refused:no_blocks"}
        assert read("cascadeinfer_migrations_total", labels) == 1
        assert read("cascadeinfer_migration_pause_seconds_count", {"outcome": "moved"}) == 1
        pause_s = read("cascadeinfer_migration_pause_seconds_sum", {"outcome": "moved"})
        times = cluster["c"].times
        assert times.step_s < pause_s < 5 * times.step_s + times.pull_s
        assert read("cascadeinfer_migration_pause_seconds_count", {"outcome": "recomputed"}) is None


@virtual_time
async def test_requests_by_outcome() -> None:
    """Finished and aborted requests are counted separately; an orphan is counted as recovered."""
    async with Cluster(places()) as cluster:
        await moved_once(cluster)
        cluster.abort(cluster.clients["s1"])
        cluster["a"].kill()
        await asyncio.sleep(0.1)
        read = cluster.registry.get_sample_value
        assert read("cascadeinfer_instance_up", {"instance": "a", "stage": "0"}) == 0
        assert read("cascadeinfer_instance_running", {"instance": "a", "stage": "0"}) == 0
        for name in ("r", "s0", "s2"):
            await cluster.clients[name].until_end()
        assert read("cascadeinfer_requests_total", {"outcome": "finished"}) == 3
        assert read("cascadeinfer_requests_total", {"outcome": "aborted"}) == 1
        assert read("cascadeinfer_recovered_requests_total", {"exact": "yes"}) == 2
        await cluster.all_up()
        assert read("cascadeinfer_instance_restarts", {"instance": "a", "stage": "0"}) == 1


class Sharing(LeastLoaded):
    """Says of each request with a long prompt that a backlog decided its place."""

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """See `Policy.handle`."""
        effects = super().handle(event, now_s)
        long = isinstance(event, RequestArrived) and event.prompt_tokens > 100
        return [replace(effect, shared=long) if isinstance(effect, Dispatch) else effect for effect in effects]


@virtual_time
async def test_shared_requests_are_counted() -> None:
    """Of three requests, two were dispatched because of a backlog, and the counter says two."""
    async with Cluster(Sharing()) as cluster:
        for number, prompt in enumerate((20, 200, 300)):
            await (await cluster.submit(f"r{number}", prompt, 3)).until_end()
        assert cluster.registry.get_sample_value("cascadeinfer_shared_requests_total") == 2


@virtual_time
async def test_metrics_can_be_made_again() -> None:
    """After `close` the registry is empty, and another runtime in the process can register."""
    first = Cluster()
    first.runtime.metrics.close()
    assert not list(first.registry.collect())
    again = RuntimeMetrics(first.registry, FleetGauges)
    assert first.registry.get_sample_value("cascadeinfer_requests_total", {"outcome": "finished"}) is None
    assert {family.name for family in first.registry.collect()} >= {f"cascadeinfer_instance_{name}" for name in GAUGES}
    again.close()


@virtual_time
async def test_snapshot() -> None:
    """The snapshot shows stages, instances, requests with their place and attempts, and migrations by outcome."""
    async with Cluster(places()) as cluster:
        await moved_once(cluster)
        shown = cluster.runtime.snapshot()
        assert shown["stages"] == [
            {"range": "0-100", "instances": ["a", "b"]},
            {"range": "100-", "instances": ["c"]},
        ]
        by_id = {instance["id"]: instance for instance in shown["instances"]}
        assert [by_id[i]["stage"] for i in "abc"] == [0, 0, 1]
        assert [by_id[i]["requests"] for i in "abc"] == [3, 0, 1]
        assert [by_id[i]["running"] for i in "abc"] == [3, 0, 1]
        assert by_id["c"]["kv_pulls"] == 1
        assert 90 < by_id["c"]["pulled_tokens"] < 90 + 300
        assert by_id["a"]["lengths"] == sorted(by_id["a"]["lengths"])
        assert all(by_id[i]["up"] and by_id[i]["kv_blocks"] == CAPACITY.kv_blocks for i in "abc")
        assert by_id["a"]["last_error"] is None
        assert shown["migrations"] == {"under_way": 0, "ended": {"moved": 1}}
        assert (shown["requests"]["live"], shown["requests"]["unplaced"]) == (4, 0)
        (moved,) = [r for r in shown["requests"]["oldest"] if r["id"] == "r"]
        assert (moved["instance"], moved["attempts"], moved["pinned"]) == ("c", 2, None)
        cluster["b"].pause()
        cluster.move("s0", "b")
        await asyncio.sleep(0.05)
        assert cluster.runtime.snapshot()["migrations"]["under_way"] == 1
        cluster["b"].unpause()
        cluster["a"].kill()
        await asyncio.sleep(0.1)
        down = cluster.runtime.snapshot()["instances"][0]
        assert (down["up"], down["requests"], down["running"], down["kv_blocks_used"]) == (False, 0, 0, 0)
        assert down["last_error"]
        for client in cluster.clients.values():
            await client.until_end()
        await cluster.all_up()

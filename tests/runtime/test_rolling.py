"""The rolling update in virtual time: clients notice nothing, and never more than one instance is missing."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from runtime_cluster import SUPERVISION, Client, Cluster, ScriptedPolicy

from cascadeinfer.core.errors import ConfigError, ScalingRefusedError
from cascadeinfer.core.events import PinReason
from cascadeinfer.core.kind import InstanceTerms, Role
from cascadeinfer.core.layout import RoleLayout, Stage, StageLayout
from cascadeinfer.core.policies import POLICIES
from cascadeinfer.core.policies.roles import Roles
from cascadeinfer.core.policies.static_stages import StaticStages
from cascadeinfer.core.policy import Policy
from cascadeinfer.core.types import LengthRange
from cascadeinfer.engines.build import FIRST_BUILD, Build
from cascadeinfer.runtime.instance_state import Deed
from cascadeinfer.runtime.rolling import Phase
from cascadeinfer.runtime.streams import Journey
from cascadeinfer.runtime.versions import OUTCOME
from support.virtual_time import virtual_time

LONG_S = 600.0
SEQS = ("--max-num-seqs", "16")
BLOCKS = ("--block-size", "32")
MODEL = ("--model", "v2")
LAYOUT = StageLayout.from_boundaries((100, 200), (("a",), ("b",), ("c",)))


def policy_named(name: str) -> Policy:
    """A policy with its defaults."""
    return StaticStages(layout=LAYOUT) if name == "static_stages" else POLICIES[name].make()


class Rollable(Cluster):
    """A cluster whose instances can be replaced by others, and that remembers where requests have been."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """See Cluster."""
        super().__init__(*arguments, **named)
        self.journeys: dict[str, Journey] = {}

    def prepare(self, options: Sequence[str]) -> Build:
        """What the options of a rolling update stand for: a number of sequences, a block size, or a model."""
        match tuple(options):
            case ():
                return FIRST_BUILD
            case ("--max-num-seqs", value):
                return Build(1, (f"--max-num-seqs {value}",))
            case ("--block-size", value):
                return Build(2, (f"--block-size {value}",), kv_group=f"blocks {value}")
            case ("--model", value):
                return Build(3, (f"--model {value}",), value, value)
            case _:
                raise ConfigError("cannot be changed", option=options[0])

    async def submit(self, request_id: str, *arguments: Any, **named: Any) -> Client:
        """See Cluster."""
        client = await super().submit(request_id, *arguments, **named)
        journey = self.runtime.journey_of(request_id)
        assert journey is not None
        self.journeys[request_id] = journey
        return client

    def visited(self, request_id: str) -> list[str]:
        """The instances on which a request has been."""
        return [visit.instance_id for visit in self.journeys[request_id].visits]


class Rolled:
    """A rolling update; while it was under way: the fewest instances that took requests, and the most there were."""

    def __init__(self, cluster: Rollable) -> None:
        """Of this cluster."""
        self._cluster = cluster
        self.fewest = 1 << 10
        self.most = 0

    @property
    def shown(self) -> dict[str, Any]:
        """What `/admin/roll` shows."""
        return self._cluster.runtime.elastic.rolling.shown()

    def n_ready(self) -> int:
        """Instances that take requests."""
        return sum(record.life.allows(Deed.TAKE_IN_NEED) for record in self._cluster.runtime.fleet)

    async def watch(self) -> None:
        """Count until cancelled."""
        while True:
            self.fewest = min(self.fewest, self.n_ready())
            self.most = max(self.most, len(self._cluster.runtime.fleet.records))
            await asyncio.sleep(0.001)

    async def ended(self) -> dict[str, Any]:
        """Wait for its end."""
        await self._cluster.until(lambda: self.shown["state"] != "rolling", "the update ends")
        return self.shown


@asynccontextmanager
async def rolling(cluster: Rollable, options: Sequence[str], timeout_s: float = LONG_S) -> AsyncIterator[Rolled]:
    """In this context, an update has begun and is watched."""
    rolled = Rolled(cluster)
    await cluster.runtime.elastic.rolling.begin(options, timeout_s)
    watch = asyncio.create_task(rolled.watch(), name="watch ready")
    try:
        yield rolled
    finally:
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)


def recovered(cluster: Rollable) -> float:
    """Requests that were computed anew."""
    values = [
        cluster.registry.get_sample_value("cascadeinfer_recovered_requests_total", {"exact": exact})
        for exact in ("yes", "no")
    ]
    return sum(value or 0.0 for value in values)


@pytest.mark.parametrize("name", sorted(POLICIES))
@virtual_time
async def test_all_are_replaced_and_requests_move_live(name: str) -> None:
    """
    Under every policy, with a free place, the new one comes first: never fewer instances than before, requests move
    with their KV caches, none is recomputed.
    """
    async with Rollable(policy_named(name)) as cluster:
        clients = [await cluster.submit(f"r{i}", 30 + 30 * i, 900) for i in range(6)]
        for client in clients:
            await client.until_tokens(4)
        async with rolling(cluster, SEQS) as rolled:
            shown = await rolled.ended()
            assert (rolled.fewest, rolled.most) == (3, 4)
        assert shown["state"] == "done"
        assert shown["options"] == ["--max-num-seqs 16"]
        assert (shown["old"], shown["new"], shown["replaced"]) == ([], ["3", "4", "5"], 3)
        assert {instance["build"] for instance in cluster.runtime.snapshot()["instances"]} == {1}
        assert cluster.noted == [[0, 1], [1]]
        assert any(client.finish_reason is None for client in clients), "it waited for them instead"
        for client in clients:
            await client.until_end()
        assert set(cluster.runtime.snapshot()["migrations"]["ended"]) <= {"moved", "stayed"}
        assert recovered(cluster) == 0
        assert cluster.runtime.elastic.add() == ["6"]
        assert cluster.runtime.fleet["6"].build.number == 1
        await cluster.all_up()


@virtual_time
async def test_without_a_free_place_one_makes_room() -> None:
    """Where no place is free, the old one goes first, and never more than one is missing."""
    async with Rollable(max_instances=3) as cluster:
        client = await cluster.submit("r", 50, 900)
        await client.until_tokens(4)
        async with rolling(cluster, SEQS) as rolled:
            assert (await rolled.ended())["state"] == "done"
            assert (rolled.fewest, rolled.most) == (2, 3)
        assert sorted(cluster.runtime.fleet.records) == ["3", "4", "5"]
        await client.until_end()
        assert recovered(cluster) == 0


@virtual_time
async def test_a_new_one_takes_over_its_stage() -> None:
    """With fixed stages, the old one of the stage that the new one has joined goes: no stage is ever empty."""
    async with Rollable(StaticStages(layout=LAYOUT)) as cluster:
        async with rolling(cluster, SEQS) as rolled:
            layouts = []
            while rolled.shown["state"] == "rolling":
                assert cluster.runtime.fleet.layout is not None
                layouts.append(len(cluster.runtime.fleet.layout.stages))
                await asyncio.sleep(0.01)
        assert rolled.shown["state"] == "done"
        assert set(layouts) == {3}


@virtual_time
async def test_a_new_one_takes_over_its_role() -> None:
    """A prefill instance is replaced by one with its role and its chunk budget, which computes prompts from then on."""
    roles = RoleLayout(StageLayout.from_boundaries((100,), (("b",), ("c",))), (Stage(LengthRange(30), ("a",)),))
    terms = {"a": InstanceTerms(Role.PREFILL, 32)}
    async with Rollable(Roles(roles=roles), terms=terms) as cluster:
        before = await cluster.submit("before", 60, 900)
        await before.until_tokens(4)
        assert cluster.visited("before") == ["a", "b"]
        async with rolling(cluster, SEQS) as rolled:
            assert (await rolled.ended())["state"] == "done"
        shown = {one["id"]: (one["role"], one["step_budget"]) for one in cluster.runtime.snapshot()["instances"]}
        [prefill] = [name for name, (role, _) in shown.items() if role == "prefill"]
        await cluster.until(lambda: cluster.runtime.fleet[prefill].counters.step_budget == 32, "its budget")
        after = await cluster.submit("after", 60, 40)
        await after.until_end()
        assert cluster.visited("after")[0] == prefill
        assert len(cluster.visited("after")) == 2
        await before.until_end()
        assert recovered(cluster) == 0


@virtual_time
async def test_bad_options_touch_nothing() -> None:
    """Options that cannot be changed, or change nothing, are refused; so is a second update, and scaling meanwhile."""
    async with Rollable() as cluster:
        rolls = cluster.runtime.elastic.rolling
        assert rolls.shown() == {"state": "none"}
        with pytest.raises(ConfigError, match="--tokenizer: cannot be changed"):
            await rolls.begin(("--tokenizer", "x"), LONG_S)
        with pytest.raises(ConfigError, match="have these options already"):
            await rolls.begin((), LONG_S)
        assert rolls.shown() == {"state": "none"}
        async with rolling(cluster, SEQS) as rolled:
            with pytest.raises(ScalingRefusedError, match="a rolling update is under way"):
                await rolls.begin(BLOCKS, LONG_S)
            with pytest.raises(ScalingRefusedError, match="a rolling update is under way"):
                rolls.refuse_meanwhile()
            assert (await rolled.ended())["state"] == "done"
        rolls.refuse_meanwhile()


@virtual_time
async def test_what_cannot_be_written_down_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else whoever adopts the engines later would take them for all alike."""

    async def fails(_: object) -> None:
        raise OSError("no space left on device")

    async with Rollable() as cluster:
        monkeypatch.setattr(cluster, "note", fails)
        with pytest.raises(ScalingRefusedError, match="cannot be written down: no space left"):
            await cluster.runtime.elastic.rolling.begin(SEQS, LONG_S)
        assert not cluster.runtime.elastic.rolling.is_under_way
        assert set(cluster.runtime.fleet.records) == {"a", "b", "c"}


@virtual_time
async def test_the_only_instance_needs_a_free_place() -> None:
    """One instance is replaced by one beside it, or not at all."""
    async with Rollable(instance_ids="a", max_instances=1) as cluster:
        with pytest.raises(ScalingRefusedError, match="no free place for a new one"):
            await cluster.runtime.elastic.rolling.begin(SEQS, LONG_S)
    async with Rollable(instance_ids="a", max_instances=2) as cluster, rolling(cluster, SEQS) as rolled:
        assert (await rolled.ended())["state"] == "done"
        assert rolled.fewest == 1


@pytest.mark.parametrize("max_instances", [3, 8])
@virtual_time
async def test_a_new_one_that_does_not_start_stops_it(max_instances: int) -> None:
    """
    The update ends and says what and how to go on or back; there are as many instances as before, and requests go on.
    Options that work finish it, and without options it goes back.
    """
    error = {"4": "no memory for so many"}
    async with Rollable(start_error=lambda name, _: error.get(name), max_instances=max_instances) as cluster:
        client = await cluster.submit("r", 50, 1800)
        await client.until_tokens(4)
        async with rolling(cluster, SEQS) as rolled:
            shown = await rolled.ended()
            assert rolled.fewest == (2 if max_instances == 3 else 3)
        assert shown["state"] == "failed"
        assert shown["replaced"] == 1
        put_back = ["5"] if max_instances == 3 else []
        assert shown["error"] == (
            "instance 4: did not start: no memory for so many; "
            f"with the old options go on: {', '.join(shown['old'])}; with the new ones: 1 "
            "(to go on, roll again with options that work; to go back, roll without options)"
        )
        assert len(shown["old"]) == 2
        assert set(put_back) <= set(shown["old"])
        await cluster.all_up()
        assert len(cluster.runtime.live_engines()) == 3
        assert cluster.build.number == 0
        assert cluster.noted == [[0, 1], [0, 1]]
        async with rolling(cluster, ()) as rolled:
            assert (await rolled.ended())["replaced"] == 1
        assert {record.build.number for record in cluster.runtime.fleet} == {0}
        assert cluster.noted[-1] == [0]
        await client.until_end()
        assert recovered(cluster) == 0


@virtual_time
async def test_a_way_back_that_fails() -> None:
    """What has just been drained is put back, not what does not start."""
    error = {"4": "no memory for so many", "6": "no memory at all"}
    async with Rollable(start_error=lambda name, _: error.get(name), max_instances=3) as cluster:
        for options in (SEQS, ()):
            async with rolling(cluster, options) as rolled:
                assert (await rolled.ended())["state"] == "failed"
        assert {i: cluster.runtime.fleet[i].build.number for i in ("c", "5", "7")} == {"c": 0, "5": 0, "7": 1}
        await cluster.all_up()
        assert cluster.noted == [[0, 1]] * 4


@virtual_time
async def test_one_that_keeps_dying_stops_it() -> None:
    """A new one that was up and now dies at every start is replaced by one with the old options."""
    broken = {("3", 1): "broken", ("3", 2): "broken", ("3", 3): "broken"}
    async with Rollable(max_instances=3, start_error=lambda *start: broken.get(start)) as cluster:
        async with rolling(cluster, SEQS) as rolled:
            await cluster.until(lambda: "3" in cluster.runtime.fleet.records)
            pinned = await cluster.submit("p", 50, 300, pin_reason=PinReason.LORA)
            await cluster.until(lambda: cluster.runtime.fleet["3"].engine is not None)
            cluster["3"].kill()
            shown = await rolled.ended()
        assert "instance 3 keeps dying" in shown["error"]
        await cluster.all_up()
        assert "3" not in cluster.runtime.fleet.records
        assert len(cluster.runtime.live_engines()) == 3
        await pinned.until_end()


@virtual_time
async def test_deaths_meanwhile_are_survived() -> None:
    """
    An old one that dies is replaced first; a new one that dies is restarted with what it has, and waited for; one that
    dies while it drains is gone.
    """
    async with Rollable(instance_ids="abcd", max_instances=4) as cluster:
        clients = [await cluster.submit(f"r{i}", 50, 1500) for i in range(4)]
        for client in clients:
            await client.until_tokens(4)
        pinned = await cluster.submit("p", 50, 400, pin_reason=PinReason.LORA)
        await pinned.until_tokens(2)
        busy = cluster.where("p")
        assert busy is not None
        async with rolling(cluster, SEQS) as rolled:
            await cluster.until(lambda: any(record.drain for record in cluster.runtime.fleet))
            first = next(r for r in cluster.runtime.fleet if r.drain is not None).instance_id
            other = next(i for i in "abcd" if i not in {first, busy})
            cluster[other].kill()
            await cluster.until(lambda: "4" in cluster.runtime.fleet.records)
            await cluster.until(lambda: cluster.runtime.fleet["4"].engine is not None)
            cluster["4"].kill()
            await cluster.until(lambda: (r := cluster.runtime.fleet.records.get(busy)) is None or r.drain is not None)
            if busy in cluster.runtime.fleet.records:
                cluster[busy].kill()
            shown = await rolled.ended()
        assert shown["state"] == "done", shown
        assert shown["replaced"] == 4
        assert cluster.runtime.fleet["4"].supervisor.restarts == 1
        for client in [*clients, pinned]:
            await client.until_end()


@virtual_time
async def test_other_caches_do_not_move() -> None:
    """
    With another form of the KV cache, old and new are not connected, which is no fault: a request finishes where it is,
    or with the others of its form; what is left when the time is up is recomputed by the new ones.
    """
    policy = ScriptedPolicy({"r": "c"})
    async with Rollable(policy) as cluster:
        client = await cluster.submit("r", 50, 1500)
        await client.until_tokens(4)
        async with rolling(cluster, BLOCKS, timeout_s=1.0) as rolled:
            assert (await rolled.ended())["state"] == "done"
        assert not cluster.runtime.fleet.pairs.broken()
        await client.until_end()
        assert cluster.visited("r")[-1] in {"3", "4", "5"}
        assert {event.detail for event in policy.ended_migrations()} <= {""}, "no move to another form was tried"
        assert recovered(cluster) == 1


@pytest.mark.parametrize("name", sorted(POLICIES))
@virtual_time
async def test_no_text_changes_its_model(name: str) -> None:
    """
    Under every policy, a request that has output stays with its version of the model: it ends there, moves among the
    old ones, or gets an error when the last of them goes; one without output may go anywhere.
    """
    async with Rollable(policy_named(name)) as cluster:
        told: dict[str, str] = {}
        cluster.runtime.on_failure = told.__setitem__
        clients = [await cluster.submit(f"r{i}", 30 + 30 * i, 1500) for i in range(6)]
        short = [await cluster.submit(f"s{i}", 30, 60) for i in range(3)]
        for client in clients + short:
            await client.until_tokens(4)
        async with rolling(cluster, MODEL, timeout_s=2.0) as rolled:
            later = [await cluster.submit(f"t{i}", 40, 300) for i in range(4)]
            assert (await rolled.ended())["state"] == "done"
        for client in short + later:
            name_of = client.request.request_id
            if name_of not in told:
                await client.until_end()
        for client in clients:
            if client.request.request_id in told:
                client.left = True
        assert set(told) >= {client.request.request_id for client in clients if client.finish_reason is None}
        assert told, "nothing was left when the time was up"
        assert all("model_replaced" in sentence for sentence in told.values())
        for request_id in cluster.journeys:
            versions = {visited in "abc" for visited in cluster.visited(request_id)}
            assert len(versions) == 1 or request_id.startswith("t"), (request_id, cluster.visited(request_id))
        n_replaced = cluster.registry.get_sample_value("cascadeinfer_requests_total", {"outcome": OUTCOME})
        assert n_replaced == len(told)
        for client in later:
            if client.request.request_id in told:
                client.left = True


@virtual_time
async def test_an_orphan_waits_for_its_version() -> None:
    """When an old one dies under a request, another old one continues it, though a new one is idle."""
    policy = ScriptedPolicy({"r": "a", "p": "b", "q": "c"})
    async with Rollable(policy) as cluster:
        pinned = [await cluster.submit(name, 50, 600, pin_reason=PinReason.LORA) for name in ("p", "q")]
        client = await cluster.submit("r", 50, 600, pin_reason=PinReason.LORA)
        for each in [client, *pinned]:
            await each.until_tokens(3)
        async with rolling(cluster, MODEL) as rolled:
            await cluster.until(lambda: "3" in cluster.runtime.fleet.records)
            await cluster.until(lambda: cluster.runtime.fleet["3"].engine is not None)
            drained = next(r.instance_id for r in cluster.runtime.fleet if r.drain is not None)
            victim = next(i for i in "abc" if i != drained)
            cluster[victim].kill()
            assert (await rolled.ended())["state"] == "done"
        for each in [client, *pinned]:
            assert (await each.until_end()).finish_reason == "length"
        orphan = {"a": "r", "b": "p", "c": "q"}[victim]
        assert len(cluster.visited(orphan)) == 2
        assert set(cluster.visited(orphan)) <= set("abc")


@virtual_time
async def test_an_orphan_waits_for_the_restart_of_the_last_of_its_version() -> None:
    """Though an instance of the other version is up all the time."""
    policy = ScriptedPolicy()
    error = {"3": "no memory"}
    async with Rollable(policy, "ab", start_error=lambda name, _: error.get(name)) as cluster:
        async with rolling(cluster, MODEL) as rolled:
            assert (await rolled.ended())["state"] == "failed"
        old, new = rolled.shown["old"], rolled.shown["new"]
        assert (len(old), len(new)) == (1, 1)
        policy.places |= {"r": old[0], "s": old[0]}
        client, other = await cluster.submit("r", 50, 300), await cluster.submit("s", 50, 300)
        await client.until_tokens(5)
        cluster[old[0]].kill()
        fresh = await cluster.submit("t", 50, 300)
        for each in (client, other, fresh):
            assert (await each.until_end()).finish_reason == "length"
        assert cluster.visited("r") == cluster.visited("s") == [old[0], old[0]]
        assert cluster.visited("t") == new


@virtual_time
async def test_the_end_of_the_server_ends_it() -> None:
    """A server that stops in the middle leaves nothing behind."""
    async with Rollable(max_instances=3) as cluster, rolling(cluster, SEQS) as rolled:
        await cluster.until(lambda: "3" in cluster.runtime.fleet.records)
        assert rolled.shown["state"] == Phase.ROLLING.value


def test_the_times_are_short() -> None:
    """The tests above count on restarts within the patience of a drain."""
    assert SUPERVISION.backoff_first_s < LONG_S


@virtual_time
async def test_options_of_single_instances_are_not_rolled_over() -> None:
    """An update is refused while an instance has options that it would lose; once that is drained, it goes on."""
    own = Build(7, ("--max-num-seqs 8",))
    cluster = Rollable(own={"b": own})
    async with cluster:
        shown = {each["id"]: each for each in cluster.runtime.snapshot()["instances"]}
        assert [shown[name]["build"] for name in "abc"] == [0, 7, 0]
        with pytest.raises(ConfigError, match="with engine options of their own would lose them: b"):
            await cluster.runtime.elastic.rolling.begin(SEQS, LONG_S)
        cluster.runtime.elastic.drain("b", 10.0)
        await cluster.until(lambda: "b" not in cluster.runtime.fleet.records)
        await cluster.runtime.elastic.rolling.begin(SEQS, LONG_S)
        await cluster.until(lambda: cluster.runtime.elastic.rolling.shown()["state"] == "done")

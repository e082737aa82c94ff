"""The rolling update with several front-end processes: what followers know of builds, and what process 0 waits for."""

import asyncio
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Self

import pytest
from prometheus_client import CollectorRegistry
from test_processes import CAPACITY, LAYOUT, TIMES, Pair, StubChannel, attachment, until

from cascadeinfer.cluster.channel import Channel
from cascadeinfer.core.errors import ConfigError, ScalingRefusedError
from cascadeinfer.core.kind import InstanceTerms, Role
from cascadeinfer.core.policies.static_stages import StaticStages
from cascadeinfer.engines.build import FIRST_BUILD, Build
from cascadeinfer.engines.protocol import Engine, EngineRequest
from cascadeinfer.engines.simulated import SimulatedEngine, SimulatedParams
from cascadeinfer.engines.vllm.attachment import Attachment
from cascadeinfer.frontend.processes import follower as follower_module
from cascadeinfer.frontend.processes.follower import Follower
from cascadeinfer.frontend.processes.messages import FleetNews, FromFollower, FromOwner, InstanceNews, Summary
from cascadeinfer.frontend.processes.owner import FrontEnds
from cascadeinfer.runtime.metrics import RuntimeMetrics
from cascadeinfer.runtime.shell import Runtime
from cascadeinfer.runtime.supervise import SupervisionTimes
from cascadeinfer.runtime.versions import SENTENCE

NEXT = Build(1, ("--model next",), "next", "next")
LONG_S = 600.0


def news(instance_id: str, build: Build = FIRST_BUILD, **other: str) -> InstanceNews:
    """Of an instance that is up."""
    return InstanceNews(instance_id, attachment(f"{instance_id}1"), 0, None, build=build, **other)


def stage_of(runtime: Runtime, instance_id: str) -> int | None:
    """Its stage in force."""
    return runtime.fleet[instance_id].stage_index(runtime.fleet.layout)


@pytest.mark.asyncio
async def test_a_follower_knows_what_a_new_instance_is() -> None:
    """Its version of the model, with whom it exchanges KV cache, and whose stage it has taken over."""
    async with Pair() as pair:
        pair.tell_of(news("a"), news("b"))
        runtime = await pair.serve()
        pair.tell_of(news("a"), news("b"), news("c", NEXT, replaces="a", heir_of="a"))
        await until(lambda: "c" in pair.up())
        record = runtime.fleet["c"]
        assert record.kind is not None
        assert (record.build, record.kind.model_version, record.kind.kv_group) == (NEXT, "next", "next")
        assert (stage_of(runtime, "c"), stage_of(runtime, "a"), stage_of(runtime, "b")) == (0, 0, 1)
        assert runtime.fleet.connected("a", "b")
        assert not runtime.fleet.connected("a", "c")


@pytest.mark.parametrize("is_late", [True, False])
@pytest.mark.asyncio
async def test_a_follower_knows_a_place_after_several_updates(is_late: bool) -> None:
    """
    Of an instance whose predecessor it has never seen, it knows which of the stages' instances it is the heir of, with
    its role and its budget.
    """
    async with Pair() as pair:
        second = news("e", NEXT, replaces="c", heir_of="a")
        pair.tell_of(*([second] if is_late else [news("a")]), news("b"))
        runtime = await pair.serve({"a": InstanceTerms(Role.DECODE, 32)})
        pair.tell_of(second, news("b"))
        await until(lambda: pair.up() == {"b": "b1", "e": "e1"})
        kind = runtime.fleet["e"].kind
        assert kind is not None
        assert (kind.model_version, kind.role, kind.capacity.max_batched_tokens) == ("next", Role.DECODE, 32)
        assert (stage_of(runtime, "e"), stage_of(runtime, "b")) == (0, 1)


@pytest.mark.asyncio
async def test_a_follower_continues_no_text_with_another_version() -> None:
    """A text whose version is gone ends with the error that says so, and one that has not begun goes on."""
    async with Pair() as pair:
        pair.tell_of(news("a"))
        runtime = await pair.serve()
        failed: dict[str, str] = {}
        runtime.on_failure = failed.__setitem__
        await runtime.submit(EngineRequest("begun", [1] * 10, 10**6, SimulatedParams()))
        await until(lambda: bool(runtime.unfinished()[0][2]))
        pair.tell_of(news("a"), news("c", NEXT, replaces="a", heir_of="a"))
        await until(lambda: "c" in pair.up())
        pair.tell_of(news("c", NEXT, replaces="a", heir_of="a"))
        await until(lambda: failed == {"begun": SENTENCE})


@pytest.mark.asyncio
async def test_a_follower_begins_with_what_stays() -> None:
    """An instance that drains may be gone before the follower is attached to it."""
    async with Pair() as pair:
        draining = InstanceNews("a", attachment("a1"), 0, 1e9)
        pair.tell_of(draining, InstanceNews("b", None, 0, None))
        starting = asyncio.create_task(pair.serve())
        pair.tell_of(draining, InstanceNews("b", None, 1, None))
        await until(
            lambda: pair.follower._fleet_news is not None and pair.follower._fleet_news.instances[1].restarts == 1
        )
        assert not starting.done()
        pair.tell_of(draining, news("b"))
        runtime = await starting
        assert list(runtime.fleet.records) == ["b"]


class Processes:
    """Process 0, whose instances can be replaced, and a follower, joined by their channel. See EngineSource."""

    def __init__(self) -> None:
        """Nothing has started."""
        self.build = FIRST_BUILD
        self.own_builds: Mapping[str, Build] = {}
        self.first_builds: Mapping[str, Build] = {}
        self.runtime = Runtime(
            {instance_id: self.place(instance_id) for instance_id in "ab"},
            StaticStages(layout=LAYOUT),
            lambda read: RuntimeMetrics(CollectorRegistry(), read),
            supervision=SupervisionTimes(report_s=0.01, idle_report_s=0.01),
            source=self,
        )
        self.owner = FrontEnds(2, self.runtime, None, self.attachment_of, [0, 0])  # type: ignore[arg-type]
        self.runtime.elastic.used_elsewhere = self.owner._is_used
        self.pair = Pair()

    def prepare(self, options: Sequence[str]) -> Build:
        """See EngineSource."""
        if list(options) != ["--model", "next"]:
            raise ConfigError("is read by the front end", option=options[0])
        return NEXT

    async def note(self, builds: Collection[Build]) -> None:
        """See EngineSource."""

    async def check(self, build: Build) -> None:
        """See EngineSource."""

    async def has_room(self, *, shared: bool) -> bool:  # noqa: ARG002 - none is shared
        """See EngineSource."""
        return True

    def place(self, instance_id: str, build: Build | None = None) -> Callable[[int], SimulatedEngine]:  # noqa: ARG002
        """See EngineSource."""
        return lambda n_start: SimulatedEngine(instance_id, n_start, CAPACITY, times=TIMES)

    def release(self, instance_id: str) -> None:
        """See EngineSource."""

    def state(self) -> str:
        """How far the update is."""
        return str(self.runtime.elastic.rolling.shown()["state"])

    def line(self) -> str:
        """The last one of the update."""
        lines = self.runtime.elastic.rolling.shown()["lines"]
        return str(lines[-1]["line"]) if lines else ""

    async def attachment_of(self, engine: Engine, _: int) -> Attachment | None:
        """What the follower must know."""
        return attachment(f"{engine.instance_id}1")

    async def __aenter__(self) -> Self:
        """Start both; the follower serves."""
        await self.runtime.start()
        ours, its = socket.socketpair()
        [state] = self.owner._followers
        state.channel = await Channel[FromFollower].open(ours, FromFollower)
        pair = self.pair
        pair.channel = state.channel
        its_channel = await Channel[FromOwner].open(its, FromOwner)
        self.follower = pair.follower = Follower(its_channel, pair.board, pair.make_engine, pair.stops.append)
        pair.runtime = None
        self.owner.instances_started()
        work = (self.follower.listen(), self.owner._listen(state, state.channel), self.owner._tell_news())
        pair.tasks = [asyncio.create_task(each) for each in work]
        self.follower_runtime = await pair.serve()
        await until(lambda: state.summary is not None)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop both."""
        await self.pair.__aexit__()
        await self.runtime.stop(0.0)


@pytest.fixture
def quick_summaries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A follower reports often."""
    monkeypatch.setattr(follower_module, "SUMMARY_S", 0.01)


@pytest.mark.usefixtures("quick_summaries")
@pytest.mark.asyncio
async def test_a_rolling_update_that_a_follower_is_asked_for() -> None:
    """Process 0 carries it out; the follower tells how far it is, and then has the new instances in their places."""
    async with Processes() as processes:
        follower = processes.follower
        assert await follower.rolled() == {"state": "none"}
        with pytest.raises(ConfigError, match=r"^--tokenizer: is read by the front end$"):
            await follower.roll(["--tokenizer", "x"], LONG_S)
        assert (await follower.roll(["--model", "next"], LONG_S))["state"] == "rolling"
        for ask in (follower, processes.owner):
            with pytest.raises(ScalingRefusedError, match="a rolling update is under way"):
                await ask.roll(["--model", "next"], LONG_S)
            with pytest.raises(ScalingRefusedError, match="a rolling update is under way"):
                await ask.add(1)
            with pytest.raises(ScalingRefusedError, match="a rolling update is under way"):
                await ask.drain("a", LONG_S)
        await until(lambda: processes.state() == "done")
        assert (await follower.rolled())["new"] == ["2", "3"]
        assert await processes.owner.rolled() == await follower.rolled()
        await until(lambda: sorted(processes.pair.up()) == ["2", "3"])
        for runtime in (processes.runtime, processes.follower_runtime):
            assert [runtime.fleet[each].build for each in "23"] == [NEXT, NEXT]
            assert [stage_of(runtime, each) for each in "23"] == [0, 1]
        assert processes.runtime.fleet["2"].heir_of == "a"


@pytest.mark.usefixtures("quick_summaries")
@pytest.mark.asyncio
async def test_process_0_leaves_an_instance_to_a_followers_requests() -> None:
    """
    It cannot see in its own last report what a follower has just sent there; so it waits until the follower knows of
    the drain and has nothing there.
    """
    async with Processes() as processes:
        theirs = processes.follower_runtime
        await theirs.submit(EngineRequest("theirs", [1] * 10, 10**6, SimulatedParams()))
        await until(lambda: bool(theirs.unfinished()[0][2]))
        assert theirs.tally()["on_instance"] == {"a": 1}
        await processes.owner.roll(["--model", "next"], LONG_S)
        await until(lambda: processes.line() == "instance a hands over its requests (0)")
        await until(lambda: theirs.tally()["on_instance"] == {"b": 1})  # of its version
        await until(lambda: processes.line() == "instance b hands over its requests (0)")
        await until(lambda: theirs.fleet["b"].drain is not None)
        n_tokens = theirs.unfinished()[0][2]
        await until(lambda: theirs.unfinished()[0][2] > n_tokens + 10)
        assert processes.state() == "rolling"
        theirs.abort(["theirs"])
        await until(lambda: processes.state() == "done")


@pytest.mark.asyncio
async def test_a_follower_that_ended_uses_nothing() -> None:
    """Process 0 waits only for followers that serve."""
    async with Processes() as processes:
        [state] = processes.owner._followers
        await until(lambda: processes.owner._is_used("a"))
        state.summary = None
        assert not processes.owner._is_used("a")
        state.summary = Summary(1, 0, 0, {}, 0, {}, 0, [], [], in_use=["b"])
        assert not processes.owner._is_used("a")
        assert processes.owner._is_used("b")


@pytest.mark.asyncio
async def test_news_of_instances_that_an_unfinished_update_has_left() -> None:
    """Process 0 tells what it knows from its start."""
    async with Processes() as processes:
        processes.first_builds = {"b": NEXT}
        runtime = Runtime(
            {instance_id: processes.place(instance_id) for instance_id in "ab"},
            StaticStages(layout=LAYOUT),
            lambda read: RuntimeMetrics(CollectorRegistry(), read),
            source=processes,
        )
        await runtime.start()
        owner = FrontEnds(2, runtime, None, processes.attachment_of, [0, 0])  # type: ignore[arg-type]
        [follower] = owner._followers
        follower.channel = StubChannel()  # type: ignore[assignment]
        await owner._tell_news_to(follower)
        [told] = [message for message in follower.channel.sent if isinstance(message, FleetNews)]
        assert [(each.build, each.replaces, each.heir_of) for each in told.instances] == [
            (FIRST_BUILD, None, None),
            (NEXT, None, None),
        ]
        await runtime.stop(0.0)

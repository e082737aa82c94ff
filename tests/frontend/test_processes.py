"""Process 0 and a follower, in one process: the channel, the board, and a follower's runtime that follows the news."""

import asyncio
import logging
import socket
from collections.abc import Callable, Coroutine
from typing import Any, Self

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from cascadeinfer.cluster.channel import MAX_UNSENT_BYTES, Channel
from cascadeinfer.core.effects import MigrationReason
from cascadeinfer.core.errors import ConfigError, ScalingRefusedError, UnknownInstanceError
from cascadeinfer.core.events import MigrationOutcome
from cascadeinfer.core.kind import InstanceKind, InstanceTerms, Role
from cascadeinfer.core.layout import Stage, StageLayout
from cascadeinfer.core.policies.static_stages import StaticStages
from cascadeinfer.core.types import InstanceCapacity, LengthRange
from cascadeinfer.engines.protocol import Engine, EngineRequest
from cascadeinfer.engines.simulated import SimulatedEngine, SimulatedParams, SimulatedTimes
from cascadeinfer.engines.vllm.attachment import Attachment
from cascadeinfer.frontend.processes import follower as follower_module
from cascadeinfer.frontend.processes import owner as owner_module
from cascadeinfer.frontend.processes.board import Board
from cascadeinfer.frontend.processes.follower import Follower
from cascadeinfer.frontend.processes.messages import (
    Added,
    AddInstances,
    BeginRoll,
    DrainInstance,
    FleetNews,
    FromFollower,
    FromOwner,
    InstanceNews,
    LayoutNews,
    Look,
    LookAtPicture,
    LookAtRoll,
    Question,
    Refused,
    Shown,
    Stop,
    Summary,
    TellStory,
    Unanswered,
    UnknownInstance,
    WrongOptions,
)
from cascadeinfer.frontend.processes.owner import HANG_S, LOOK_S, FollowerState, FrontEnds, logger
from cascadeinfer.runtime.ledger import EndedMove
from cascadeinfer.runtime.metrics import RuntimeMetrics
from cascadeinfer.runtime.picture import MAX_OLDEST, Move, OldRequest
from cascadeinfer.runtime.shell import Runtime
from cascadeinfer.runtime.supervise import SupervisionTimes

CAPACITY = InstanceCapacity(kv_blocks=128, block_size_tokens=16, max_num_seqs=8, max_batched_tokens=64)
TIMES = SimulatedTimes(start_s=0.02)
LAYOUT = StageLayout.from_boundaries((100,), (("a",), ("b",)))
DEADLINE_S = 20.0


def attachment(engine_id: str) -> Attachment:
    """Of one life of an instance."""
    return Attachment(0, 1, engine_id, b"", "ipc://in", "ipc://out", "token")


class Attached(SimulatedEngine):
    """A simulated engine that goes by what the board says, as a client of another process's instance does."""

    def __init__(self, instance_id: str, board: Board, n_start: int) -> None:
        super().__init__(instance_id, n_start, CAPACITY, times=TIMES)
        self.board = board
        self.stopped = False
        self.attachment: Attachment | None = None

    async def start(self) -> InstanceCapacity:
        """Attach to the instance."""
        self.attachment = await self.board.attach(self)
        return await super().start()

    async def stop(self, timeout_s: float) -> None:
        """Detach from it."""
        self.stopped = True
        await super().stop(timeout_s)

    def died(self) -> None:
        """The owner reports the instance's death."""
        self.kill()


class Pair:
    """A follower with its runtime, and process 0's end of their channel."""

    def __init__(self) -> None:
        """Start nothing yet."""
        self.board = Board()
        self.engines: dict[str, list[Attached]] = {}
        self.stops: list[bool] = []
        self.heard: list[Question | Summary] = []

    def make_engine(self, instance_id: str) -> Callable[[int], Attached]:
        """See Follower."""

        def make(n_start: int) -> Attached:
            engine = Attached(instance_id, self.board, n_start)
            self.engines.setdefault(instance_id, []).append(engine)
            return engine

        return make

    async def __aenter__(self) -> Self:
        """Open the channel; the follower waits for news."""
        ours, its = socket.socketpair()
        self.channel = await Channel[FromFollower].open(ours, FromFollower)
        channel = await Channel[FromOwner].open(its, FromOwner)
        self.follower = Follower(channel, self.board, self.make_engine, self.stops.append, lambda: "No space left")
        self.tasks = [asyncio.create_task(self.follower.listen()), asyncio.create_task(self._listen())]
        self.runtime: Runtime | None = None
        return self

    async def serve(self, terms: dict[str, InstanceTerms] | None = None) -> Runtime:
        """Start the follower's runtime with the instances of the first news."""
        first = await self.follower.first_up()
        self.runtime = Runtime(
            {instance_id: self.make_engine(instance_id) for instance_id in first},
            StaticStages(layout=LAYOUT),
            lambda read: RuntimeMetrics(CollectorRegistry(), read),
            supervision=SupervisionTimes(report_s=0.01, backoff_first_s=0.01, backoff_max_s=0.01),
            terms=terms,
            origins=first,
        )
        await self.runtime.start()
        self.follower.run(self.runtime)
        self.tasks.append(asyncio.create_task(self.follower.tell()))
        return self.runtime

    async def __aexit__(self, *_: object) -> None:
        """Stop everything."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        if self.runtime is not None:
            await self.runtime.stop(0.0)
        self.channel.close()

    async def _listen(self) -> None:
        async for message in self.channel.messages():
            self.heard.append(message)

    def tell(self, **engine_ids: str | None) -> None:
        """Send news: which instances are up, in which life, and which are not."""
        self.tell_of(*(InstanceNews(i, e and attachment(e), 0, None) for i, e in sorted(engine_ids.items())))

    def tell_of(self, *instances: InstanceNews) -> None:
        """Send news of exactly these instances."""
        self.channel.send(FleetNews(list(instances)))

    def up(self) -> dict[str, str]:
        """Instances that the follower's runtime uses, with the life it is attached to."""
        assert self.runtime is not None
        return {e.instance_id: e.attachment.engine_id for e in self.runtime.live_engines()}


async def until(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - many different conditions
            await asyncio.sleep(0.002)


@pytest.mark.asyncio
async def test_channel_keeps_order_and_size() -> None:
    """Messages of any size arrive as they were sent, in order; listening ends when the other side closes."""
    ours, its = socket.socketpair()
    owner = await Channel[FromFollower].open(ours, FromFollower)
    its_channel = await Channel[FromOwner].open(its, FromOwner)
    sent = [Shown(number, {"x": "x" * 3**number}) for number in range(14)] + [Stop(at_once=True)]
    for message in sent:
        owner.send(message)
    owner.close()
    assert [message async for message in its_channel.messages()] == sent
    its_channel.close()


@pytest.mark.asyncio
async def test_channel_gives_up_on_who_never_reads() -> None:
    """Memory for messages that the other end does not read is bounded: the connection is closed."""
    ours, its = socket.socketpair()
    with its:
        owner = await Channel[FromFollower].open(ours, FromFollower)
        for _ in range(3):
            owner.send(Refused(0, "x" * (MAX_UNSENT_BYTES // 2 + 1)))
        owner.send(Stop(at_once=False))
        assert [message async for message in owner.messages()] == []


@pytest.mark.asyncio
async def test_follower_keeps_in_step_with_the_fleet() -> None:
    """
    It starts with the instances that are up, attaches newcomers and next lives, learns of deaths and leaves what is
    gone.
    """
    async with Pair() as pair:
        pair.tell(a="a1", b=None)
        await pair.serve()
        assert pair.up() == {"a": "a1"}
        pair.tell(a="a1", b="b1")
        await until(lambda: pair.up() == {"a": "a1", "b": "b1"})
        pair.tell(a=None, b="b1")
        await until(lambda: pair.up() == {"b": "b1"})
        pair.tell(a="a2", b="b1")
        await until(lambda: pair.up() == {"a": "a2", "b": "b1"})
        pair.tell(a="a2", b="b2")  # so quick that the news of its death were merged with those of its next life
        await until(lambda: pair.up() == {"a": "a2", "b": "b2"})
        pair.tell(b="b2")
        await until(lambda: pair.runtime is not None and list(pair.runtime.fleet.records) == ["b"])


@pytest.mark.parametrize("why", [None, "its side channel is dead"])
@pytest.mark.asyncio
async def test_follower_knows_whose_fault_a_death_is(why: str | None) -> None:
    """
    A death counts against the requests unless process 0 says that it ended the instance for its own reasons, which the
    instance's next life does not inherit.
    """
    async with Pair() as pair:
        pair.tell(a="a1", b="b1")
        runtime = await pair.serve()
        await runtime.submit(EngineRequest("r", [1] * 10, 10**6, SimulatedParams()))
        assert runtime.tally()["on_instance"] == {"a": 1}
        pair.channel.send(
            FleetNews([InstanceNews("a", None, 0, None, why), InstanceNews("b", attachment("b1"), 0, None)])
        )
        await until(lambda: runtime.tally()["on_instance"] == {"b": 1})
        assert ("r" in runtime._isolation._quarantine.suspicions) == (why is None)
        pair.tell(a="a2", b="b1")
        await until(lambda: pair.up() == {"a": "a2", "b": "b1"})
        assert runtime.fleet["a"].supervisor.condemned is None
        runtime.abort(["r"])


@pytest.mark.asyncio
async def test_follower_empties_what_drains() -> None:
    """A draining instance gets no new requests from the follower, which leaves it when the old ones have ended."""
    async with Pair() as pair:
        pair.tell(a="a1", b="b1")
        runtime = await pair.serve()
        pair.channel.send(
            FleetNews([InstanceNews("a", attachment("a1"), 0, 1e9), InstanceNews("b", attachment("b1"), 0, None)])
        )
        await until(lambda: "a" not in runtime.fleet.records)
        await runtime.submit(EngineRequest("r", [1] * 10, 5, SimulatedParams()))
        assert runtime.tally()["on_instance"] == {"b": 1}


@pytest.mark.asyncio
async def test_follower_follows_the_layout() -> None:
    """The stages in force are process 0's, whether they arrive before or after the runtime has started."""
    async with Pair() as pair:
        pair.tell(a="a1", b="b1")
        pair.channel.send(LayoutNews.of(StageLayout.from_boundaries((77,), (("b",), ("a",))), ()))
        runtime = await pair.serve()
        await until(lambda: runtime.fleet.layout is not None and runtime.fleet.layout.boundaries_tokens == (77,))
        assert runtime.fleet.layout is not None
        assert runtime.fleet.layout.stages[0].instance_ids == ("b",)
        pair.channel.send(LayoutNews.of(StageLayout.from_boundaries((99,), (("a",), ("b",))), ()))
        await until(lambda: runtime.fleet.layout is not None and runtime.fleet.layout.boundaries_tokens == (99,))


def test_layout_news_are_the_stages() -> None:
    """What a follower reads is what process 0 has put in force, prefill stages included."""
    layout = StageLayout.from_boundaries((77,), (("b",), ("a",)))
    prefill = (Stage(LengthRange(10, 500), ("c", "d")), Stage(LengthRange(500), ("e",)))
    for stages in ((), prefill):
        news = msgspec.msgpack.decode(msgspec.msgpack.encode(LayoutNews.of(layout, stages)), type=LayoutNews)
        assert news.layout() == layout
        assert news.prefill() == stages


@pytest.mark.asyncio
async def test_follower_follows_roles_and_budgets() -> None:
    """Process 0 gives them; this process tells its policy, and commands no engine."""
    async with Pair() as pair:
        pair.tell(a="a1", b="b1")
        runtime = await pair.serve()
        news = [InstanceNews(i, attachment(f"{i}1"), 0, None, role="prefill", step_tokens=40) for i in "ab"]
        pair.channel.send(FleetNews(news))

        def kinds() -> list[InstanceKind | None]:
            return [record.kind for record in runtime.fleet]

        await until(lambda: all(kind is not None and kind.role is Role.PREFILL for kind in kinds()))
        assert [kind.capacity.max_batched_tokens for kind in kinds() if kind is not None] == [40, 40]


@pytest.mark.asyncio
async def test_follower_tells_what_it_has_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Summaries add up to every arrival and every end, with lengths; each also lists what still runs."""
    monkeypatch.setattr(follower_module, "SUMMARY_S", 0.01)
    async with Pair() as pair:
        pair.tell(a="a1", b="b1")
        runtime = await pair.serve()
        for number in range(6):
            await runtime.submit(EngineRequest(f"r{number}", [1] * (10 + number), 3, SimulatedParams()))
        await runtime.submit(EngineRequest("long", [1] * 20, 100_000, SimulatedParams()))
        await until(lambda: sum(len(s.ended) for s in pair.heard if isinstance(s, Summary)) == 6)
        summaries = [message for message in pair.heard if isinstance(message, Summary)]
        assert sum(summary.n_arrived for summary in summaries) == 7
        ended = sorted((prompt, output) for summary in summaries for prompt, output, _ in summary.ended)
        assert ended == [(10 + number, 3) for number in range(6)]
        assert summaries[-1].live == 1
        assert summaries[-1].event_log_failure == "No space left"
        assert [(prompt, cap) for _, prompt, _, cap in summaries[-1].unfinished] == [(20, 100_000)]


@pytest.mark.asyncio
async def test_follower_asks_process_0() -> None:
    """Process 0 is asked for what only it knows or may do; its refusals arrive as the same errors."""
    async with Pair() as pair:
        pair.tell(a="a1", b="b1")
        await pair.serve()

        async def answered(work: Coroutine[Any, Any, Any], answer: Callable[[Any], Any]) -> Any:
            task = asyncio.ensure_future(work)
            await until(lambda: any(isinstance(m, Question) for m in pair.heard))
            question = next(m for m in pair.heard if isinstance(m, Question))
            pair.heard.remove(question)
            pair.channel.send(answer(question))
            return await task

        def looked(question: Look) -> Shown:
            return Shown(question.number, {"instances": []})

        def drawn(question: LookAtPicture) -> Shown:
            return Shown(question.number, {"moves": {}})

        def told(question: TellStory) -> Shown:
            return Shown(question.number, {"id": question.request_id} if question.request_id == "theirs" else None)

        def added(question: AddInstances) -> Added:
            assert question.count == 2
            return Added(question.number, ["5", "6"])

        def unknown(question: DrainInstance) -> UnknownInstance:
            assert question.timeout_s == 1.0
            return UnknownInstance(question.number, question.instance_id)

        def refused(question: DrainInstance | BeginRoll) -> Refused:
            return Refused(question.number, "the last one")

        assert await answered(pair.follower.snapshot(), looked) == {"instances": []}
        assert await answered(pair.follower.picture(), drawn) == {"moves": {}}
        assert await answered(pair.follower.story("theirs"), told) == {"id": "theirs"}
        assert await answered(pair.follower.story("nobody's"), told) is None
        with pytest.raises(TimeoutError):
            await answered(pair.follower.story("theirs"), lambda question: Unanswered(question.number))
        assert await answered(pair.follower.add(2), added) == ["5", "6"]
        with pytest.raises(UnknownInstanceError, match="no instance 9"):
            await answered(pair.follower.drain("9", 1.0), unknown)
        with pytest.raises(ScalingRefusedError, match="the last one"):
            await answered(pair.follower.drain("a", 1.0), refused)

        def rolls(question: BeginRoll | LookAtRoll) -> Shown:
            asked = (question.options, question.timeout_s) if isinstance(question, BeginRoll) else None
            return Shown(question.number, {"state": "rolling", "asked": asked})

        def wrong(question: BeginRoll) -> WrongOptions:
            return WrongOptions(question.number, "--tokenizer: is read by the front end")

        words = ("--max-num-seqs", "8")
        begun = await answered(pair.follower.roll(words, 2.0), rolls)
        assert begun == {"state": "rolling", "asked": [list(words), 2.0]}
        assert await answered(pair.follower.rolled(), rolls) == {"state": "rolling", "asked": None}
        with pytest.raises(ConfigError, match=r"^--tokenizer: is read by the front end$"):
            await answered(pair.follower.roll(["--tokenizer", "x"], 2.0), wrong)
        with pytest.raises(ScalingRefusedError, match="the last one"):
            await answered(pair.follower.roll(words, 2.0), refused)


@pytest.mark.asyncio
async def test_follower_stops_when_told() -> None:
    """The order to drain, or to stop at once, reaches the server."""
    async with Pair() as pair:
        pair.channel.send(Stop(at_once=False))
        pair.channel.send(Stop(at_once=True))
        await until(lambda: pair.stops == [False, True])


@pytest.mark.asyncio
async def test_follower_ends_when_it_cannot_go_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If the task that follows the news fails, the process ends, so that process 0 starts another one."""
    codes: list[int] = []
    monkeypatch.setattr(follower_module.os, "_exit", codes.append)

    async def fail() -> None:
        raise RuntimeError("broken")

    async with Pair() as pair:
        with caplog.at_level(logging.ERROR):
            pair.follower.spawn(fail())
            await until(lambda: codes == [1])
    assert "broken" in caplog.text


@pytest.mark.asyncio
async def test_follower_ends_with_process_0(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """When the other end is closed, the process ends at once: its instances are gone too."""
    codes: list[int] = []
    monkeypatch.setattr(follower_module.os, "_exit", codes.append)
    async with Pair() as pair:
        with caplog.at_level(logging.ERROR):
            pair.channel.close()
            await until(lambda: codes == [1])
    assert "process 0 is gone" in caplog.text


class StubProcess:
    """A follower's process, as its supervisor sees it."""

    killed = False

    def kill(self) -> None:
        """See BaseProcess."""
        self.killed = True


def test_a_follower_is_not_killed_for_the_owners_own_pause() -> None:
    """Process 0 that was stopped begins to count anew; one that stays silent is killed after the whole time limit."""
    owner = FrontEnds(2, None, None, None, [0, 0])  # type: ignore[arg-type]
    (follower,) = owner._followers
    process = follower.process = StubProcess()  # type: ignore[assignment]
    follower.summary = Summary(1, 0, 0, {}, 0, {}, 0, [], [])

    def look(after_s: float) -> bool:
        owner._slept_s = after_s
        owner._look_after(follower)
        return process.killed

    def looks_until_killed() -> int:
        return next(n for n in range(1, 10**4) if look(LOOK_S))

    assert not look(2 * HANG_S)
    assert not any(look(LOOK_S) for _ in range(int(HANG_S / LOOK_S) - 10))
    assert not look(48.0)
    assert looks_until_killed() == pytest.approx(HANG_S / LOOK_S, abs=1)


@pytest.mark.asyncio
async def test_a_picture_is_of_all_processes() -> None:
    """
    Requests, moves under way and moves that ended of the followers are in process 0's picture; viewers of all
    processes share it for a moment.
    """
    runtime = Runtime(
        {name: lambda n_start, name=name: SimulatedEngine(name, n_start, CAPACITY) for name in "ab"},  # type: ignore[misc]
        StaticStages(layout=LAYOUT),
        lambda read: RuntimeMetrics(CollectorRegistry(), read),
    )
    await runtime.start()
    owner = FrontEnds(3, runtime, None, None, [0, 0, 0])  # type: ignore[arg-type]
    await runtime.submit(EngineRequest("own", [1] * 10, 100_000, SimulatedParams()))
    told = [
        EndedMove(
            f"m{n}", "theirs", "a", "b", 120, MigrationReason.OUTGREW_STAGE, MigrationOutcome.MOVED, "", 0.02, 5.0
        )
        for n in range(2)
    ]
    moving = Move("m2", "other", "a", "b", 130, "rebalance")
    first = Summary(7, 5, 1, {"a": 3, "b": 1}, 1, {"moved": 2}, 0, [], [], None, [moving], told, {"rejected": 3})
    empty = Summary(8, 0, 0, {}, 0, {}, 0, [], [])
    ours, its = socket.socketpair()
    owner_channel = await Channel[FromFollower].open(ours, FromFollower)
    channel = await Channel[FromOwner].open(its, FromOwner)
    one, other = owner._followers
    other.summary = empty
    listening = asyncio.create_task(owner._listen(one, owner_channel))
    channel.send(first)
    await until(lambda: one.summary is not None)
    picture = await owner.picture()
    assert (picture["requests"]["live"], picture["requests"]["unplaced"]) == (6, 1)
    assert [instance["requests"] for instance in picture["instances"]] == [4, 1]
    assert [move["id"] for move in picture["moves"]["under_way"]] == ["m2"]
    assert [(move["count"], move["outcome"]) for move in picture["moves"]["ended"]] == [(2, "moved")]
    assert picture["requests"]["ended"] == {"rejected": 3}
    assert [front["process"] for front in picture["front_ends"]] == [0, 1, 2]
    assert await owner.picture() is picture
    story = await owner.story("own")
    assert story is not None
    assert story["instance"] == "a"
    listening.cancel()
    await asyncio.gather(listening, return_exceptions=True)
    channel.close()
    owner_channel.close()
    runtime.abort(["own"])
    await runtime.stop(0.0)


class Owned:
    """Process 0 with two followers, at whose ends of the channels the test stands."""

    def __init__(self) -> None:
        """Two followers that serve."""
        self.runtime = Runtime(
            {name: lambda n_start, name=name: SimulatedEngine(name, n_start, CAPACITY) for name in "ab"},  # type: ignore[misc]
            StaticStages(layout=LAYOUT),
            lambda read: RuntimeMetrics(CollectorRegistry(), read),
        )
        self.owner = FrontEnds(3, self.runtime, None, None, [0, 0, 0])  # type: ignore[arg-type]
        self.ends: list[Channel[FromOwner]] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.heard: list[list[FromOwner]] = [[], []]
        self.stories: list[dict[str, dict[str, Any]] | None] = [{}, {}]

    async def __aenter__(self) -> Self:
        """Start, and listen at all ends."""
        await self.runtime.start()
        for number, follower in enumerate(self.owner._followers):
            ours, its = socket.socketpair()
            follower.channel = await Channel[FromFollower].open(ours, FromFollower)
            follower.summary = Summary(number, 0, 0, {}, 0, {}, 0, [], [])
            self.ends.append(await Channel[FromOwner].open(its, FromOwner))
            self.tasks.append(asyncio.create_task(self.owner._listen(follower, follower.channel)))
            self.tasks.append(asyncio.create_task(self._serve(number)))
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop everything."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for end in self.ends:
            end.close()
        await self.runtime.stop(0.0)

    async def _serve(self, number: int) -> None:
        """Answer for a follower, unless it is to be silent."""
        async for message in self.ends[number].messages():
            self.heard[number].append(message)
            stories = self.stories[number]
            if isinstance(message, TellStory) and stories is not None:
                self.ends[number].send(Shown(message.number, stories.get(message.request_id)))

    def follower(self, number: int) -> FollowerState:
        """What process 0 knows of it."""
        return self.owner._followers[number]


@pytest.mark.asyncio
async def test_a_story_is_asked_of_the_process_that_has_it() -> None:
    """Process 0 tells its own, asks the followers for any other, and passes on a follower's question to the others."""
    async with Owned() as owned:
        await owned.runtime.submit(EngineRequest("own", [1] * 10, 100_000, SimulatedParams()))
        owned.stories = [{"first's": {"id": "first's"}}, {"second's": {"id": "second's"}}]
        own = await owned.owner.story("own")
        assert own is not None
        assert own["id"] == "own"
        assert owned.heard == [[], []]
        for name in ("first's", "second's"):
            assert await owned.owner.story(name) == {"id": name}
        assert await owned.owner.story("nobody's") is None
        for asked in ("second's", "own", "nobody's"):
            owned.heard[0].clear()
            owned.heard[1].clear()
            owned.ends[0].send(TellStory(77, asked))
            await until(lambda: any(isinstance(message, Shown) for message in owned.heard[0]))
            [answer] = owned.heard[0]  # it is not asked for what it has not
            assert isinstance(answer, Shown)
            assert (answer.number, answer.content and answer.content["id"]) == (
                77,
                None if asked == "nobody's" else asked,
            )
        owned.runtime.abort(["own"])


@pytest.mark.asyncio
async def test_a_story_whose_process_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """If one follower does not answer, another's story is told all the same; a story that it may have is not denied."""
    monkeypatch.setattr(owner_module, "STORY_TIMEOUT_S", 0.05)
    async with Owned() as owned:
        owned.stories = [None, {"second's": {"id": "second's"}}]
        assert await owned.owner.story("second's") == {"id": "second's"}
        with pytest.raises(TimeoutError):
            await owned.owner.story("another")
        owned.ends[1].send(TellStory(5, "another"))
        await until(lambda: any(isinstance(message, Unanswered) for message in owned.heard[1]))
        owned.follower(0).summary = None  # it does not serve, or no more: it has no requests
        assert await owned.owner.story("another") is None


@pytest.mark.asyncio
async def test_the_oldest_requests_are_those_of_all_processes() -> None:
    """The picture lists the oldest of all, by their arrivals, as many as of one process."""
    async with Owned() as owned:
        await owned.runtime.submit(EngineRequest("own", [1] * 10, 100_000, SimulatedParams()))
        [own] = owned.runtime.lookout.oldest()
        old = [OldRequest(f"old{n}", "a", 50, 10, own.arrived_s - 100.0 + n, 1, None, False) for n in range(3)]
        young = [OldRequest(f"young{n}", "b", 50, 10, own.arrived_s + 1.0 + n, 2, "lora", True) for n in range(20)]
        for number, oldest in enumerate((young, old)):
            owned.follower(number).summary = Summary(number, 0, 0, {}, 0, {}, 0, [], [], oldest=oldest)
        shown = (await owned.owner.picture())["requests"]["oldest"]
        assert [request["id"] for request in shown[:5]] == ["old0", "old1", "old2", "own", "young0"]
        assert len(shown) == MAX_OLDEST
        assert (shown[4]["attempts"], shown[4]["pinned"], shown[4]["moving"]) == (2, "lora", True)
        assert shown[0]["age_s"] == pytest.approx(100.0, abs=20.0)
        owned.runtime.abort(["own"])


@pytest.mark.asyncio
async def test_a_follower_tells_of_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its summary has its oldest requests, and it tells their stories when process 0 asks."""
    monkeypatch.setattr(follower_module, "SUMMARY_S", 0.01)
    async with Pair() as pair:
        pair.channel.send(TellStory(1, "early"))
        pair.tell(a="a1", b="b1")
        runtime = await pair.serve()
        await runtime.submit(EngineRequest("its", [1] * 20, 100_000, SimulatedParams()))
        await until(lambda: any(isinstance(message, Summary) and message.oldest for message in pair.heard))
        listed = next(message for message in pair.heard if isinstance(message, Summary) and message.oldest)
        assert [(request.request_id, request.prompt_tokens) for request in listed.oldest] == [("its", 20)]
        pair.channel.send(TellStory(2, "its"))
        pair.channel.send(TellStory(3, "nobody's"))
        await until(lambda: sum(isinstance(message, Shown) for message in pair.heard) == 3)
        told = {message.number: message.content for message in pair.heard if isinstance(message, Shown)}
        assert (told[1], told[3]) == (None, None)
        assert told[2] is not None
        assert told[2]["chapters"][0]["text"].startswith("arrived: 20 prompt tokens")
        runtime.abort(["its"])


@pytest.mark.asyncio
async def test_a_follower_tells_of_its_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each move that ended is told once, with its pause, and each end by outcome."""
    monkeypatch.setattr(follower_module, "SUMMARY_S", 0.01)
    async with Pair() as pair:
        pair.tell(a="a1", b="b1")
        runtime = await pair.serve()
        await until(lambda: any(isinstance(message, Summary) for message in pair.heard))
        await runtime.submit(EngineRequest("grows", [1] * 90, 60, SimulatedParams()))
        await until(lambda: sum(s.ended_requests.get("finished", 0) for s in pair.heard if isinstance(s, Summary)) == 1)
        moves = [move for s in pair.heard if isinstance(s, Summary) for move in s.ended_moves]
        moved = [move for move in moves if move.outcome is MigrationOutcome.MOVED]
        assert [(move.request_id, move.source_id, move.target_id) for move in moved] == [("grows", "a", "b")]
        assert moved[0].pause_s is not None
        assert moved[0].n_tokens > 100


class StubChannel:
    """Keeps what is sent."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.sent: list[Any] = []

    def send(self, message: Any) -> None:
        """See Channel."""
        self.sent.append(message)


@pytest.mark.asyncio
async def test_process_0_tells_each_follower_what_it_needs() -> None:
    """News carry the follower's attachment for each instance that is up, none for one that is down, and only once."""

    async def attachment_of(engine: Engine, client: int) -> Attachment | None:
        return attachment(f"{engine.instance_id} for {client}")

    runtime = Runtime(
        {name: lambda n_start, name=name: SimulatedEngine(name, n_start, CAPACITY) for name in "ab"},  # type: ignore[misc]
        StaticStages(layout=LAYOUT),
        lambda read: RuntimeMetrics(CollectorRegistry(), read),
        supervision=SupervisionTimes(report_s=0.01, backoff_first_s=DEADLINE_S),
    )
    await runtime.start()
    owner = FrontEnds(3, runtime, None, attachment_of, [0, 0, 0])  # type: ignore[arg-type]
    channels = []
    for follower in owner._followers:
        follower.channel = StubChannel()  # type: ignore[assignment]
        channels.append(follower.channel)
        await owner._tell_news_to(follower)
        await owner._tell_news_to(follower)
    for client, channel in enumerate(channels, 1):
        [first] = [message for message in channel.sent if isinstance(message, FleetNews)]
        ids = [one.attachment and one.attachment.engine_id for one in first.instances]
        assert ids == [f"a for {client}", f"b for {client}"]
    runtime.fleet["b"].supervisor.engine.kill()
    await until(lambda: runtime.fleet["b"].engine is None)
    await owner._tell_news_to(owner._followers[0])
    news = [message for message in channels[0].sent if isinstance(message, FleetNews)]
    assert [one.attachment is None for one in news[-1].instances] == [False, True]
    await runtime.stop(0.0)


@pytest.mark.asyncio
@pytest.mark.parametrize(("n_left", "said"), [(2, 1), (None, 0)])
async def test_a_dead_follower_is_forgotten(n_left: int | None, said: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each instance is told, and process 0 says what it left there; not where engines notice by themselves."""
    told: list[tuple[str, int]] = []
    lines: list[str] = []
    monkeypatch.setattr(logger, "warning", lambda line, *values: lines.append(line % values))

    async def forget_client(engine: SimulatedEngine, client_index: int) -> int | None:
        told.append((engine.instance_id, client_index))
        return n_left

    monkeypatch.setattr(SimulatedEngine, "forget_client", forget_client)
    runtime = Runtime(
        {"a": lambda n_start: SimulatedEngine("a", n_start, CAPACITY)},
        StaticStages(layout=StageLayout.single(("a",))),
        lambda read: RuntimeMetrics(CollectorRegistry(), read),
    )
    await runtime.start()
    owner = FrontEnds(2, runtime, None, None, [0, 0])  # type: ignore[arg-type]
    await owner._forget(1)
    assert told == [("a", 1)]
    assert lines == ["instance a: 2 requests of process 1 aborted"] * said
    await runtime.stop(0.0)

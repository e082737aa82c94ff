"""A server's side of `--cluster ray`, against a written stand-in for the process that speaks with Ray."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from cascadeinfer.cluster import ray_link
from cascadeinfer.cluster.addresses import EngineAddress
from cascadeinfer.cluster.channel import Channel
from cascadeinfer.cluster.fleet import Record
from cascadeinfer.cluster.keeping import EngineOrder, Told
from cascadeinfer.cluster.ray_keepers import RayFleet, RayTerms, travelling
from cascadeinfer.cluster.ray_messages import (
    Answer,
    Ask,
    AskedToEnd,
    Check,
    Connect,
    Failed,
    Find,
    Forget,
    Heard,
    KillOne,
    Need,
    Question,
    ReadKey,
    ReadRecord,
    Start,
    StopOne,
    Take,
    WriteRecord,
)
from cascadeinfer.core.errors import CascadeError, ConfigError, EngineError, ScalingRefusedError

ORDER = EngineOrder("module", b"\x00content\xff", "key", {"OWN": "1"})
TERMS = RayTerms("head:6379", None, Need(2, None, 1))
ADDRESS = EngineAddress("10.0.0.7", 7300)


class WrittenSide:
    """Stands for the process beside the server: a cluster that lives in memory and outlives its connections."""

    def __init__(self) -> None:
        """An empty cluster."""
        self.asked: list[Question] = []
        self.engines: list[str] = []
        self.user: str | None = None
        self.record: str | None = None
        self.refuses: dict[type, CascadeError] = {}
        #: What is told of engines as soon as they are found.
        self.tells_found: list[Heard] = []
        self.n_starts = 0
        self._channel: Channel[Ask] | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> socket.socket:
        """See Side."""
        self.n_starts += 1
        ours, its = socket.socketpair()
        self._task = asyncio.ensure_future(self._serve(its))
        return ours

    async def _serve(self, end: socket.socket) -> None:
        channel = self._channel = await Channel[Ask].open(end, Ask)
        async for ask in channel.messages():
            self.asked.append(ask.question)
            if (error := self.refuses.get(type(ask.question))) is not None:
                channel.send(Failed.of(ask.number, error))
            else:
                channel.send(Answer(ask.number, self._value_of(ask.question)))
            if isinstance(ask.question, Find):
                for heard in self.tells_found:
                    channel.send(heard)
        channel.close()

    def _value_of(self, question: Question) -> Any:
        match question:
            case Take():
                return self.user
            case Find():
                return list(self.engines)
            case Check():
                return ["a line"]
            case Start(instance_id):
                self.engines.append(instance_id)
            case StopOne(instance_id) if instance_id in self.engines:
                self.engines.remove(instance_id)
            case ReadRecord():
                return self.record
            case WriteRecord(record):
                self.record = record
            case ReadKey():
                return "k" * 64
            case _:
                pass
        return None

    def say(self, message: Heard | AskedToEnd) -> None:
        """Tell the server something."""
        assert self._channel is not None
        self._channel.send(message)

    def die(self) -> None:
        """The connection ends."""
        assert self._channel is not None
        self._channel.close()

    async def end(self) -> str:
        """See Side."""
        if self._task is not None:
            await self._task
        return "its last line"


@pytest.fixture
def side(monkeypatch: pytest.MonkeyPatch) -> WrittenSide:
    """A cluster; lost connections are made again at once."""
    monkeypatch.setattr(ray_link, "FIRST_PAUSE_S", 0.01)
    return WrittenSide()


@asynccontextmanager
async def used(side: WrittenSide, **more: Any) -> AsyncIterator[RayFleet]:
    """A fleet of that cluster."""
    async with RayFleet.used("blue", TERMS, side=side, **more) as fleet:
        yield fleet


async def until(condition: Callable[[], object]) -> None:
    """Wait until something holds."""
    while not condition():  # noqa: ASYNC110 - the tests' own time limit ends it
        await asyncio.sleep(0.005)


async def test_an_engine_from_start_to_stop(side: WrittenSide) -> None:
    """What a server orders arrives, and what happens to the engine is told."""
    async with used(side) as fleet:
        keepers = fleet.keepers()
        assert await keepers.find() == []
        keepers.place("0")
        await keepers.start("0", ORDER)
        [start] = [question for question in side.asked if isinstance(question, Start)]
        assert (start.module, start.content, start.key, start.need) == ("module", b"\x00content\xff", "key", TERMS.need)
        assert start.environment["OWN"] == "1"
        assert "key" not in repr(start)
        ready = asyncio.ensure_future(keepers.ready("0"))
        side.say(Heard("0", Told("starting"), "loading weights", "10.0.0.7"))
        await until(lambda: keepers.stage("0") == "loading weights on 10.0.0.7")
        assert not ready.done()
        side.say(Heard("0", Told("ready", 7, str(ADDRESS)), None, "10.0.0.7"))
        assert await ready == ADDRESS
        ended = asyncio.ensure_future(keepers.ended("0"))
        keepers.kill("0")
        await until(lambda: KillOne("0") in side.asked)
        side.say(Heard("0", Told("ended", None, None, "it was killed")))
        assert await ended == "it was killed"
        await keepers.stop("0", 5.0)
        assert StopOne("0", 5.0) in side.asked
        keepers.release("0")
        await keepers.stop("0", 5.0)
    assert side.asked[:2] == [Connect("head:6379", None), next(q for q in side.asked if isinstance(q, Take))]


async def test_an_engine_that_does_not_start(side: WrittenSide) -> None:
    """No room, or its end while it starts, is that instance's error; it can be started again."""
    async with used(side) as fleet:
        keepers = fleet.keepers()
        side.refuses[Start] = EngineError("no node has room", instance_id="other")
        with pytest.raises(EngineError, match=r"^instance 3: no node has room$"):
            await keepers.start("3", ORDER)
        side.refuses.clear()
        await keepers.start("3", ORDER)
        with pytest.raises(EngineError, match="is kept already"):
            await keepers.start("3", ORDER)
        side.say(Heard("3", Told("ended", None, None, "out of memory")))
        with pytest.raises(EngineError, match="out of memory"):
            await keepers.ready("3")
        await keepers.start("3", ORDER)


@pytest.mark.parametrize("question", [Connect, Take])
async def test_a_cluster_that_refuses(side: WrittenSide, question: type) -> None:
    """What the operator did wrong is one line, with the option and what to do, and nothing is left."""
    side.refuses[question] = ConfigError("no Ray answers at head:6379", option="--ray-address", fix="start one")
    with pytest.raises(ConfigError, match=r"^--ray-address: no Ray answers at head:6379 \(start one\)$"):
        async with used(side):
            pass


async def test_a_process_that_ends_at_once(side: WrittenSide, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last line is the reason."""
    monkeypatch.setattr(WrittenSide, "_value_of", lambda side, _: side.die())
    with pytest.raises(ConfigError, match="Ray cannot be used: its last line"):
        async with used(side):
            pass


async def test_what_is_told_at_once_of_engines_that_are_found(side: WrittenSide) -> None:
    """A busy server reads it together with the answer that names them; it would wait for ever if it dropped it."""
    side.engines = ["0", "1"]
    side.tells_found = [Heard(each, Told("ready", None, str(ADDRESS)), None, "10.0.0.7") for each in ("0", "1", "9")]
    async with used(side) as fleet:
        keepers = fleet.keepers()
        assert await keepers.find() == ["0", "1"]
        async with asyncio.timeout(30.0):
            assert [await keepers.ready(each) for each in ("0", "1")] == [ADDRESS, ADDRESS]
        assert not keepers.lives("9")


async def test_two_servers(side: WrittenSide, caplog: pytest.LogCaptureFixture) -> None:
    """The second one is refused, or waits and says so, once."""
    caplog.set_level(logging.INFO)
    side.user = "process 7"
    with pytest.raises(ConfigError, match=r"--fleet: the server on process 7 uses blue already .*--standby"):
        async with used(side):
            pass
    async with AsyncExitStack() as stack:
        waiting = asyncio.ensure_future(stack.enter_async_context(used(side, wait=True)))
        asked = len(side.asked)
        await until(lambda: len(side.asked) > asked + 2)
        assert not waiting.done()
        assert [r.getMessage() for r in caplog.records if "standing by" in r.getMessage()] == [
            "standing by: this server waits for the end of the one on process 7"
        ]
        side.user = None
        await waiting


async def test_a_fleet_is_stopped(side: WrittenSide) -> None:
    """Whoever stops it asks its server to end, waits for that, and the fleet is forgotten."""
    side.user = "process 8"
    async with AsyncExitStack() as stack:
        entering = used(side, ends_others=True, must_exist=True, timeout_s=60.0)
        asking = asyncio.ensure_future(stack.enter_async_context(entering))
        await until(lambda: any(isinstance(question, Take) and question.asks_to_end for question in side.asked))
        side.user = None
        fleet = await asking
        await fleet.remove()
        assert side.asked[-1] == Forget()


async def test_a_server_is_asked_to_end(side: WrittenSide) -> None:
    """By who stops its fleet."""
    asked = asyncio.Event()
    async with used(side, asked_to_end=asked.set):
        side.say(AskedToEnd())
        await asked.wait()


async def test_facts_of_a_fleet(side: WrittenSide) -> None:
    """Its record and key are the cluster's to keep; a record that cannot be read says how to begin anew."""
    record = Record("1", "2", "/models/m", {"--dtype": "float32"})
    async with used(side) as fleet:
        assert await fleet.record() is None
        await fleet.write(record)
        assert await fleet.record() == record
        assert await fleet.key() == "k" * 64
        assert await fleet.check(2, "/models/m") == ["a line"]
        assert [question.path for question in side.asked if isinstance(question, Check)] == ["/models/m"]
        await fleet.check(2, "org/name")
        assert [question.path for question in side.asked if isinstance(question, Check)][-1] is None
        side.record = "{"
        with pytest.raises(ConfigError, match="cascadeinfer stop blue --cluster ray"):
            await fleet.record()


async def test_the_connection_is_lost_and_made_again(side: WrittenSide) -> None:
    """
    Meanwhile nothing can be started, and engines that live are not dead. Afterwards the fleet is taken again, deaths in
    between are told, and what was to be stopped is stopped.
    """
    async with used(side) as fleet:
        keepers = fleet.keepers()
        for instance_id in ("0", "1", "2"):
            await keepers.start(instance_id, ORDER)
            side.say(Heard(instance_id, Told("ready", 7, str(ADDRESS))))
            await keepers.ready(instance_id)
        ended = {instance_id: asyncio.ensure_future(keepers.ended(instance_id)) for instance_id in ("0", "1")}
        side.refuses[Connect] = ConfigError("no Ray answers")
        side.die()
        await until(lambda: side.n_starts > 1)
        await keepers.stop("2", 5.0)
        with pytest.raises(EngineError, match="instance 5: Ray cannot be reached"):
            await keepers.start("5", ORDER)
        assert not any(future.done() for future in ended.values())
        side.engines.remove("0")
        side.refuses.clear()
        assert await ended["0"] == "its keeper is gone"
        await until(lambda: StopOne("2", 5.0) in side.asked)
        assert not ended["1"].done()
        assert side.engines == ["1"]
        ended["1"].cancel()


async def test_a_fleet_that_another_takes_meanwhile(side: WrittenSide) -> None:
    """A server whose connection was lost does not give orders to engines that another one uses by now."""
    async with used(side) as fleet:
        keepers = fleet.keepers()
        side.user = "process 9"
        starts = side.n_starts
        side.die()
        await until(lambda: side.n_starts > starts + 1)
        with pytest.raises(EngineError, match="Ray cannot be reached"):
            await keepers.start("0", ORDER)
        side.user = None
        await until(lambda: isinstance(side.asked[-1], Find))
        await keepers.start("0", ORDER)


@pytest.mark.parametrize(
    "error",
    [ConfigError("wrong", option="--x", fix="do"), EngineError("broken", instance_id="0"), ScalingRefusedError("full")],
)
def test_errors_travel(error: CascadeError) -> None:
    """They are the same at the other end."""
    told = Failed.of(1, error).as_error("0")
    assert (type(told), str(told)) == (type(error), str(error))


def test_what_engines_elsewhere_get_of_the_environment() -> None:
    """The operator's settings, but no facts of the server's machine and no key of the server."""
    said = {"VLLM_USE_V1": "1", "HF_TOKEN": "t", "VLLM_HOST_IP": "10.0.0.1", "VLLM_API_KEY": "k", "PATH": "/bin"}
    assert travelling(said) == {"VLLM_USE_V1": "1", "HF_TOKEN": "t"}

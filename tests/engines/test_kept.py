"""An engine that a keeper keeps, as a front end has it: found or started, attached to, left or ended."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio
from test_standing import KEY, LEASE_S, ScriptedCore, core, plain_models, until  # noqa: F401 - fixtures
from vllm.engine.arg_utils import AsyncEngineArgs

from cascadeinfer.cluster.addresses import EngineAddress
from cascadeinfer.cluster.fleet import Update
from cascadeinfer.cluster.keeping import EngineOrder
from cascadeinfer.core.errors import ConfigError, EngineError
from cascadeinfer.engines.protocol import EngineDied
from cascadeinfer.engines.vllm import kept_builds
from cascadeinfer.engines.vllm.attachment import StandingAttachment, attachment_of
from cascadeinfer.engines.vllm.configuration import KvTransferSettings
from cascadeinfer.engines.vllm.instance import VllmInstance
from cascadeinfer.engines.vllm.kept import KeptCore, KeptSource, Phase
from cascadeinfer.engines.vllm.kept_builds import KeptBuilds
from cascadeinfer.engines.vllm.kept_order import MODULE, Content
from cascadeinfer.engines.vllm.standing import Terms

LENGTH = 512
ORDER = EngineOrder(MODULE, b"", "k" * 40)


class ScriptedKeepers:
    """
    Keepers of one engine, which is at an address.

    Attributes:
        did: What they were told, in order.
        is_alive: Whether the engine lives.
    """

    def __init__(self, address: EngineAddress, *, is_alive: bool) -> None:
        """Nothing was told yet."""
        self.did: list[str] = []
        self.is_alive = is_alive
        self._address = address
        self.has_ended = asyncio.Event()

    def lives(self, _: str) -> bool:
        """See Keepers."""
        return self.is_alive

    def place(self, instance_id: str) -> None:
        """See Keepers."""
        self.did.append(f"place {instance_id}")

    def release(self, instance_id: str) -> None:
        """See Keepers."""
        self.did.append(f"release {instance_id}")

    async def start(self, _: str, order: EngineOrder) -> None:
        """See Keepers."""
        assert order.module == MODULE
        self.did.append("start")
        self.is_alive = True

    async def ready(self, instance_id: str) -> EngineAddress:
        """See Keepers."""
        if not self.is_alive:
            raise EngineError("its process ended", instance_id=instance_id)
        return self._address

    async def ended(self, _: str) -> str:
        """See Keepers."""
        await self.has_ended.wait()
        return "its process was killed"

    def kill(self, _: str) -> None:
        """See Keepers."""
        self.did.append("kill")
        self.is_alive = False
        self.has_ended.set()

    async def stop(self, _: str, timeout_s: float) -> None:
        """See Keepers."""
        self.did.append(f"stop {timeout_s:g}")
        self.is_alive = False


class Server:
    """What makes cores in these tests."""

    def __init__(self, keepers: ScriptedKeepers, address: EngineAddress) -> None:
        """It starts."""
        config: Any = SimpleNamespace(cache_config=SimpleNamespace(), model_config=None)
        self.phase = Phase.STARTS
        self.keepers = keepers
        self.terms = Terms(config, KEY, LEASE_S, 4)
        self.made: list[VllmInstance] = []
        self.address = address

    def engine(self, *, was_found: bool) -> VllmInstance:
        """One life."""
        keepers: Any = self.keepers
        made = KeptCore("0", 0, keepers, ORDER, self.terms, was_found=was_found, phase=lambda: self.phase)
        self.made.append(VllmInstance(made))
        return self.made[-1]


@pytest_asyncio.fixture
async def server(core: ScriptedCore) -> AsyncIterator[Server]:  # noqa: F811 - the fixture
    """With an engine that does not live yet."""
    server = Server(ScriptedKeepers(core.address, is_alive=False), core.address)
    yield server
    for engine in server.made:
        await engine.stop(0.0)


async def test_it_is_started_only_if_it_does_not_live(server: Server) -> None:
    """One that is found is attached to."""
    await server.engine(was_found=False).start()
    assert server.keepers.did == ["start"]
    await server.engine(was_found=True).start()
    assert server.keepers.did == ["start"]


@pytest.mark.parametrize(
    ("phase", "was_found", "goes_on"),
    [
        (Phase.STARTS, True, True),
        (Phase.STARTS, False, False),
        (Phase.SERVES, True, False),
        (Phase.SERVES, False, False),
        (Phase.ENDS, True, True),
        (Phase.ENDS, False, True),
    ],
)
async def test_whose_end_it_is(server: Server, phase: Phase, was_found: bool, goes_on: bool) -> None:
    """A failed start ends what it has begun, an instance's end ends its engine, a server's end does not."""
    server.keepers.is_alive = was_found
    engine = server.engine(was_found=was_found)
    await engine.start()
    server.phase = phase
    await engine.stop(3.0)
    await engine.stop(3.0)
    assert ("stop 3" in server.keepers.did) == (not goes_on)
    assert server.keepers.did.count("stop 3") <= 1


@pytest.mark.parametrize(("was_found", "goes_on"), [(True, True), (False, False)])
async def test_a_server_that_ends_before_it_is_attached(server: Server, was_found: bool, goes_on: bool) -> None:
    """What it has begun to start ends with it."""
    server.keepers.is_alive = was_found
    server.phase = Phase.ENDS
    await server.engine(was_found=was_found).stop(3.0)
    assert ("stop 3" in server.keepers.did) == (not goes_on)


async def test_a_lost_connection_ends_no_engine(server: Server, core: ScriptedCore) -> None:  # noqa: F811 - the fixture
    """As when this process was suspended for long: the next life attaches to the same engine."""
    engine = server.engine(was_found=False)
    await engine.start()
    server.phase = Phase.SERVES
    for number in list(core.clients._clients):
        core.clients.detach(number)
    await until(lambda: engine.pid is None)
    with pytest.raises(EngineDied):
        await engine.next_outputs()
    await engine.stop(3.0)
    assert server.keepers.did == ["start"]
    again = server.engine(was_found=False)
    await again.start()
    assert server.keepers.did == ["start"]


async def test_a_dead_engine_is_told(server: Server) -> None:
    """By its keeper, before the connection says anything."""
    engine = server.engine(was_found=False)
    await engine.start()
    server.phase = Phase.SERVES
    server.keepers.is_alive = False
    server.keepers.has_ended.set()
    with pytest.raises(EngineDied):
        await engine.next_outputs()
    await engine.stop(3.0)
    assert server.keepers.did == ["start", "stop 3"]


async def test_followers_are_told_where_it_is(server: Server, core: ScriptedCore) -> None:  # noqa: F811 - the fixture
    """While it is attached, and not after its connection was lost."""
    engine = server.engine(was_found=False)
    assert await attachment_of(engine, 1) is None
    await engine.start()
    attachment = await attachment_of(engine, 1)
    assert isinstance(attachment, StandingAttachment)
    assert (attachment.host, attachment.port) == (core.address.host, core.address.port)
    assert (attachment.key, attachment.lease_s) == (KEY, LEASE_S)
    assert await engine.forget_client(1) is None
    engine.kill()
    assert await attachment_of(engine, 1) is None


async def test_one_that_hangs_is_killed(server: Server) -> None:
    """Also when the server ends: it is of no use to the next one."""
    engine = server.engine(was_found=True)
    server.keepers.is_alive = True
    await engine.start()
    server.phase = Phase.ENDS
    engine.kill()
    await engine.stop(3.0)
    assert server.keepers.did == ["kill", "stop 3"]


def source_of(server: Server, written: list[tuple[int | None, list[str]]]) -> KeptSource:
    """A source for a fleet with one engine, found alive."""
    keepers: Any = server.keepers
    said = AsyncEngineArgs(model="m", max_num_seqs=4)
    content = Content("", replace(said, kv_cache_memory_bytes=1 << 28), KvTransferSettings(7), True, "INFO", 600.0)

    async def write(engine_args: AsyncEngineArgs, updates: tuple[Update, ...]) -> None:
        assert engine_args.kv_cache_memory_bytes is None, "the record has what the operator has said"
        written.append((engine_args.max_num_seqs, [" ".join(update.words) for update in updates]))

    async def has_room(shared: bool) -> bool:
        return shared

    async def check(model: str) -> None:
        if model != "m":
            raise ConfigError(f"a node has no {model}")

    builds = KeptBuilds(said, content, server.terms, has_room=has_room, check=check, write=write)
    return KeptSource(keepers, ["0"], builds, "k" * 40, {"A": "b"})


async def test_a_source_of_them(server: Server) -> None:
    """Each instance has a place and an order of its own; one that is gone for good leaves nothing."""
    source = source_of(server, [])
    make = source.place("0")
    server.keepers.is_alive = True
    first, second = make(0), make(1)
    server.made += [first, second]
    assert first.index == 0
    await first.stop(0.0)  # the server starts, and has found it
    assert "stop 0" not in server.keepers.did
    await second.stop(0.0)
    assert "stop 0" in server.keepers.did
    source.release("0")
    assert server.keepers.did[-2:] == ["kill", "release 0"]


async def test_other_options_for_a_fleet(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Its engines are started with the options of their build; the fleet's record says so, and in the middle of an update
    what it changes. A server that comes back then knows them by their marks.
    """
    made: list[AsyncEngineArgs] = []

    def config(engine_args: AsyncEngineArgs) -> Any:
        made.append(engine_args)
        return SimpleNamespace(cache_config=SimpleNamespace(), model_config=SimpleNamespace(max_model_len=LENGTH))

    monkeypatch.setattr(kept_builds, "attached_config", config)
    server.terms = replace(server.terms, config=config(AsyncEngineArgs()))
    written: list[tuple[int | None, list[str]]] = []
    source = source_of(server, written)
    source.place("0")(0)
    assert await source.has_room(shared=True)
    assert not await source.has_room(shared=False)
    build = source.prepare(["--max-num-seqs", "8"])
    assert (made[-1].max_num_seqs, made[-1].max_model_len) == (8, LENGTH)
    for instance_id, number, wanted in (("1", build, 8), ("2", None, 4)):
        engine = source.place(instance_id, number)(0)
        server.made.append(engine)
        assert isinstance(engine.life, KeptCore)
        content = Content.unpacked(engine.life._order.content)
        assert (content.instance_id, content.engine_args.max_num_seqs) == (instance_id, wanted)
        assert content.engine_args.kv_cache_memory_bytes == 1 << 28
    await source.check(build)
    for builds in ({source.build, build}, {build}, {source.build}):
        await source.note(builds)
    source.build, before = build, source.build  # once all have the new options, back again
    await source.note({before, build})
    assert written == [(4, ["--max-num-seqs 8"]), (8, []), (4, []), (8, ["--max-num-seqs 4"])]
    source.build = before

    marks = {build: source._builds.content_of(build).mark for build in (source.build, build)}
    again = source_of(server, [])
    assert again._builds.own_mark == marks[source.build]
    update = Update(("--max-num-seqs 8",), marks[build])
    assert again._builds.of_marks([update]) == {mark: known for known, mark in marks.items()}
    assert again._builds.of_marks([Update((), "of other files")]) == {marks[source.build]: source.build}
    again.first_builds = {"0": build}
    back = again.place("0")(0)
    server.made.append(back)
    assert isinstance(back.life, KeptCore)
    assert Content.unpacked(back.life._order.content).mark == marks[build]


def test_what_travels_arrives() -> None:
    """The engine's machine gets what the operator has said."""
    content = Content("3", AsyncEngineArgs(model="m", max_model_len=512), KvTransferSettings(7), False, "DEBUG", 0.0)
    assert Content.unpacked(content.packed()) == content

"""An engine that others have started: its door and a front end's side, on real sockets with a scripted EngineCore."""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio
import zmq
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, EngineCoreRequestType, UtilityOutput
from vllm.v1.serial_utils import MsgpackEncoder, UtilityResult

from cascadeinfer.cluster.addresses import EngineAddress
from cascadeinfer.cluster.knocking import PROTOCOL, AskToAttach, KnockError, knock
from cascadeinfer.cluster.local import LOOPBACK, free_port
from cascadeinfer.cluster.shared_key import ClusterKey
from cascadeinfer.core.errors import ConfigError, EngineError
from cascadeinfer.engines.protocol import EngineDied
from cascadeinfer.engines.vllm import standing
from cascadeinfer.engines.vllm.attached import AttachedClient
from cascadeinfer.engines.vllm.connector import door as door_module
from cascadeinfer.engines.vllm.connector.clients import Clients
from cascadeinfer.engines.vllm.connector.door import Door, DoorSettings
from cascadeinfer.engines.vllm.instance import VllmInstance
from cascadeinfer.engines.vllm.standing import StandingCore, Terms, check_lease, look_at
from support.hello import hello as engine_hello

KEY = ClusterKey.of("k" * 40)
LEASE_S = 10
PATIENCE_S = 60.0
N_FIRST = 1
"""Clients that the scripted EngineCore has had from its start."""
SIZES = {"architecture": "Llama", "layers": 2}
HELLO = engine_hello()


class ScriptedCore:
    """
    In place of vLLM's EngineCoreProc: a thread that takes what comes into its queue and answers calls.

    Attributes:
        calls: Methods called, with their arguments.
        added: Requests that have come, with the number of their client.
        aborted: Ids of requests that were to be stopped.
    """

    def __init__(self, settings: DoorSettings | None = None) -> None:
        """Start."""
        self.is_told_to_end = threading.Event()
        settings = settings or DoorSettings(LOOPBACK, free_port(), KEY, LEASE_S)
        self.input_queue: queue.Queue[Any] = queue.Queue()
        self.aborts_queue: queue.Queue[Any] = queue.Queue()
        self.output_queue: Any = queue.Queue()
        self.addresses = SimpleNamespace(inputs=["ipc://first"] * N_FIRST)
        self.engine_index = 0
        self.calls: list[tuple[Any, ...]] = []
        self.added: list[tuple[int, str]] = []
        self.aborted: list[str] = []
        self.refused: list[str] = []
        self.door = Door(self, settings, "life1", "token", self.is_told_to_end.set)  # type: ignore[arg-type]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def clients(self) -> Clients:
        """Those that have attached."""
        return self.door.clients

    @property
    def address(self) -> EngineAddress:
        """Where its door is."""
        return EngineAddress(LOOPBACK, self.door.port)

    def _make_ready_response(self) -> dict[str, int]:
        return {}

    def preprocess_add_request(self, request: EngineCoreRequest) -> tuple[Any, int]:
        """As vLLM's does in its input thread."""
        if request.request_id == "bad":
            raise ValueError("a prompt that cannot be read")
        return request, 0

    def _handle_request_preproc_error(self, request: EngineCoreRequest) -> None:
        self.refused.append(request.request_id)

    def send(self, client: int, *request_ids: str) -> None:
        """Send a client a token for each of these requests."""
        outputs = [EngineCoreOutput(request_id, [7]) for request_id in request_ids]
        self.output_queue.put_nowait((client, EngineCoreOutputs(outputs=outputs)))

    def stop(self) -> None:
        """Leave all clients, as a process that ends does."""
        self.input_queue.put_nowait(None)
        self._thread.join()
        for number in list(self.clients._clients):
            self.clients.detach(number)

    def _run(self) -> None:
        while (item := self.input_queue.get()) is not None:
            kind, content = item
            if kind is EngineCoreRequestType.ADD:
                self.added.append((content[0].client_index, content[0].request_id))
            elif kind is EngineCoreRequestType.ABORT:
                self.aborted += content
            else:
                self._call(*content)

    def _call(self, client: int, call_id: int, method: str, args: Any) -> None:
        self.calls.append((method, *args))
        output = UtilityOutput(call_id)
        if method == "cascade_attach":
            output.result = UtilityResult({"client": self.clients.attach(*args), "ready_payload": b""})
        elif method == "cascade_detach":
            self.clients.detach(*args)
            return
        elif method == "cascade_hello":
            output.result = UtilityResult(HELLO.plain())
        elif method == "cascade_fail":
            output.failure_message = "it fails"
        else:
            output.result = UtilityResult(None)
        self.output_queue.put_nowait((client, EngineCoreOutputs(utility_output=output)))


@pytest.fixture
def core() -> Iterator[ScriptedCore]:
    """An engine with its door open."""
    core = ScriptedCore()
    yield core
    core.stop()


@pytest.fixture(autouse=True)
def plain_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's model is what the test says; vLLM's client takes an empty ready message."""
    monkeypatch.setattr(standing, "model_sizes", lambda _: SIZES)
    monkeypatch.setattr(AttachedClient, "_apply_ready_response", lambda *_: None)

    async def identity(_: Any) -> Any:
        return SimpleNamespace(engine=SimpleNamespace(**SIZES))

    monkeypatch.setattr(standing.EngineChannel, "identity", identity)


def front_end(core: ScriptedCore, lease_s: int = LEASE_S) -> VllmInstance:
    """A front end's instance for that engine, not attached yet."""
    config: Any = SimpleNamespace(cache_config=SimpleNamespace(), model_config=None)
    return VllmInstance(StandingCore("a", 0, core.address, Terms(config, KEY, lease_s, 4)))


async def until(holds: Callable[[], object]) -> None:
    """Wait for a fact."""
    async with asyncio.timeout(PATIENCE_S):
        while not holds():  # noqa: ASYNC110 - it happens in another thread
            await asyncio.sleep(0.01)


def request(request_id: str) -> EngineCoreRequest:
    """The smallest."""
    names = EngineCoreRequest.__struct_fields__
    known = {"request_id": request_id, "prompt_token_ids": [1, 2], "arrival_time": 0.0}
    return EngineCoreRequest(**{name: known.get(name) for name in names if name in known or _is_needed(name)})


def _is_needed(name: str) -> bool:
    n_defaults = len(EngineCoreRequest.__struct_defaults__)
    return name in EngineCoreRequest.__struct_fields__[: len(EngineCoreRequest.__struct_fields__) - n_defaults]


@pytest_asyncio.fixture
async def instance(core: ScriptedCore) -> AsyncIterator[VllmInstance]:
    """An attached front end."""
    instance = front_end(core)
    await instance.start()
    yield instance
    await instance.stop(0.0)


async def test_a_front_end_attaches(core: ScriptedCore, instance: VllmInstance) -> None:
    """It learns what runs there, and limits the migrations: others may use the engine too."""
    assert instance.hello == HELLO
    assert instance.pid is not None
    assert ("cascade_limit_migrations", 4) in core.calls
    assert await instance.reserve("m", 100) is None
    assert ("cascade_reserve", "client2/m", 100, False) in core.calls  # number 1 is the door's own
    assert len(core.clients) == 1


async def test_each_front_end_gets_its_own(core: ScriptedCore, instance: VllmInstance) -> None:
    """Requests carry their client's number, and outputs go to that client; what is for a first one does not come."""
    other = front_end(core)
    await other.start()
    try:
        for number, one in enumerate((instance, other)):
            await one.channel.client.add_request_async(request(f"r{number}"))
        await until(lambda: len(core.added) == 2)
        assert sorted(core.added) == [(2, "r0"), (3, "r1")]
        core.send(3, "r1")
        core.send(0, "first")
        core.send(2, "r0")
        async with asyncio.timeout(PATIENCE_S):
            assert [delta.request_id for delta in (await instance.next_outputs()).outputs] == ["r0"]
            assert [delta.request_id for delta in (await other.next_outputs()).outputs] == ["r1"]
        await other.abort(["r1"])
        await until(lambda: core.aborted == ["r1"])
    finally:
        await other.stop(0.0)


async def test_who_leaves_is_forgotten(core: ScriptedCore, instance: VllmInstance) -> None:
    """The engine notices by the connection; late output for it goes nowhere, and others are served on."""
    leaving = front_end(core)
    await leaving.start()
    await leaving.stop(0.0)
    await until(lambda: ("cascade_detach", 3) in core.calls and len(core.clients) == 1)
    core.send(3, "late")
    core.send(2, "r0")
    async with asyncio.timeout(PATIENCE_S):
        assert [delta.request_id for delta in (await instance.next_outputs()).outputs] == ["r0"]
    again = front_end(core)
    await again.start()
    assert again.channel.client.client_index == 4, "a number is never used again"
    await again.stop(0.0)


async def test_a_request_that_cannot_be_read_is_its_own_fault(core: ScriptedCore, instance: VllmInstance) -> None:
    """VLLM answers it as its own; the next one is served."""
    for request_id in ("bad", "good"):
        await instance.channel.client.add_request_async(request(request_id))
    await until(lambda: core.added == [(2, "good")])
    assert core.refused == ["bad"]


async def test_messages_that_are_none_are_dropped(instance: VllmInstance) -> None:
    """Neither an unknown kind nor a broken body ends the connection."""
    client: Any = instance.channel.client
    for frames in ((b"?", b""), (EngineCoreRequestType.ADD.value, b"\xc1"), (EngineCoreRequestType.UTILITY.value,)):
        await client.input_socket.send_multipart((client.core_engine, *frames))
    assert await instance.reserve("m", 1) is None


async def test_its_death_is_noticed(core: ScriptedCore, instance: VllmInstance) -> None:
    """The connection ends: calls that wait fail, outputs end, and the process id is gone."""
    core.stop()
    with pytest.raises(EngineDied):
        async with asyncio.timeout(PATIENCE_S):
            await instance.next_outputs()
    assert instance.pid is None


async def test_strangers_at_a_front_end_do_no_harm(instance: VllmInstance) -> None:
    """Somebody without the key connects to the front end's socket and leaves: the engine counts as alive."""
    life = instance.life
    assert isinstance(life, StandingCore)
    assert life._sockets is not None
    for address in life._sockets.addresses:
        for _ in range(3):
            with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
                stranger.setsockopt(zmq.LINGER, 100)
                stranger.connect(address)
                stranger.send_multipart([b"\x00\x00", *MsgpackEncoder().encode(EngineCoreOutputs())])
    await asyncio.sleep(0.2)  # nothing is to happen
    assert await instance.reserve("m", 1) is None
    assert instance.pid is not None


async def test_it_may_be_left_in_the_middle_of_a_call(core: ScriptedCore) -> None:
    """A hung engine is left: who waits for it is told."""
    instance = front_end(core)
    await instance.start()
    core.input_queue.put_nowait(None)  # it reads nothing more
    waiting = asyncio.ensure_future(instance.reserve("m", 1))
    await asyncio.sleep(0)
    instance.kill()
    with pytest.raises(EngineError):
        await waiting
    await instance.stop(0.0)


async def test_an_address_of_another_machine_is_refused(core: ScriptedCore) -> None:
    """It cannot be bound: an error that names the engine, and nothing is left open."""
    config: Any = SimpleNamespace(cache_config=SimpleNamespace(), model_config=None)
    terms = Terms(config, KEY, LEASE_S, 4, own_host="192.0.2.1")
    instance = VllmInstance(StandingCore("a", 0, core.address, terms))
    with pytest.raises(EngineError, match=f"{core.address} cannot be attached: .*assign"):
        await instance.start()
    await instance.stop(0.0)


async def test_a_shorter_lease_is_refused(core: ScriptedCore) -> None:
    """A target would read blocks that the engine may have given to others; nothing is left open."""
    instance = front_end(core, lease_s=LEASE_S + 1)
    with pytest.raises(EngineError, match=f"for {LEASE_S} s, this server counts on {LEASE_S + 1} s"):
        await instance.start()
    await instance.stop(0.0)
    await until(lambda: len(core.clients) == 0)


async def test_another_model_is_refused(core: ScriptedCore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says in what they differ."""
    monkeypatch.setattr(standing, "model_sizes", lambda _: {**SIZES, "layers": 3})
    instance = front_end(core)
    with pytest.raises(EngineError, match="runs another model: layers 2 instead of 3"):
        await instance.start()
    await instance.stop(0.0)


async def test_the_door_refuses_what_it_does_not_do(core: ScriptedCore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version of the protocol, sockets that it cannot reach, and a call that fails; it stays open."""
    address = core.address

    async def refusal(question: Any) -> str:
        with pytest.raises(KnockError) as caught:
            await knock(address.host, address.port, KEY, question, PATIENCE_S)
        return str(caught.value)

    assert f"version {PROTOCOL} of the protocol, you speak 9" in await refusal(AskToAttach(9, "tcp://a:1", "tcp://a:2"))
    assert "ipc:///x is no TCP address" in await refusal(AskToAttach(PROTOCOL, "ipc:///x", "tcp://a:2"))
    call = core.door._call
    monkeypatch.setattr(core.door, "_call", lambda *_: call("cascade_fail"))
    assert "it fails" in await refusal(AskToAttach(PROTOCOL, "tcp://a:1", "tcp://a:2"))
    monkeypatch.setattr(core.door, "_call", lambda *_: 1 / 0)
    assert "internal error" in await refusal(AskToAttach(PROTOCOL, "tcp://a:1", "tcp://a:2"))
    about = await look_at(address, KEY)
    assert about is not None
    assert (about.engine_id, about.lease_s) == ("life1", LEASE_S)
    check_lease(about, address, LEASE_S)


def test_the_door_needs_a_key_and_a_policy_for_failures(tmp_path: Any) -> None:
    """No listener without a key, none where a failed pull would end requests, and none without being asked for."""
    from vllm.config import KVTransferConfig

    def settings(policy: str = "recompute", **extra: Any) -> DoorSettings | None:
        transfer = KVTransferConfig(
            kv_connector="CascadeConnector",
            kv_role="kv_both",
            kv_load_failure_policy=policy,  # type: ignore[arg-type]
            kv_connector_extra_config=extra,
        )
        return DoorSettings.of(transfer)

    key_file = tmp_path / "key"
    key_file.write_text("k" * 40)
    given = {door_module.LISTEN: "127.0.0.1:7300", door_module.KEY_FILE: str(key_file)}
    assert settings() is None
    assert settings(**given, kv_lease_duration=9) == DoorSettings("127.0.0.1", 7300, KEY, 9)
    with pytest.raises(ConfigError, match="names an address and no cascade_key_file"):
        settings(cascade_listen="127.0.0.1:7300")
    with pytest.raises(ConfigError, match="kv_load_failure_policy"):
        settings("fail", **given)
    with pytest.raises(ConfigError, match="is not HOST:PORT"):
        settings(**{**given, "cascade_listen": "7300"})


def test_a_port_in_use(core: ScriptedCore) -> None:
    """The engine does not start: it would serve nobody."""
    with pytest.raises(ConfigError, match="cannot listen on"):
        Door(core, DoorSettings(LOOPBACK, core.door.port, KEY, LEASE_S), "life2", "token")  # type: ignore[arg-type]


async def test_a_free_port_is_told_and_an_engine_that_nobody_uses_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """
    The address is in a file that is whole when it is there, for whoever has started the engine. The engine ends after
    its time, and not while a front end is attached, however quiet that is.
    """
    monkeypatch.setattr(door_module, "LOOK_MS", 20)
    told = tmp_path / "door"
    core = ScriptedCore(DoorSettings(LOOPBACK, 0, KEY, LEASE_S, told, orphan_timeout_s=1.0))
    try:
        assert told.read_text() == str(core.address)
        assert core.address.port > 0
        engine = front_end(core)
        await engine.start()
        core.is_told_to_end.clear()  # should the start have taken a second
        assert not await asyncio.to_thread(core.is_told_to_end.wait, 2.0)
        await engine.stop(0.0)
        assert await asyncio.to_thread(core.is_told_to_end.wait, PATIENCE_S)
    finally:
        core.stop()

"""A further client of an EngineCore that another process owns, tested against a scripted EngineCore on its sockets."""

import asyncio
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import pytest_asyncio
import zmq
import zmq.asyncio
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequestType, UtilityOutput
from vllm.v1.serial_utils import MsgpackEncoder, UtilityResult

from cascadeinfer.core.errors import EngineError
from cascadeinfer.engines.protocol import EngineDied
from cascadeinfer.engines.vllm import attached
from cascadeinfer.engines.vllm.attached import AttachedCore
from cascadeinfer.engines.vllm.attachment import Attachment
from cascadeinfer.engines.vllm.instance import VllmInstance
from support.hello import hello as engine_hello

CLIENT = 2
HELLO = engine_hello()


class EngineCore:
    """Connects to a client's sockets and answers its commands, except those that it keeps waiting."""

    def __init__(self, attachment: Attachment) -> None:
        """Connect."""
        self.commands: list[tuple[Any, ...]] = []
        self.keeps_waiting: set[str] = set()
        self._context = zmq.asyncio.Context()
        self._input = self._context.socket(zmq.DEALER)
        self._input.setsockopt(zmq.IDENTITY, (0).to_bytes(2, "little"))
        self._input.connect(attachment.input_address)
        self._output = self._context.socket(zmq.PUSH)
        self._output.connect(attachment.output_address)
        self._serving = asyncio.get_running_loop().create_task(self._serve())

    async def _serve(self) -> None:
        answers = {"cascade_hello": HELLO.plain(), "cascade_forget_client": 1, "cascade_reserve": None}
        encoder = MsgpackEncoder()
        while True:
            kind, content, *_ = await self._input.recv_multipart()
            if kind == EngineCoreRequestType.ABORT.value:
                assert msgspec.msgpack.decode(content) == [], "it only asks whether anybody is there"
                continue
            client, call_id, method, args = msgspec.msgpack.decode(content)
            assert client == CLIENT
            self.commands.append((method, *args))
            if method not in self.keeps_waiting:
                told = UtilityOutput(call_id, result=UtilityResult(answers[method]))
                await self._output.send_multipart(encoder.encode(EngineCoreOutputs(utility_output=told)))

    async def close(self) -> None:
        """Close all sockets."""
        self._serving.cancel()
        await asyncio.gather(self._serving, return_exceptions=True)
        self._context.destroy(linger=0)


@pytest.fixture
def attachment() -> Any:
    """A folder for sockets, with a path short enough for them."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        addresses = [f"ipc://{Path(folder) / name}" for name in ("in", "out")]
        yield Attachment(3, 77, "life1", b"", *addresses, "token")


@pytest_asyncio.fixture
async def instance(attachment: Attachment) -> AsyncIterator[VllmInstance]:
    """A client of the instance, not started yet."""

    async def attach(_: AttachedCore) -> Attachment:
        return attachment

    config: Any = SimpleNamespace(cache_config=SimpleNamespace())
    instance = VllmInstance(AttachedCore("a", config, CLIENT, attach))
    yield instance
    await instance.stop(0.0)


async def test_it_learns_from_owner_and_engine(instance: VllmInstance, attachment: Attachment) -> None:
    """Number and process id come from the owner, the rest from the engine; leftovers are aborted first."""
    core = EngineCore(attachment)
    try:
        capacity = await instance.start()
        assert (instance.index, instance.pid) == (3, 77)
        assert (capacity.kv_blocks, capacity.block_size_tokens, instance.movable) == (64, 16, True)
        assert core.commands[-1] == ("cascade_forget_client", CLIENT)
        assert {name for name, *_ in core.commands[:-1]} == {"cascade_hello"}
        assert await instance.reserve("m", 100) is None
        assert core.commands[-1] == ("cascade_reserve", f"client{CLIENT}/m", 100, False)
    finally:
        await core.close()


async def test_sockets_that_cannot_be_bound(instance: VllmInstance, attachment: Attachment) -> None:
    """The folder is gone: the start fails with an error, and does not wait for ever for a socket that is half made."""
    Path(attachment.input_address.removeprefix("ipc://")).parent.rmdir()
    with pytest.raises(EngineError, match="cannot be attached"):
        async with asyncio.timeout(30.0):
            await instance.start()


async def test_the_owner_tells_of_a_death(instance: VllmInstance, attachment: Attachment) -> None:
    """Outputs end, pending calls get an error, and the process id is gone; this client cannot kill the engine."""
    core = EngineCore(attachment)
    try:
        await instance.start()
        core.keeps_waiting.add("cascade_reserve")
        waiting = asyncio.ensure_future(instance.reserve("m", 100))
        async with asyncio.timeout(30.0):
            while core.commands[-1][0] != "cascade_reserve":  # noqa: ASYNC110 - it comes over a socket
                await asyncio.sleep(0.005)
        instance.kill()
        assert not waiting.done()
        assert isinstance(instance.life, AttachedCore)
        instance.life.died()
        with pytest.raises(EngineError):
            await waiting
        with pytest.raises(EngineDied):
            await instance.next_outputs()
        assert instance.pid is None
    finally:
        await core.close()


async def test_a_client_that_has_let_go_takes_no_commands(instance: VllmInstance, attachment: Attachment) -> None:
    """Commands raise, and nothing reaches the engine."""
    core = EngineCore(attachment)
    try:
        await instance.start()
        await instance.stop(0.0)
        n_commands = len(core.commands)
        with pytest.raises(EngineError):
            await instance.reserve("m", 100)
        await instance.abort(["r"])
        assert len(core.commands) == n_commands
    finally:
        await core.close()


async def test_an_engine_that_does_not_come_is_an_error(
    instance: VllmInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If nothing connects to the sockets, the start fails after its time limit."""
    monkeypatch.setattr(attached, "CONNECT_TIMEOUT_S", 0.2)
    with pytest.raises(EngineError, match="cannot be attached"):
        await instance.start()

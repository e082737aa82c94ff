"""A follower's side of an engine that stands on its own: process 0 says when it is up, the follower knocks itself."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from test_standing import HELLO, KEY, LEASE_S, PATIENCE_S, SIZES, ScriptedCore, core, front_end, plain_models, until  # noqa: F401 - fixtures

from cascadeinfer.cluster.local import LOOPBACK, free_port
from cascadeinfer.core.errors import EngineError
from cascadeinfer.engines.protocol import EngineDied
from cascadeinfer.engines.vllm import followed, standing
from cascadeinfer.engines.vllm.attachment import AnyAttachment, Attachment, StandingAttachment, attachment_of
from cascadeinfer.engines.vllm.followed import FollowedCore
from cascadeinfer.engines.vllm.instance import VllmInstance


class Told:
    """What process 0 says of an instance; nothing yet."""

    def __init__(self) -> None:
        """See above."""
        self.attachment: asyncio.Future[AnyAttachment] = asyncio.get_running_loop().create_future()
        self.lives: list[FollowedCore] = []

    async def attach(self, life: FollowedCore) -> AnyAttachment:
        """See FollowedCore."""
        told = await self.attachment
        self.lives.append(life)
        return told

    def says(self, attachment: StandingAttachment) -> None:
        """It is up."""
        self.attachment = asyncio.get_running_loop().create_future()
        self.attachment.set_result(attachment)


def follower_of(told: Told) -> VllmInstance:
    """A follower's instance, not attached yet."""
    config: Any = SimpleNamespace(cache_config=SimpleNamespace(), model_config=None)
    return VllmInstance(FollowedCore("a", config, told.attach))


def at(port: int, engine_id: str = HELLO.engine_id) -> StandingAttachment:
    """An engine on this machine."""
    return StandingAttachment(3, engine_id, LOOPBACK, port, KEY, LEASE_S, 4, None)


@pytest_asyncio.fixture
async def told(core: ScriptedCore) -> Told:  # noqa: F811 - the fixture
    """Process 0 says that the engine is up."""
    told = Told()
    told.says(at(core.address.port))
    return told


@pytest_asyncio.fixture
async def instance(told: Told) -> AsyncIterator[VllmInstance]:
    """An attached follower."""
    instance = follower_of(told)
    await instance.start()
    yield instance
    await instance.stop(0.0)


async def test_a_follower_is_one_more_client(core: ScriptedCore) -> None:  # noqa: F811 - the fixture
    """What process 0 says of an engine that it has attached to is enough; each has a number of its own there."""
    owner = front_end(core)
    assert await attachment_of(owner, 1) is None
    await owner.start()
    told = Told()
    attachment = await attachment_of(owner, 1)
    assert isinstance(attachment, StandingAttachment)
    travelled = msgspec.msgpack.decode(msgspec.msgpack.encode(attachment), type=AnyAttachment)
    assert travelled == attachment
    assert KEY.secret.decode() not in repr(travelled)
    told.says(travelled)
    instance = follower_of(told)
    assert instance.pid is None
    capacity = await instance.start()
    try:
        assert (instance.index, instance.pid, capacity.kv_blocks) == (0, owner.pid, HELLO.kv_blocks)
        assert [one.channel.client.client_index for one in (owner, instance)] == [2, 3]
        await instance.connect([owner])
        assert not [call for call in core.calls if call[0] == "cascade_handshake"], "process 0 has done it"
        assert await owner.forget_client(2) is None, "the number of a process is no client's"
        assert not [call for call in core.calls if call[0] == "cascade_forget_client"]
    finally:
        await instance.stop(0.0)
        await owner.stop(0.0)


async def test_it_leaves_the_look_at_the_model_to_process_0(
    core: ScriptedCore,  # noqa: F811 - the fixture
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which knows what a rolling update has given the engine, such as another data type than this process was told."""
    monkeypatch.setattr(standing, "model_sizes", lambda _: {**SIZES, "layers": 3})
    owner = front_end(core)
    with pytest.raises(EngineError, match="runs another model"):
        await owner.start()
    await owner.stop(0.0)
    told = Told()
    told.says(at(core.address.port))
    instance = follower_of(told)
    await instance.start()
    await instance.stop(0.0)


async def test_it_waits_until_process_0_says_so() -> None:
    """And may be stopped meanwhile."""
    told = Told()
    instance = follower_of(told)
    starting = asyncio.ensure_future(instance.start())
    await asyncio.sleep(0)
    await instance.stop(0.0)
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    assert told.lives == []


async def test_process_0_says_that_it_is_gone(core: ScriptedCore, told: Told, instance: VllmInstance) -> None:  # noqa: F811 - the fixture
    """Its life ends, though the connection is there; the engine forgets this client when it leaves."""
    told.lives[0].died()
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(EngineDied):
            await instance.next_outputs()
    assert instance.pid is None
    await instance.stop(0.0)
    await until(lambda: len(core.clients) == 0)


async def test_process_0_is_asked_first_why_a_connection_ended(
    core: ScriptedCore,  # noqa: F811 - the fixture
    told: Told,
    instance: VllmInstance,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It knows whether a request may be to blame; this life of the instance ends when it has said so."""
    monkeypatch.setattr(followed, "NEWS_S", PATIENCE_S)
    [number] = core.clients._clients
    core.clients.detach(number)
    outputs = asyncio.ensure_future(instance.next_outputs())
    done, _ = await asyncio.wait([outputs], timeout=1.0)
    assert not done
    told.lives[0].died()
    with pytest.raises(EngineDied):
        await outputs


async def test_it_attaches_again_to_an_engine_that_only_it_has_lost(
    core: ScriptedCore,  # noqa: F811 - the fixture
    told: Told,
    instance: VllmInstance,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As when this process was suspended for long: process 0 says nothing, as the engine is up."""
    monkeypatch.setattr(followed, "NEWS_S", 0.01)
    [number] = core.clients._clients
    core.clients.detach(number)
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(EngineDied):
            await instance.next_outputs()
    again = follower_of(told)
    await again.start()
    assert again.channel.client.client_index > number
    await again.stop(0.0)


async def test_an_engine_goes_down_while_it_is_attached_to() -> None:
    """The follower does not wait for an answer that will not come, and leaves nothing open."""
    told = Told()
    told.says(at(free_port()))
    instance = follower_of(told)
    starting = asyncio.ensure_future(instance.start())
    await until(lambda: told.lives)
    told.lives[0].died()
    with pytest.raises(EngineError, match="went down while"):
        await starting
    await instance.stop(0.0)


async def test_another_engine_at_the_same_address(core: ScriptedCore) -> None:  # noqa: F811 - the fixture
    """Process 0 does not know it yet, and has not connected it to its peers."""
    told = Told()
    told.says(at(core.address.port, "an earlier life"))
    instance = follower_of(told)
    with pytest.raises(EngineError, match=f"another engine listens at {core.address}"):
        await instance.start()
    await instance.stop(0.0)
    await until(lambda: len(core.clients) == 0)


def test_attachments_of_both_kinds_are_told_apart() -> None:
    """Also after their way over the channel."""
    owned = Attachment(0, 1, "life1", b"", "ipc://in", "ipc://out", "token")
    for attachment in (owned, at(7300)):
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(attachment), type=AnyAttachment) == attachment

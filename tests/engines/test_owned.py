"""An EngineCore owned by this process, over a scripted launcher: its life, its place and its clients."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from cascadeinfer.cluster.protocol import Abilities, ClientAddresses, Kept, Place
from cascadeinfer.core.errors import EngineError
from cascadeinfer.core.types import InstanceId
from cascadeinfer.engines.vllm.channel import EngineChannel
from cascadeinfer.engines.vllm.messages import EngineHello
from cascadeinfer.engines.vllm.owned import OwnedCore
from support.hello import hello as engine_hello

PLACE = Place("a", "node", "0-3", "here", "eth0")


class Launcher:
    """Records its calls. See `cascadeinfer.cluster.protocol.Launcher`."""

    abilities = Abilities(new_clients=True, outlives_front_end=False)

    def __init__(self) -> None:
        """Nothing runs."""
        self.told: list[tuple[Any, ...]] = []
        self._n_started = 0

    def place(self, instance_id: InstanceId) -> Place:
        """Not used here."""
        raise AssertionError(instance_id)

    def release(self, place: Place) -> None:
        """Not used here."""
        raise AssertionError(place)

    async def start(self, place: Place, order: Any) -> Kept[EngineHello]:
        """Give each life its own engine id."""
        self.told.append(("start", place.instance_id))
        self._n_started += 1
        hello = engine_hello(engine_id=f"life{self._n_started}")
        return Kept(place, 100 + self._n_started, hello, b"ready", order.config)

    def living(self) -> Mapping[InstanceId, Kept[EngineHello]]:
        """Not used here."""
        raise AssertionError

    def client_addresses(self, place: Place, client: int) -> ClientAddresses:
        """Addresses derived from the client's number."""
        return ClientAddresses(f"tcp://{place.host}:{1000 + client}", f"tcp://{place.host}:{2000 + client}")

    async def attach(self, place: Place, client: int, addresses: ClientAddresses) -> None:
        """Record the call."""
        self.told.append(("attach", place.instance_id, client, addresses.input_address))

    async def detach(self, place: Place, client: int) -> None:
        """Record the call."""
        self.told.append(("detach", place.instance_id, client))

    async def death(self, place: Place) -> str:
        """Not used here."""
        raise AssertionError(place)

    def kill(self, place: Place) -> None:
        """Record the call."""
        self.told.append(("kill", place.instance_id))

    async def stop(self, place: Place, timeout_s: float) -> None:
        """Record the call."""
        self.told.append(("stop", place.instance_id, timeout_s))


def core_at(launcher: Launcher) -> OwnedCore:
    """A life at the place; no processes are made."""
    core = OwnedCore(launcher, PLACE, 3, SimpleNamespace(), {})  # type: ignore[arg-type]
    core._processes = SimpleNamespace(client=SimpleNamespace(client_index=0), config=None)  # type: ignore[assignment]
    return core


async def test_a_former_life_leaves_the_next_one_alone() -> None:
    """Once stopped, killing or stopping a life again does not affect its place."""
    launcher = Launcher()
    former, present = core_at(launcher), core_at(launcher)
    await former.begin()
    await former.end(5.0)
    await present.begin()
    del launcher.told[:]
    former.kill()
    await former.end(0.0)
    assert launcher.told == []
    assert (former.pid, present.pid) == (None, 102)
    present.kill()
    assert launcher.told == [("kill", "a")]


async def test_a_life_that_was_stopped_before_it_began_does_not_begin() -> None:
    """Nothing is started that would never be stopped."""
    launcher = Launcher()
    core = core_at(launcher)
    await core.end(0.0)
    with pytest.raises(EngineError, match="stopped before"):
        await core.begin()
    assert ("start", "a") not in launcher.told


async def test_further_clients_are_attached_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client learns this life's id, its own addresses and the token; before and after, it gets nothing."""
    launcher = Launcher()
    core, other = core_at(launcher), core_at(launcher)
    assert await core.attachment(1) is None
    channel = await core.begin()
    told = await core.attachment(2)
    assert told is not None
    assert (told.index, told.pid, told.engine_id, told.ready_payload) == (3, 101, "life1", b"ready")
    assert (told.input_address, told.output_address) == ("tcp://here:1002", "tcp://here:2002")
    assert told.connector_token == channel.connector_token
    assert told.connector_token not in repr(told)
    assert ("attach", "a", 2, "tcp://here:1002") in launcher.told

    async def forget_client(_: EngineChannel, client: int) -> int:
        return 10 * client

    monkeypatch.setattr(EngineChannel, "forget_client", forget_client)
    assert await core.forget(channel, 2) == 20
    assert launcher.told[-1] == ("detach", "a", 2)
    assert (await other.begin()).connector_token != told.connector_token
    await core.end(0.0)
    assert await core.attachment(2) is None

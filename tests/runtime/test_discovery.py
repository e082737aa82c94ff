"""Engines that others start and stop are followed: who joins, who is emptied, who is left alone."""

from types import SimpleNamespace
from typing import Any

from cascadeinfer.core.errors import ScalingRefusedError
from cascadeinfer.core.types import InstanceId
from cascadeinfer.runtime.discovery import Discovery
from cascadeinfer.runtime.elastic import DID_NOT_START


class World:
    """A runtime's instances and a list of addresses, both as the test sets them."""

    def __init__(self, *listed: str) -> None:
        """All listed engines answer, and the runtime has started with them."""
        self.listed: list[str] | None = list(listed)
        self.engines = {address: f"{address}/1" for address in listed}
        self.log: list[tuple[str, ...]] = []
        self.is_last = False
        known = {address: str(number) for number, address in enumerate(listed)}
        self.records = {instance_id: SimpleNamespace(drain=None) for instance_id in known.values()}
        self.departed: list[Any] = []
        fleet = SimpleNamespace(records=self.records, departed=self.departed)
        runtime: Any = SimpleNamespace(fleet=fleet, elastic=self)
        self.discovery = Discovery[str](runtime, known, self._find, self._answers, self._maker, 9.0)

    async def _find(self) -> list[str] | None:
        return None if self.listed is None else list(self.listed)

    async def _answers(self, address: str) -> str | None:
        return self.engines.get(address)

    def _maker(self, address: str, instance_id: InstanceId, number: int) -> Any:
        assert instance_id == str(number)
        return address

    def adopt(self, instance_id: InstanceId, make_engine: Any) -> None:
        """As `Elasticity.adopt`."""
        self.log.append(("adopt", instance_id, make_engine))
        self.records[instance_id] = SimpleNamespace(drain=None)

    def drain(self, instance_id: InstanceId, timeout_s: float) -> None:
        """As `Elasticity.drain`."""
        assert timeout_s == 9.0
        if self.is_last:
            raise ScalingRefusedError("it is the last one")
        self.log.append(("drain", instance_id))
        self.records[instance_id].drain = object()

    def remove(self, instance_id: InstanceId, how: str) -> None:
        """It has left the runtime."""
        del self.records[instance_id]
        self.departed.append(SimpleNamespace(instance_id=instance_id, how=how))

    async def look(self) -> list[tuple[str, ...]]:
        """What one look leads to."""
        self.log.clear()
        await self.discovery.look()
        return list(self.log)


async def test_nothing_happens_while_nothing_changes() -> None:
    """Not even for an engine that is down: its supervisor attaches to it again."""
    world = World("a", "b")
    assert await world.look() == []
    del world.engines["a"]
    assert await world.look() == []


async def test_a_new_engine_joins_once_it_answers() -> None:
    """Under a name that was never used."""
    world = World("a")
    assert world.listed is not None
    world.listed.append("b")
    assert await world.look() == []
    world.engines["b"] = "b/1"
    assert await world.look() == [("adopt", "1", "b")]
    assert await world.look() == []


async def test_one_that_does_not_start_is_tried_again() -> None:
    """Its first start failed; the engine answers still."""
    world = World("a", "b")
    world.remove("1", DID_NOT_START)
    assert await world.look() == [("adopt", "2", "b")]


async def test_who_is_not_listed_any_more_is_emptied() -> None:
    """Once; when it comes back, it is another instance."""
    world = World("a", "b")
    world.listed = ["a"]
    assert await world.look() == [("drain", "1")]
    assert await world.look() == []
    world.remove("1", "drained")
    assert await world.look() == []
    world.listed = ["a", "b"]
    world.engines["b"] = "b/2"
    assert await world.look() == [("adopt", "2", "b")]


async def test_the_last_one_stays_until_another_is_there() -> None:
    """It is asked for again at each look."""
    world = World("a")
    world.listed, world.is_last = ["b"], True
    assert await world.look() == []
    world.is_last = False
    assert await world.look() == [("drain", "0")]


async def test_what_the_operator_has_drained_stays_away() -> None:
    """Until its engine has been started anew."""
    world = World("a", "b")
    world.remove("1", "drained")
    assert await world.look() == []
    assert await world.look() == []
    world.engines["b"] = "b/2"
    assert await world.look() == [("adopt", "2", "b")]


async def test_a_name_that_cannot_be_looked_up_changes_nothing() -> None:
    """A name server that is down for a moment empties nobody."""
    world = World("a", "b")
    world.listed = None
    assert await world.look() == []

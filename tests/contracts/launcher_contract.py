"""
The contract of `cluster/protocol.py` as tests: each function takes a `LauncherBed` and asserts one rule.

A launcher is asked only for what its `Abilities` declare: a rule about an ability checks that the launcher either
provides it or refuses with an error.
"""

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any, Protocol

import pytest

from cascadeinfer.cluster.protocol import ClientAddresses, Kept, Launcher
from cascadeinfer.core.errors import EngineError, ScalingRefusedError

DEADLINE_S = 60.0


class LauncherBed(Protocol):
    """A launcher with two places, and what belongs to it."""

    launcher: Launcher[Any, Mapping[str, Any]]

    def order(self, *, n_clients: int = 2) -> Any:
        """A start order for an engine whose ready message is its name, with this many clients."""
        ...

    def slow_order(self) -> Any:
        """A start order for an engine that never becomes ready."""
        ...

    def elsewhere(self) -> ClientAddresses:
        """Addresses that the launcher has not issued."""
        ...


async def started(bed: LauncherBed, name: str = "a", **how: Any) -> Kept[Mapping[str, Any]]:
    """Start an engine at a place."""
    place = bed.launcher.place(name)
    return await asyncio.wait_for(bed.launcher.start(place, bed.order(**how)), DEADLINE_S)


async def places_are_dealt_out_and_taken_back(bed: LauncherBed) -> None:
    """Each instance has its own place; one too many is refused, and fits once another has gone."""
    first, second = bed.launcher.place("a"), bed.launcher.place("b")
    assert (first.instance_id, second.instance_id) == ("a", "b")
    assert first.resources != second.resources
    assert first.host
    assert first.node
    with pytest.raises(ScalingRefusedError):
        bed.launcher.place("c")
    bed.launcher.release(first)
    assert bed.launcher.place("c").resources == first.resources


async def what_has_started_is_known(bed: LauncherBed) -> None:
    """
    A start returns the engine's ready message, its process and its
    place; `living` lists them until it is stopped.
    """
    assert not bed.launcher.living()
    kept = await started(bed)
    assert kept.hello["engine"] == "written"
    assert kept.ready_payload == b"ready"
    assert kept.config == {"completed": True}
    assert kept.pid > 0
    assert bed.launcher.living() == {"a": kept}
    with pytest.raises(EngineError):
        await bed.launcher.start(kept.place, bed.order())
    assert bed.launcher.living() == {"a": kept}
    await bed.launcher.stop(kept.place, 5.0)
    assert not bed.launcher.living()


async def a_place_has_one_life_after_another(bed: LauncherBed) -> None:
    """After a stop, the place takes the next start, with another process."""
    first = await started(bed)
    await bed.launcher.stop(first.place, 5.0)
    second = await asyncio.wait_for(bed.launcher.start(first.place, bed.order()), DEADLINE_S)
    assert bed.launcher.living() == {"a": second}
    assert second.pid != first.pid


async def a_death_is_told(bed: LauncherBed) -> None:
    """Waiting for an engine's death reports that death and no other; the engine can still be stopped afterwards."""
    doomed, other = await started(bed, "a"), await started(bed, "b")
    deaths = [asyncio.ensure_future(bed.launcher.death(kept.place)) for kept in (doomed, other)]
    await asyncio.sleep(0)
    assert not any(death.done() for death in deaths)
    bed.launcher.kill(doomed.place)
    assert await asyncio.wait_for(deaths[0], DEADLINE_S)
    assert not deaths[1].done()
    deaths[1].cancel()
    await asyncio.gather(*deaths, return_exceptions=True)
    await bed.launcher.stop(doomed.place, 5.0)
    bed.launcher.kill(doomed.place)
    assert bed.launcher.living() == {"b": other}


async def stopping_is_harmless(bed: LauncherBed) -> None:
    """Stopping is harmless where nothing has run, twice, and again after a waiter gave up."""
    place = bed.launcher.place("a")
    await bed.launcher.stop(place, 0.0)
    await asyncio.wait_for(bed.launcher.start(place, bed.order()), DEADLINE_S)
    given_up = asyncio.ensure_future(bed.launcher.stop(place, 5.0))
    await asyncio.sleep(0)
    given_up.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await given_up
    await bed.launcher.stop(place, 5.0)
    await bed.launcher.stop(place, 5.0)
    assert not bed.launcher.living()


async def a_start_can_be_stopped(bed: LauncherBed) -> None:
    """`stop` ends a start that does not complete: the start raises, and the place takes the next one."""
    place = bed.launcher.place("a")
    start = asyncio.ensure_future(bed.launcher.start(place, bed.slow_order()))
    await asyncio.sleep(0)
    await bed.launcher.stop(place, 0.0)
    with pytest.raises(EngineError):
        await asyncio.wait_for(start, DEADLINE_S)
    assert not bed.launcher.living()
    await asyncio.wait_for(bed.launcher.start(place, bed.order()), DEADLINE_S)


async def clients_come_and_go(bed: LauncherBed) -> None:
    """
    Clients bind their given addresses and are attached, as is a successor
    with the same number; repeats are harmless.
    """
    kept = await started(bed, n_clients=3)
    first, second = (bed.launcher.client_addresses(kept.place, client) for client in (1, 2))
    assert len({first.input_address, first.output_address, second.input_address, second.output_address}) == 4
    await bed.launcher.attach(kept.place, 1, first)
    await bed.launcher.attach(kept.place, 1, first)
    await bed.launcher.attach(kept.place, 2, second)
    await bed.launcher.detach(kept.place, 1)
    await bed.launcher.detach(kept.place, 1)
    await bed.launcher.attach(kept.place, 1, bed.launcher.client_addresses(kept.place, 1))
    await bed.launcher.stop(kept.place, 5.0)
    await bed.launcher.detach(kept.place, 2)
    with pytest.raises(EngineError):
        await bed.launcher.attach(kept.place, 1, first)


async def new_clients_are_served_or_refused(bed: LauncherBed) -> None:
    """
    A client not named at the start, or on another node, is attached if the
    launcher has the ability, otherwise refused.
    """
    kept = await started(bed)
    for client in (1, 7):
        if bed.launcher.abilities.new_clients:
            await bed.launcher.attach(kept.place, client, bed.elsewhere())
        else:
            with pytest.raises(EngineError):
                await bed.launcher.attach(kept.place, client, bed.elsewhere())


RULES = (
    places_are_dealt_out_and_taken_back,
    what_has_started_is_known,
    a_place_has_one_life_after_another,
    a_death_is_told,
    stopping_is_harmless,
    a_start_can_be_stopped,
    clients_come_and_go,
    new_clients_are_served_or_refused,
)

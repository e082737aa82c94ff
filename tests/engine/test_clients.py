"""Several front-end processes on the same real instances: tokens, mutual visibility, what a dead one leaves."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from zoo import Zoo, greedy

if TYPE_CHECKING:
    from cascadeinfer.engines.vllm.attached import AttachedCore
    from cascadeinfer.engines.vllm.attachment import Attachment
    from cascadeinfer.engines.vllm.instance import VllmInstance

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

NAMES = ("async+cache", "sync")
"""The two instances of the zoo that these tests use."""


def attached(owner: "VllmInstance") -> "VllmInstance":
    """A second client of an instance, not started yet."""
    from cascadeinfer.engines.vllm.attached import AttachedCore
    from cascadeinfer.engines.vllm.attachment import attachment_of
    from cascadeinfer.engines.vllm.instance import VllmInstance

    async def attach(_: "AttachedCore") -> "Attachment":
        attachment = await attachment_of(owner, 1)
        assert attachment is not None
        return attachment

    return VllmInstance(AttachedCore(owner.instance_id, owner.config, 1, attach))


@pytest_asyncio.fixture(loop_scope="session")
async def second(zoo: Zoo) -> AsyncIterator[Zoo]:
    """The same instances as another process would see them."""
    mine = {name: attached(zoo.instances[name]) for name in NAMES}
    for instance in mine.values():
        await instance.start()
    async with Zoo(mine) as other:
        other._numbers = itertools.count(
            1_000_000
        )  # vLLM's front end gives each request an id that is unique across processes
        try:
            yield other
            await other.settled()
        finally:
            for instance in mine.values():
                await instance.stop(0.0)


async def test_each_client_gets_its_own_tokens(zoo: Zoo, second: Zoo) -> None:
    """Two clients run and move requests on the same two instances at once; every output is as if run alone."""
    a, b = NAMES
    cases = [(await zoo.window(n, 180)) for n in (33, 60, 90, 120)]
    outputs = []
    for number, (prompt, _) in enumerate(cases):
        client = (zoo, second)[number % 2]
        outputs.append((client, await client.start(client.instances[a], prompt, greedy(180))))
    for client, attempt in outputs:
        await attempt.until_output(10)
        assert attempt.engine_request_id in client._attempts
    ended = []
    for client, attempt in outputs:
        moved = await client.move(attempt, client.instances[b])
        await moved.until_output(10)
        ended.append(await client.move(moved, client.instances[a]))
    for attempt, (_, expected) in zip(ended, cases, strict=True):
        assert (await attempt.until_end()).output == expected


async def test_load_of_others_is_foreign(zoo: Zoo, second: Zoo) -> None:
    """A report names the caller's own requests; for other clients' it gives only the lengths."""
    name = NAMES[0]
    prompt, _ = await zoo.window(40, 200)
    own = await zoo.start(zoo.instances[name], prompt, greedy(1500))
    other = await second.start(second.instances[name], prompt, greedy(1500))
    await asyncio.gather(own.until_output(3), other.until_output(3))
    for client, attempt in ((zoo, own), (second, other)):
        report, _ = await client.instances[name].report()
        assert report.running_ids == (attempt.engine_request_id,)
        assert len(report.foreign_running_tokens) == 1
        assert report.foreign_running_tokens[0] >= len(prompt) + 3
        assert report.n_running == 2
    for client, attempt in ((zoo, own), (second, other)):
        await client.instances[name].abort([attempt.engine_request_id])


async def test_what_a_dead_client_leaves(zoo: Zoo, second: Zoo) -> None:
    """The owner's command drops its requests and reservations, no others; its successor starts clean."""
    name = NAMES[1]
    prompt, expected = await zoo.window(40, 150)
    own = await zoo.start(zoo.instances[name], prompt, greedy(150))
    orphans = [await second.start(second.instances[name], prompt, greedy(1500)) for _ in range(2)]
    await asyncio.gather(own.until_output(3), *(orphan.until_output(3) for orphan in orphans))
    assert await second.instances[name].reserve("m1", 100) is None
    assert await zoo.instances[name].reserve("m1", 100) is None
    assert (await zoo.counters(zoo.instances[name])).reserved == 2

    assert await zoo.instances[name].forget_client(1) == 2

    report, counters = await zoo.instances[name].report()
    assert report.foreign_running_tokens == ()
    assert counters.reserved == 1
    await zoo.instances[name].release_reservation("m1")
    assert (await own.until_end()).output == expected

    late = await second.start(second.instances[name], prompt, greedy(1500))  # arrived after the owner had cleaned up
    await late.until_output(1)
    await second.instances[name].stop(0.0)
    successor = attached(zoo.instances[name])
    await successor.start()
    second.instances[name] = successor
    assert (await successor.report())[0].n_running == 0


async def test_migrations_of_all_clients_are_counted(zoo: Zoo, second: Zoo) -> None:
    """An instance takes part in a limited number of migrations, whoever starts them; more are refused."""
    name = NAMES[1]
    prompt, expected = await zoo.window(20, 280)
    running = await zoo.start(zoo.instances[name], prompt, greedy(280))
    await running.until_output(3)
    await zoo.instances[name].limit_migrations(3)
    try:
        holders = [(zoo, "m1"), (second, "m1"), (second, "m2")]
        for client, reservation_id in holders:
            assert await client.instances[name].reserve(reservation_id, 50) is None
        assert await zoo.instances[name].reserve("m2", 50) == "migrations"
        assert await second.instances[name].reserve("m3", 50) == "migrations"
        assert await zoo.instances[name].cut(running.engine_request_id) == "migrations"
        assert await second.instances[name].reserve("p1", 50, for_parked=True) is None, "a push is no migration"
        await second.instances[name].release_reservation("m2")
        assert await zoo.instances[name].reserve("m2", 50) is None
        assert await zoo.instances[name].reserve("m4", 50) == "migrations"
        for client, reservation_id in ((zoo, "m2"), (second, "p1")):
            await client.instances[name].release_reservation(reservation_id)
        for client, reservation_id in holders:
            await client.instances[name].release_reservation(reservation_id)
        moved = await zoo.move(running, zoo.instances[NAMES[0]])
        assert (await moved.until_end()).output == expected
    finally:
        await zoo.instances[name].limit_migrations(None)

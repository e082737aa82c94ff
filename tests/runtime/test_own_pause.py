"""A pause of the front end's own event loop, longer than every time limit, is not taken for any instance's death."""

import asyncio

import pytest
from runtime_cluster import SUPERVISION, Cluster, ScriptedPolicy

from cascadeinfer.runtime.given_up import GRACE_S
from support.virtual_time import VirtualTimeLoop, virtual_time

PAUSE_S = 48.0
assert SUPERVISION.hang_s < PAUSE_S


def stall() -> None:
    """Pause and resume the front end."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    loop.stall(PAUSE_S)


@virtual_time
async def test_no_instance_is_killed_for_it() -> None:
    """Pending answers are still awaited; no instance is restarted, and requests end where they were."""
    async with Cluster() as cluster:
        clients = [await cluster.submit(f"r{i}", 50, 100) for i in range(6)]
        await clients[0].until_tokens(5)
        for name in "abc":
            cluster[name].hold_answers("report")
        await asyncio.sleep(3 * SUPERVISION.report_s)  # each owes an answer now
        stall()
        await asyncio.sleep(SUPERVISION.hang_s / 2)
        for name in "abc":
            cluster[name].release_answers("report")
        for client in clients:
            await client.until_end()
            assert client.finish_reason == "length"
        await asyncio.sleep(2 * SUPERVISION.hang_s)
        assert [len(generation) for generation in cluster.engines.values()] == [1, 1, 1]


@virtual_time
async def test_one_that_hangs_is_found_out_afterwards() -> None:
    """The full time limit counts from the end of the pause, and then it does apply."""
    async with Cluster() as cluster:
        cluster["a"].hang()
        await asyncio.sleep(SUPERVISION.hang_s / 2)
        stall()
        resumed_s = asyncio.get_running_loop().time()
        await cluster.until(lambda: len(cluster.runtime.live_engines()) == 2)
        waited_s = asyncio.get_running_loop().time() - resumed_s
        assert SUPERVISION.hang_s <= waited_s <= SUPERVISION.hang_s + 2 * SUPERVISION.report_s
        await cluster.all_up()


@virtual_time
async def test_a_drain_gets_its_time_again() -> None:
    """Requests that may have ended during the pause are not recomputed because of it."""
    policy = ScriptedPolicy({"r": "a"})
    async with Cluster(policy) as cluster:
        client = await cluster.submit("r", 50, 200)
        await client.until_tokens(5)
        cluster["a"].pause()
        state = cluster.runtime.elastic.drain("a", 20.0)
        assert state.drain is not None
        await asyncio.sleep(3.0)
        stall()
        await asyncio.sleep(5.0)
        assert state.drain.ends_s > asyncio.get_running_loop().time()
        cluster["a"].unpause()
        await client.until_end()
        assert client.finish_reason == "length"
        assert (await cluster.gone("a")).how == "drained"


@virtual_time
async def test_a_dropped_request_still_waits_for_the_death() -> None:
    """An instance that gives its requests up and dies, all during the pause, costs the client nothing."""
    policy = ScriptedPolicy({"r": "a"})
    async with Cluster(policy) as cluster:
        client = await cluster.submit("r", 50, 40)
        await client.until_tokens(5)
        cluster["a"].end_all("abort")
        await asyncio.sleep(0.2)
        stall()
        assert GRACE_S < PAUSE_S
        await asyncio.sleep(0.05)
        cluster["a"].kill()
        await client.until_end()
        assert client.finish_reason == "length"
        await cluster.all_up()


@pytest.mark.parametrize("n_pauses", [2, 5])
@virtual_time
async def test_pauses_one_after_the_other(n_pauses: int) -> None:
    """Each pause restarts the count; instances that answer in between are never blamed."""
    async with Cluster() as cluster:
        for _ in range(n_pauses):
            stall()
            await asyncio.sleep(SUPERVISION.hang_s / 2)
        assert [len(generation) for generation in cluster.engines.values()] == [1, 1, 1]

"""Under overload queues stay bounded, refusals are prompt, and the runtime recovers by itself."""

import asyncio
import random

import pytest
from runtime_cluster import CAPACITY, Client, Cluster

from cascadeinfer.core.errors import RequestRejectedError
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.policies.cascade import Cascade
from cascadeinfer.engines.simulated import SimulatedTimes
from support.virtual_time import virtual_time

MAX_QUEUED = 12
N_INSTANCES = 3
PROMPT, OUTPUT = 40, 60
ROOM = N_INSTANCES * CAPACITY.max_num_seqs + MAX_QUEUED
"""Requests that can be live at once: those in batch slots and those in the queue."""
SLOW = SimulatedTimes(step_s=0.03)
LAYOUT = StageLayout.from_boundaries((70,), (("a", "b"), ("c",)))


async def flood(cluster: Cluster, rate_per_s: float, seconds: float, rng: random.Random) -> tuple[list[Client], int]:
    """Send requests at this rate; a tenth of the clients leave. Returns the accepted ones and the number refused."""
    loop = asyncio.get_running_loop()
    end_s = loop.time() + seconds
    accepted: list[Client] = []
    refused = 0
    number = 0
    while loop.time() < end_s:
        await asyncio.sleep(rng.expovariate(rate_per_s))
        number += 1
        name = f"flood{number}"
        try:
            accepted.append(await cluster.submit(name, PROMPT, rng.randrange(2, 2 * OUTPUT)))
        except RequestRejectedError:
            refused += 1
            del cluster.clients[name]
        assert cluster.runtime.n_live_requests <= ROOM
        if rng.random() < 0.1 and (live := [c for c in accepted if c.finish_reason is None and not c.left]):
            cluster.abort(rng.choice(live))
    return accepted, refused


async def served_per_s(cluster: Cluster, n: int) -> float:
    """Requests per second when `n` are sent at once."""
    start_s = asyncio.get_running_loop().time()
    for client in [await cluster.submit(f"probe{start_s}.{i}", PROMPT, OUTPUT) for i in range(n)]:
        await client.until_end()
    return n / (asyncio.get_running_loop().time() - start_s)


@pytest.mark.parametrize("layout", [None, LAYOUT])
@pytest.mark.parametrize("fault", [None, "kill", "drain"])
@virtual_time
async def test_ten_times_too_much_for_a_minute(fault: str | None, layout: StageLayout | None) -> None:
    """
    Accepted requests complete, the rest are refused at once, the number of live requests is bounded, and afterwards the
    runtime works as before.

    This holds even if an instance dies or is drained in the middle: what was accepted is not refused later.
    """
    async with Cluster(Cascade(layout=layout, max_queued=MAX_QUEUED), times=SLOW) as cluster:
        before = await served_per_s(cluster, N_INSTANCES * CAPACITY.max_num_seqs)
        flooding = asyncio.ensure_future(flood(cluster, 10 * before, 60.0, random.Random(7)))
        await asyncio.sleep(20.0)
        if fault == "kill":
            cluster["a"].kill()
        elif fault == "drain":
            cluster.runtime.elastic.drain("a", 5.0)
        accepted, refused = await flooding
        for client in accepted:
            await client.until_end()
        assert refused > 3 * len(accepted)
        assert len(accepted) > 60.0 * before
        if fault == "drain":
            await cluster.gone("a")
            cluster.runtime.elastic.add()
        await cluster.all_up()
        await asyncio.sleep(1.0)
        assert await served_per_s(cluster, N_INSTANCES * CAPACITY.max_num_seqs) > 0.7 * before
        refusals = cluster.registry.get_sample_value("cascadeinfer_requests_total", {"outcome": "rejected"})
        assert refusals == refused


@virtual_time
async def test_nobody_listens_for_a_while() -> None:
    """A front end that reads nothing for seconds finds every token in order; instances and moves go on meanwhile."""
    async with Cluster(Cascade(layout=LAYOUT)) as cluster:
        clients = [await cluster.submit(f"r{i}", PROMPT, 100) for i in range(6)]
        for client in clients:
            await client.until_tokens(3)
        assert cluster._pump is not None
        cluster._pump.cancel()
        await asyncio.sleep(5.0)
        assert cluster.runtime.n_live_requests == 0
        assert not any(client.finish_reason for client in clients)
        cluster._pump = asyncio.get_running_loop().create_task(cluster._listen(), name="clients")
        for client in clients:
            await client.until_end()
        assert [len(client.token_ids) for client in clients] == [100] * 6

"""Streams are complete: each token comes once and in order, wherever the request has run."""

import pytest
from runtime_cluster import Cluster

from cascadeinfer.core.events import MigrationOutcome
from support.virtual_time import virtual_time


@virtual_time
async def test_plain_requests() -> None:
    """Requests that never move have the output of a single engine, whether they end by length or by stop token."""
    async with Cluster() as cluster:
        clients = [await cluster.submit(f"r{i}", 10 + 17 * i, 30) for i in range(12)]
        clients.append(await cluster.submit("stops", 50, 60, stop_at=9))
        for client in clients:
            await client.until_end()
        assert clients[-1].finish_reason == "stop"
        assert len(clients[-1].token_ids) == 9


@virtual_time
async def test_to_and_fro() -> None:
    """Fifteen moves back and forth leave the output unchanged; each pulls the KV cache and none recomputes."""
    async with Cluster() as cluster:
        client = await cluster.submit("r", 90, 150)
        for move in range(15):
            await client.until_tokens(5 * move + 3)
            cluster.move("r", "b" if cluster.where("r") == "a" else "a")
            await cluster.until(lambda: cluster.migration("r") is None)
        await client.until_end()
        assert [e.outcome for e in cluster.policy.ended_migrations()] == [MigrationOutcome.MOVED] * 15
        assert sum(cluster[i].core.pulls for i in "ab") == 15
        assert sum(cluster[i].core.failed_pulls for i in "ab") == 0


@pytest.mark.parametrize("stop_at", range(6, 12))
@virtual_time
async def test_end_races_the_cut(stop_at: int) -> None:
    """A request that ends by a stop token before, at, or after its cut ends once, with all its tokens."""
    async with Cluster() as cluster:
        client = await cluster.submit("r", 40, 60, stop_at=stop_at)
        await client.until_tokens(6)
        if client.finish_reason is None:
            cluster.move("r", "b")
        await client.until_end()
        assert client.finish_reason == "stop"


@pytest.mark.parametrize("n_output", range(1, 9))
@virtual_time
async def test_length_races_the_cut(n_output: int) -> None:
    """A request moved at its first token ends once, at its length, even with a single token."""
    async with Cluster() as cluster:
        client = await cluster.submit("r", 40, n_output)
        await client.until_tokens(1)
        if client.finish_reason is None:
            cluster.move("r", "b")
        await client.until_end()
        assert client.finish_reason == "length"

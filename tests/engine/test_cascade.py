"""The main claim on real engines: requests flow through three stages with their KV cache, and nothing else changes."""

import asyncio
import random

import pytest
from zoo import MIN_MARGIN, greedy, random_prompt

from cluster import STAGE_EDGES, Cluster

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

N_REQUESTS = 24
N_HAND_OVERS = 20
N_ROUNDS = 5
FAILED_TRANSFERS = "vllm:nixl_num_failed_transfers_total"
PULLS_OF_ENGINE = "vllm:nixl_xfer_time_seconds_count"
"""Transfers per engine, as counted by NIXL itself."""


async def test_24_requests_through_three_stages(cluster: Cluster) -> None:
    """
    24 concurrent requests of mixed lengths get the tokens that each gets alone, with at least 20 hand-overs by KV pull.

    On a slow machine a request may end before it is handed over; then all are sent again. Three counts agree: the
    runtime's migrations, the connector's pulls, and NIXL's own transfers; one copied ahead makes two. Nothing
    is recomputed.
    """
    rng = random.Random(1)
    cases: list[tuple[list[int], int, list[int]]] = []
    for seed in range(100):
        n_prompt, n_output = rng.randrange(10, 110), rng.randrange(70, 150)
        prompt = random_prompt(n_prompt, seed)
        [alone] = await cluster.alone(prompt, greedy(n_output, logprobs=2))
        logprobs = [sorted((entry.logprob for entry in step.values()), reverse=True) for step in alone.logprobs or ()]
        if min(best[0] - best[1] for best in logprobs) > MIN_MARGIN:
            cases.append((prompt, n_output, list(alone.token_ids)))
        if len(cases) == N_REQUESTS:
            break
    crossings = sum(len(p) < edge <= len(p) + n - 20 for p, n, _ in cases for edge in STAGE_EDGES)
    assert crossings >= N_HAND_OVERS, "the load is too short to move"

    moved, other = cluster.migrations("moved"), cluster.migrations("recomputed") + cluster.migrations("lost")
    transfers, copied, ended = cluster.metric(PULLS_OF_ENGINE), cluster.policy.copied, cluster.migrations()
    failed = cluster.metric(FAILED_TRANSFERS)
    counters = [(await engine.report())[1] for engine in cluster.runtime.live_engines()]
    hand_overs = 0.0
    for _ in range(N_ROUNDS):
        with cluster.always_copying():
            outputs = await asyncio.gather(*(cluster.run(prompt, greedy(n)) for prompt, n, _ in cases))
            await cluster.settled()
        for (_, _, expected), [output] in zip(cases, outputs, strict=True):
            assert list(output.token_ids) == expected
        hand_overs = cluster.migrations("moved") - moved
        if hand_overs >= N_HAND_OVERS:
            break
    assert hand_overs >= N_HAND_OVERS
    assert cluster.migrations("recomputed") + cluster.migrations("lost") == other
    after = [(await engine.report())[1] for engine in cluster.runtime.live_engines()]
    copies = cluster.policy.copied - copied
    assert sum(c.pulls for c in after) - sum(c.pulls for c in counters) == hand_overs, "the cut's token is always left"
    n_reads = cluster.metric(PULLS_OF_ENGINE) - transfers
    assert hand_overs + copies <= n_reads <= hand_overs + cluster.migrations() - ended, "some end while they are copied"
    assert copies > 0
    assert sum(c.precopied_tokens for c in after) > sum(c.precopied_tokens for c in counters)
    assert sum(c.failed_pulls for c in after) == sum(c.failed_pulls for c in counters)
    assert cluster.metric(FAILED_TRANSFERS) == failed

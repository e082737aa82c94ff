"""Full blocks go ahead of requests that move: what the runtime asks, uses and tells. In virtual time."""

import asyncio
from dataclasses import replace

import pytest
from runtime_cluster import CAPACITY, MIGRATION, TIMES, Cluster, ScriptedPolicy

from cascadeinfer.core.events import MigrationOutcome
from cascadeinfer.core.links import LEAST_TOKENS, PULLS_NEEDED
from cascadeinfer.core.migration import Happening, State
from support.virtual_time import virtual_time

AHEAD = replace(MIGRATION, precopy=True)
ROOMY = replace(CAPACITY, max_batched_tokens=1024)
PROMPT = 2 * LEAST_TOKENS
BLOCK = CAPACITY.block_size_tokens
SLOW = replace(TIMES, pull_s=0.2)


@virtual_time
async def test_the_pause_carries_the_rest() -> None:
    """The request decodes on while its full blocks are copied; what came meanwhile is pulled after the cut."""
    policy = ScriptedPolicy({"r": "a"})
    async with Cluster(policy, times=SLOW, capacity=ROOMY, migration=AHEAD) as cluster:
        client = await (await cluster.submit("r", PROMPT, 100)).until_tokens(5)
        cluster.move("r", "b")
        await cluster.until(lambda: (State.COPYING, Happening.COPIED) in cluster.pairs)
        assert len(client.token_ids) > 5 + 10, "it went on"
        await client.until_end()
        (ended,) = policy.ended_migrations()
        assert (ended.outcome, ended.detail) == (MigrationOutcome.MOVED, "")
        assert ended.copied_tokens == (PROMPT + 4) // BLOCK * BLOCK
        counters = (await cluster["b"].report())[1]
        assert counters.precopied_tokens == ended.copied_tokens
        assert 10 < counters.pulled_tokens < 10 + 2 * BLOCK
        snapshot = {instance["id"]: instance for instance in cluster.runtime.snapshot()["instances"]}
        assert snapshot["b"]["precopied_tokens"] == ended.copied_tokens
        assert cluster.registry.get_sample_value(
            "cascadeinfer_instance_precopied_tokens", {"instance": "b", "stage": ""}
        ) == pytest.approx(ended.copied_tokens)


@virtual_time
async def test_a_short_pull_is_not_copied_ahead() -> None:
    """Once moves have shown that pulling takes less than the steps of a pause, requests are cut at once."""
    names = [f"r{number}" for number in range(PULLS_NEEDED + 1)]
    policy = ScriptedPolicy(dict.fromkeys(names, "a"))
    quick = replace(TIMES, pull_s=0.001)
    async with Cluster(
        policy, times=quick, capacity=ROOMY, migration=AHEAD, nodes=dict.fromkeys("abc", "x")
    ) as cluster:
        for name in names:
            client = await (await cluster.submit(name, PROMPT, 50)).until_tokens(5)
            cluster.move(name, "b")
            await client.until_end()
        copied = [event.copied_tokens > 0 for event in policy.ended_migrations()]
        assert copied == [True] * PULLS_NEEDED + [False]


@virtual_time
async def test_nothing_to_copy_is_no_reason_to_stay() -> None:
    """A request without a full block, and one whose target cannot copy, move as ever."""
    policy = ScriptedPolicy({"short": "a", "late": "a"})
    async with Cluster(policy, migration=AHEAD) as cluster:
        short = await (await cluster.submit("short", 2, 50)).until_tokens(2)
        cluster.move("short", "b")
        late = await (await cluster.submit("late", 100, 100)).until_tokens(2)
        cluster["b"].hold_answers("precopy")
        cluster.move("late", "b")
        await cluster.until(lambda: any(state is State.COPYING for state in [cluster.migration("late").state]))
        await asyncio.sleep(0.02)
        cluster["a"].lose_pins()
        cluster["b"].release_answers("precopy")
        await short.until_end()
        await late.until_end()
        assert [(e.outcome, e.copied_tokens) for e in policy.ended_migrations()] == [(MigrationOutcome.MOVED, 0)] * 2
        assert (State.COPYING, Happening.NOT_COPIED) in cluster.pairs


@virtual_time
async def test_who_loses_its_blocks_after_the_copy_pulls_everything() -> None:
    """A request that is preempted between its copy and its cut has other blocks then; its text is right."""
    policy = ScriptedPolicy({"r": "a"})
    async with Cluster(policy, times=SLOW, migration=AHEAD) as cluster:
        client = await (await cluster.submit("r", 100, 150)).until_tokens(5)
        cluster.move("r", "b")
        await cluster.until(lambda: (State.ASKING, Happening.ROOM_TO_COPY) in cluster.pairs)
        await asyncio.sleep(0.05)
        core = cluster["a"].core
        (victim,) = core.running
        core.running.remove(victim)
        victim.blocks = victim.computed = victim.digest = 0
        victim.preempted += 1
        core.waiting.insert(0, victim)
        await client.until_end()
        counters = (await cluster["b"].report())[1]
        assert counters.precopied_tokens == 0
        assert [e.outcome for e in policy.ended_migrations()] == [MigrationOutcome.MOVED]
        assert counters.pulled_tokens > 100

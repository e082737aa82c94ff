"""What moves tell of the links between nodes: as events, in `/admin/instances` and as metrics. In virtual time."""

from dataclasses import replace

import pytest
from runtime_cluster import CAPACITY, TIMES, Cluster, ScriptedPolicy

from cascadeinfer.core.events import InstanceJoined, MigrationEnded, MigrationOutcome
from cascadeinfer.core.links import LEAST_TOKENS, PULLS_NEEDED
from support.virtual_time import virtual_time

ROOMY = replace(CAPACITY, max_batched_tokens=1024)
NODES = {"a": "x", "b": "x", "c": "y"}
PROMPT = 2 * LEAST_TOKENS
FAR_PULL_S = 1.0


async def moved(cluster: Cluster, target_id: str) -> None:
    """Requests go from a to this one, as often as it takes."""
    for number in range(PULLS_NEEDED):
        client = await cluster.submit(f"{target_id}{number}", PROMPT, 200)
        await client.until_tokens(3)
        cluster.move(f"{target_id}{number}", target_id)
        await client.until_end()


def policy_with_all_at_a() -> ScriptedPolicy:
    """Requests start at a."""
    return ScriptedPolicy({f"{target}{number}": "a" for target in "bc" for number in range(PULLS_NEEDED)})


@virtual_time
async def test_moves_measure_links() -> None:
    """Each end carries its pull; rates are shown by nodes, and as one figure each within nodes and between them."""
    policy = policy_with_all_at_a()
    async with Cluster(policy, capacity=ROOMY, nodes=NODES) as cluster:
        cluster["c"].core.times = replace(TIMES, pull_s=FAR_PULL_S)
        assert cluster.runtime.snapshot()["links"] == []
        await moved(cluster, "b")
        await moved(cluster, "c")
        joined = [event for event in policy.events if isinstance(event, InstanceJoined)]
        assert {event.instance_id: event.node for event in joined} == NODES
        ended = policy.ended_migrations()
        assert {event.outcome for event in ended} == {MigrationOutcome.MOVED}
        assert all(event.pulled_tokens >= PROMPT for event in ended)
        assert all(event.pull_s > FAR_PULL_S for event in ended if event.target_id == "c")
        near, far = cluster.runtime.snapshot()["links"]
        assert (near["source"], near["target"], near["n_pulls"], near["is_far"]) == ("x", "x", PULLS_NEEDED, False)
        assert (far["source"], far["target"], far["n_pulls"], far["is_far"]) == ("x", "y", PULLS_NEEDED, True)
        assert far["tokens_per_s"] == pytest.approx(PROMPT / FAR_PULL_S, rel=0.1)

        def rate(relation: str) -> float | None:
            return cluster.registry.get_sample_value("cascadeinfer_link_tokens_per_second", {"relation": relation})

        assert rate("within_node") == pytest.approx(near["tokens_per_s"], rel=0.01)
        assert rate("between_nodes") == pytest.approx(far["tokens_per_s"], rel=0.01)
        assert policy.view.links.extra_s("a", "c", PROMPT) == pytest.approx(FAR_PULL_S, rel=0.1)


@virtual_time
async def test_where_nodes_are_not_known_nothing_is_measured() -> None:
    """Events are as without any of this."""
    policy = policy_with_all_at_a()
    async with Cluster(policy, capacity=ROOMY) as cluster:
        await moved(cluster, "b")
        assert cluster.runtime.snapshot()["links"] == []
        ended = [event for event in policy.events if isinstance(event, MigrationEnded)]
        assert {(event.pulled_tokens, event.pull_s) for event in ended} == {(0, 0.0)}

"""Instances get other roles and token budgets while they serve."""

from runtime_cluster import CAPACITY, Cluster, ScriptedPolicy

from cascadeinfer.core.effects import AssignTerms
from cascadeinfer.core.events import InstanceChanged, InstanceJoined
from cascadeinfer.core.kind import InstanceTerms, Role
from support.virtual_time import virtual_time

SMALLER = InstanceTerms(Role.PREFILL, 32)


def changes(policy: object) -> list[InstanceChanged]:
    """The changes that the policy has heard of."""
    assert isinstance(policy, ScriptedPolicy)
    return [event for event in policy.events if isinstance(event, InstanceChanged)]


def shown(cluster: Cluster, name: str) -> str:
    """Its role in `/admin/instances`."""
    return {one["id"]: one["role"] for one in cluster.runtime.snapshot()["instances"]}[name]


@virtual_time
async def test_an_instance_changes_while_it_serves() -> None:
    """The engine has the budget, the policy and the operator hear of it, and the request there goes on."""
    async with Cluster() as cluster:
        client = await cluster.submit("r", 20, 400)
        await client.until_tokens(3)
        place = cluster.where("r")
        assert place is not None
        cluster.do(AssignTerms("test", place, SMALLER))
        await cluster.until(lambda: bool(changes(cluster.policy)))
        kind = changes(cluster.policy)[0].kind
        assert (kind.role, kind.capacity.max_batched_tokens, kind.most_tokens) == (Role.PREFILL, 32, 64)
        assert cluster[place].core.step_budget == 32
        assert shown(cluster, place) == "prefill"
        cluster.do(AssignTerms("test", place, InstanceTerms()))
        await cluster.until(lambda: len(changes(cluster.policy)) == 2)
        assert changes(cluster.policy)[1].kind.capacity == CAPACITY
        assert cluster[place].core.step_budget in {None, CAPACITY.max_batched_tokens}
        await client.until_end()
        assert client.finish_reason == "length"


@virtual_time
async def test_terms_outlive_an_engine() -> None:
    """An instance that dies comes back with them, also when they were given while it was down."""
    async with Cluster() as cluster:
        cluster.do(AssignTerms("test", "a", SMALLER))
        await cluster.until(lambda: bool(changes(cluster.policy)))
        cluster["a"].kill()
        cluster["b"].kill()
        await cluster.until(lambda: len(cluster.runtime.live_engines()) == 1)
        cluster.do(AssignTerms("test", "b", SMALLER))
        await cluster.all_up()
        joined = [event for event in cluster.policy.events if isinstance(event, InstanceJoined)][-2:]
        assert {event.instance_id for event in joined} == {"a", "b"}
        for event in joined:
            assert (event.kind.role, event.kind.capacity.max_batched_tokens) == (Role.PREFILL, 32)
            assert cluster[event.instance_id].core.step_budget == 32
        assert len(changes(cluster.policy)) == 1


@virtual_time
async def test_a_budget_that_an_engine_refuses_changes_nothing() -> None:
    """Fewer tokens than requests may run: it keeps role and budget, and the policy may try others."""
    async with Cluster() as cluster:
        cluster.do(AssignTerms("test", "a", InstanceTerms(Role.PREFILL, 1)))
        await cluster.until(lambda: bool(cluster.defects))
        assert "a command to an instance failed" in cluster.defects.pop()
        assert not changes(cluster.policy)
        assert shown(cluster, "a") == "mixed"
        assert cluster["a"].core.step_budget in {None, CAPACITY.max_batched_tokens}

"""A request that the policy refuses after accepting it: its client is told, and nothing is left behind."""

from collections.abc import Callable

import pytest
from runtime_cluster import Client, Cluster, ScriptedPolicy

from cascadeinfer.core.effects import Effect, Reject
from cascadeinfer.core.errors import RequestRejectedError
from cascadeinfer.core.events import Event, RequestArrived, RequestFinished
from cascadeinfer.core.policies.cascade import Cascade
from support.virtual_time import virtual_time


class Holding(ScriptedPolicy):
    """Holds back requests whose id begins with `held`."""

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """See Policy."""
        if isinstance(event, RequestArrived) and event.request_id.startswith("held"):
            self.events.append(event)
            return []
        return super().handle(event, now_s)


def refuse(cluster: Cluster, request_id: str) -> None:
    """Have the policy refuse a request now."""
    cluster.do(Reject("test", request_id, "queue_full", 2.5))


def listen(cluster: Cluster) -> Callable[[], dict[str, float]]:
    """Listen for refusals as a front end does; returns the retry delays by request."""
    heard: dict[str, float] = {}

    def on_refusal(request_id: str, refusal: RequestRejectedError) -> None:
        client = cluster.clients[request_id]
        client.left = True
        client.news.set()
        heard[request_id] = refusal.retry_after_s

    cluster.runtime.on_late_refusal = on_refusal
    return lambda: heard


@virtual_time
async def test_a_refusal_after_waiting_ends_the_stream() -> None:
    """A client whose request waited in the policy and is then refused gets one error, and the id is free again."""
    policy = Holding()
    async with Cluster(policy) as cluster:
        client = await cluster.submit("held")
        assert cluster.runtime.n_live_requests == 1
        refuse(cluster, "held")
        await client.until_end()
        assert client.finish_reason == "error"
        assert client.token_ids == []
        assert cluster.runtime.n_live_requests == 0
        assert [e.request_id for e in policy.events if isinstance(e, RequestFinished)] == ["held"]
        assert cluster.registry.get_sample_value("cascadeinfer_requests_total", {"outcome": "rejected"}) == 1


@virtual_time
async def test_a_front_end_is_told_when_to_come_again() -> None:
    """Before the first token the front end gets the refusal itself, with its retry delay, and no error output."""
    async with Cluster(Holding()) as cluster:
        heard = listen(cluster)
        client = await cluster.submit("held")
        refuse(cluster, "held")
        await client.until_end()
        assert heard() == {"held": 2.5}
        assert client.finish_reason is None
        assert cluster.runtime.n_live_requests == 0


@virtual_time
async def test_a_refusal_amid_the_tokens_is_an_error() -> None:
    """A running request that is refused ends with an error after its tokens so far; its instance stops computing it."""
    async with Cluster() as cluster:
        heard = listen(cluster)
        client = await cluster.submit("r", 40, 400)
        other = await cluster.submit("other", 40, 60)
        await client.until_tokens(5)
        refuse(cluster, "r")
        await client.until_end()
        assert client.finish_reason == "error"
        assert len(client.token_ids) >= 5
        assert not heard()
        await other.until_end()
        assert other.finish_reason == "length"


@virtual_time
async def test_a_refusal_amid_a_migration_ends_both() -> None:
    """A request that is refused during its move leaves nothing pinned or reserved on either side."""
    async with Cluster() as cluster:
        client = await cluster.submit("r", 40, 400)
        await client.until_tokens(5)
        source_id = cluster.where("r")
        cluster.move("r", next(i for i in "abc" if i != source_id))
        assert cluster.migration("r") is not None
        refuse(cluster, "r")
        await client.until_end()
        assert client.finish_reason == "error"


@virtual_time
async def test_a_refusal_of_somebody_unknown_is_nothing() -> None:
    """A refusal that coincides with the client's departure changes nothing and is not kept."""
    async with Cluster(Holding()) as cluster:
        client = await cluster.submit("held")
        stream = cluster.runtime._streams.get("held")
        assert stream is not None
        cluster.abort(client)
        refuse(cluster, "held")
        assert stream.refusal is None
        assert cluster.runtime.n_live_requests == 0


@virtual_time
async def test_urgent_requests_push_waiting_ones_out_and_overload_passes() -> None:
    """
    Far more requests than fit: the number waiting is bounded, and urgent newcomers replace waiting requests, whose
    clients are told. Every other request completes, and afterwards new ones are accepted again.
    """
    policy = Cascade(max_queued=6)
    async with Cluster(policy, "ab") as cluster:
        heard = listen(cluster)
        taken: list[Client] = []
        refused = 0
        for number in range(60):
            try:
                taken.append(await cluster.submit(f"r{number}", 60, 80, priority=5))
            except RequestRejectedError:
                refused += 1
                cluster.clients.pop(f"r{number}")
            assert policy.view.waits() <= 6
        assert refused > 0
        assert not heard()
        urgent = [await cluster.submit(f"urgent{number}", 60, 80) for number in range(4)]
        assert len(heard()) == 4
        assert policy.view.waits() == 6
        for client in taken + urgent:
            await client.until_end()
        whole = [client.request.request_id for client in taken + urgent if client.finish_reason == "length"]
        assert sorted(whole + list(heard())) == sorted(c.request.request_id for c in taken + urgent)
        assert all(client.finish_reason == "length" for client in urgent)
        again = await cluster.submit("again", 60, 80, priority=9)
        await again.until_end()
        assert again.finish_reason == "length"
        rejected = cluster.registry.get_sample_value("cascadeinfer_requests_total", {"outcome": "rejected"})
        assert rejected == pytest.approx(refused + 4)

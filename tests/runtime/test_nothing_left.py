"""Requests that end before or without their first output leave nothing on any engine and harm no other request."""

import asyncio
from typing import Any

import pytest
from runtime_cluster import Cluster, ScriptedPolicy

from cascadeinfer.core.effects import Effect, Reject
from cascadeinfer.core.errors import PolicyError, RequestIdInUseError, RequestRejectedError
from cascadeinfer.core.events import Event, MigrationEnded, RequestArrived
from support.virtual_time import virtual_time


def at_arrival(policy: ScriptedPolicy, request_id: str, *effects: Effect) -> None:
    """Have the policy add these effects after the dispatch of this request when it arrives."""

    def answer(event: Event) -> list[Effect]:
        return list(effects) if isinstance(event, RequestArrived) and event.request_id == request_id else []

    policy.answers.append(answer)


class Clumsy(ScriptedPolicy):
    """Asks for something impossible right after placing the request `bad`."""

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """See Policy; the second thing it returns is no effect at all."""
        effects = super().handle(event, now_s)
        if isinstance(event, RequestArrived) and event.request_id == "bad":
            effects.append("no effect")  # type: ignore[arg-type]
        return effects


@virtual_time
async def test_refused_after_it_was_placed() -> None:
    """If a policy places a request and refuses it at the same event, the instance stops computing it."""
    policy = ScriptedPolicy()
    at_arrival(policy, "r", Reject("test", "r", "second_thoughts", 1.0))
    async with Cluster(policy, "a") as cluster:
        with pytest.raises(RequestRejectedError):
            await cluster.submit("r", 40, 1000)
        cluster.clients["r"].left = True
        await cluster.settled()


@virtual_time
async def test_the_policy_fails_after_it_has_placed() -> None:
    """The client is told that the policy failed; its request, already on an engine, is stopped there."""
    async with Cluster(Clumsy({"good": "a"}), "a") as cluster:
        good = await cluster.submit("good", 40, 60)
        with pytest.raises(PolicyError):
            await cluster.submit("bad", 40, 1000)
        cluster.clients["bad"].left = True
        await good.until_end()
        assert good.finish_reason == "length"
        await cluster.settled()


@pytest.mark.parametrize("how", ["client leaves", "request ends"])
@virtual_time
async def test_refused_as_its_migration_ends(how: str) -> None:
    """If the policy refuses a request whose end has just ended its migration, the request still ends only once."""
    policy = ScriptedPolicy({"r": "a", "other": "a"})
    policy.answers.append(lambda event: [Reject("test", "r", "late", 1.0)] if isinstance(event, MigrationEnded) else [])
    async with Cluster(policy, "ab") as cluster:
        answer = asyncio.Event()

        async def reserve(*_: object, **_named: object) -> str:
            await answer.wait()
            return "no room"

        cluster["b"].reserve = reserve  # type: ignore[method-assign]
        client = await cluster.submit("r", 40, 40)
        other = await cluster.submit("other", 40, 400)
        await client.until_tokens(5)
        cluster.move("r", "b")
        assert cluster.migration("r") is not None
        if how == "client leaves":
            client.left = other.left = True
            cluster.runtime.abort(["r", "other"])
        else:
            await client.until_end()
            assert client.finish_reason == "length"
            cluster.abort(other)
        answer.set()
        assert cluster.runtime.n_live_requests == 0
        assert not any(cluster.runtime.fleet[name].supervisor.restarts for name in "ab")
        assert cluster.registry.get_sample_value("cascadeinfer_requests_total", {"outcome": "rejected"}) is None
        await cluster.settled()


@pytest.mark.parametrize("is_last", [False, True])
@virtual_time
async def test_refused_as_it_arrives_at_its_target(*, is_last: bool) -> None:
    """
    The first token at the target, perhaps the last of all, ends the move;
    the policy refuses: one error, nothing after it.
    """
    policy = ScriptedPolicy({"r": "a"})
    async with Cluster(policy, "ab") as cluster:
        client = await cluster.submit("r", 40, 400)
        await client.until_tokens(5)
        policy.answers.append(
            lambda event: [Reject("test", "r", "late", 1.0)] if isinstance(event, MigrationEnded) else []
        )
        deliver = cluster.runtime._deliver

        def last_one(engine: Any, of: Any, delta: Any, now_s: float) -> bool:
            if of.migration is not None and of.migration.at_target and is_last:
                delta.finish_reason = "length"
            return deliver(engine, of, delta, now_s)

        cluster.runtime._deliver = last_one  # type: ignore[method-assign]
        cluster.move("r", "b")
        await client.until_end()
        assert client.finish_reason == "error"
        await cluster.settled()
        assert not any(cluster.runtime.fleet[name].supervisor.restarts for name in "ab")


@virtual_time
async def test_an_id_that_is_in_use() -> None:
    """The newcomer gets an error; the request that has the id completes, and the id is free afterwards."""
    async with Cluster(ScriptedPolicy(), "ab") as cluster:
        first = await cluster.submit("r", 40, 60)
        await first.until_tokens(5)
        with pytest.raises(RequestIdInUseError):
            await cluster.runtime.submit(first.request)
        await first.until_end()
        assert first.finish_reason == "length"
        again = await cluster.submit("r", 40, 60)
        await again.until_end()
        assert again.finish_reason == "length"


@pytest.mark.parametrize("to_whom", ["target", "back"])
@virtual_time
async def test_a_move_that_cannot_be_sent(to_whom: str) -> None:
    """The resumed request does not fit into a message: it ends with an error, and neither side keeps anything."""
    async with Cluster(ScriptedPolicy({"r": "a"}), "ab") as cluster:
        client = await cluster.submit("r", 40, 400)
        await client.until_tokens(5)
        engine = cluster["b"]

        async def fail(*_: object) -> None:
            raise OverflowError("integer out of range")

        engine.add = fail  # type: ignore[method-assign, assignment]
        if to_whom == "back":
            cluster["a"].add = fail  # type: ignore[method-assign, assignment]
        cluster.move("r", "b")
        await client.until_end()
        assert client.finish_reason == "error"
        assert len(cluster.defects) == 1
        cluster.defects.clear()
        await cluster.settled()


@virtual_time
async def test_the_end_of_all_instances() -> None:
    """A request refused late, with tokens, while every instance is down still gets its error."""
    async with Cluster(ScriptedPolicy(), "ab") as cluster:
        client = await cluster.submit("r", 40, 400)
        await client.until_tokens(5)
        for name in "ab":
            cluster[name].kill()
        await cluster.until(lambda: not cluster.runtime.live_engines())
        cluster.do(Reject("test", "r", "no_instance", 1.0))
        await client.until_end()
        assert client.finish_reason == "error"
        await cluster.all_up()


@virtual_time
async def test_an_observer_that_fails() -> None:
    """An observer that raises must not leave a request behind that its sender believes refused."""
    failing = [False]

    def observer(_now_s: float, event: Event, *_: object) -> None:
        if failing[0] and isinstance(event, RequestArrived):
            raise OSError("disk full")

    async with Cluster(ScriptedPolicy(), "a", observer=observer) as cluster:
        failing[0] = True
        with pytest.raises(OSError, match="disk full"):
            await cluster.submit("r", 40, 60)
        failing[0] = False
        stream = cluster.runtime._streams.get("r")
        assert stream is not None
        assert not stream.arriving
        cluster.clients["r"].left = True
        cluster.runtime.abort(["r"])  # as the front end does
        await cluster.settled()

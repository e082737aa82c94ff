"""A policy that raises: the instance behind the event survives, no request hangs, and all is counted and logged."""

from collections.abc import Callable

import pytest
from runtime_cluster import Cluster, ScriptedPolicy

from cascadeinfer.core.effects import Dispatch, Effect, Reject
from cascadeinfer.core.errors import PolicyError, RequestRejectedError
from cascadeinfer.core.events import (
    Event,
    InstanceJoined,
    InstanceLost,
    InstanceReported,
    MigrationEnded,
    RequestArrived,
    RequestFinished,
    TimerFired,
)
from support.virtual_time import virtual_time


class Failing(ScriptedPolicy):
    """Raises where a test chooses, before or after updating its view."""

    def __init__(self, fails: Callable[[Event], bool], *, late: bool = False, times: int = 1_000_000) -> None:
        """Fail at events selected by `fails`, at most this often."""
        super().__init__()
        self.fails = fails
        self.late = late
        self.left = times

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """See Policy."""
        failing = self.left > 0 and self.fails(event)
        self.left -= failing
        if failing and not self.late:
            raise KeyError("early")
        effects = super().handle(event, now_s)
        if failing:
            raise ValueError("late")
        return effects


def failures(cluster: Cluster, event: type[Event]) -> float | None:
    """What the metric says."""
    return cluster.registry.get_sample_value("cascadeinfer_policy_failures_total", {"event": event.__name__})


@pytest.mark.parametrize("late", [False, True])
@virtual_time
async def test_a_failed_arrival_is_an_error_at_once(late: bool, caplog: pytest.LogCaptureFixture) -> None:
    """The sender gets an error, runtime and policy forget the request, and its id can be used again."""
    policy = Failing(lambda e: isinstance(e, RequestArrived) and e.request_id == "bad", late=late, times=1)
    async with Cluster(policy) as cluster:
        good = await cluster.submit("good")
        with pytest.raises(PolicyError, match="failed at request bad"):
            await cluster.submit("bad")
        cluster.clients.pop("bad")
        assert cluster.runtime.n_live_requests == 1
        again = await cluster.submit("bad")
        for client in (good, again):
            await client.until_end()
            assert client.finish_reason == "length"
        assert failures(cluster, RequestArrived) == 1
        read = cluster.registry.get_sample_value
        assert read("cascadeinfer_requests_total", {"outcome": "failed"}) == 1
        assert "the policy failed at RequestArrived(" in caplog.text
        assert ("late" if late else "early") in caplog.text
        assert not any(cluster.runtime.fleet[i].supervisor.restarts for i in "abc")


class Clumsy(Failing):
    """Refuses `bad` where a test chooses, and at the same event asks for something impossible."""

    def __init__(self, fails: Callable[[Event], bool] = lambda _: False) -> None:
        """Fail at events selected by `fails`; refuse nothing yet."""
        super().__init__(fails)
        self.refusals = 0

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """See Policy; the second thing it returns is no effect at all."""
        if self.refusals and isinstance(event, RequestArrived) and event.request_id == "bad":
            self.refusals -= 1
            return [Reject("test", "bad", "no", 1.0), "no effect"]  # type: ignore[list-item]
        return super().handle(event, now_s)


@virtual_time
async def test_a_refusal_and_a_failure_at_once_are_forgotten_with_the_request() -> None:
    """The sender gets the refusal; the next request with the same id is affected by neither fault."""
    async with Cluster(policy := Clumsy()) as cluster:
        policy.refusals = 1
        with pytest.raises(RequestRejectedError):
            await cluster.submit("bad")
        again = await cluster.submit("bad")
        await again.until_end()
        assert again.finish_reason == "length"


@virtual_time
async def test_a_refusal_and_a_failure_at_once_end_an_orphan_once() -> None:
    """A request announced again, refused and failed in the same call gets one error; later requests are placed."""
    async with Cluster(policy := Clumsy(lambda event: isinstance(event, InstanceLost))) as cluster:
        policy.places = {"bad": "b", "r": "b"}
        clients = [await cluster.submit(name, 30, 400) for name in ("bad", "r")]
        for client in clients:
            await client.until_tokens(5)
        policy.refusals = 1
        cluster["b"].kill()
        for client in clients:
            await client.until_end()
        assert [client.finish_reason for client in clients] == ["error", "length"]
        assert cluster.registry.get_sample_value("cascadeinfer_requests_total", {"outcome": "rejected"}) == 1
        assert not cluster.registry.get_sample_value("cascadeinfer_requests_total", {"outcome": "failed"})
        await cluster.all_up()
        policy.left = 0
        cluster.runtime.announce_loss("b")


@pytest.mark.parametrize("late", [False, True])
@virtual_time
async def test_failures_at_reports_restart_nobody(late: bool) -> None:
    """A policy that fails at every report still serves: no instance is restarted, no request is harmed."""
    async with Cluster(Failing(lambda e: isinstance(e, InstanceReported), late=late)) as cluster:
        clients = [await cluster.submit(f"r{i}") for i in range(6)]
        for client in clients:
            await client.until_end()
            assert client.finish_reason == "length"
        assert (failures(cluster, InstanceReported) or 0) > 5
        assert not any(len(generation) > 1 for generation in cluster.engines.values())
        cluster.policy.left = 0  # for the final check of its view


@pytest.mark.parametrize("late", [False, True])
@virtual_time
async def test_orphans_of_a_failed_loss_go_on(late: bool) -> None:
    """If the policy fails on a death, the loss is announced again, and the orphans complete elsewhere."""
    async with Cluster(Failing(lambda e: isinstance(e, InstanceLost), late=late, times=1)) as cluster:
        clients = [await cluster.submit(f"r{i}", 30, 400) for i in range(6)]
        for client in clients:
            await client.until_tokens(5)
        cluster["b"].kill()
        for client in clients:
            await client.until_end()
            assert client.finish_reason == "length"
        assert failures(cluster, InstanceLost) == 1
        await cluster.all_up()


@virtual_time
async def test_orphans_that_the_policy_fails_at_again_get_an_error() -> None:
    """If the policy fails for good on an orphaned request, that request ends with an error; the others go on."""

    def fails(event: Event) -> bool:
        again = isinstance(event, RequestArrived) and event.request_id == "r0" and event.prompt_tokens > 30
        return isinstance(event, InstanceLost) or again

    policy = Failing(fails)
    async with Cluster(policy) as cluster:
        policy.places = {"r0": "b", "r1": "b", "r2": "a"}
        clients = [await cluster.submit(f"r{i}", 30, 400) for i in range(3)]
        for client in clients:
            await client.until_tokens(5)
        cluster["b"].kill()
        for client in clients:
            await client.until_end()
        assert [client.finish_reason for client in clients] == ["error", "length", "length"]
        await cluster.all_up()
        assert policy.view.requests.keys() <= {"r0"}  # it failed at every death, so an entry may remain
        policy.left = 0
        cluster.runtime.announce_loss("b")


@pytest.mark.parametrize("late", [False, True])
@virtual_time
async def test_an_instance_whose_coming_failed_is_announced_again(late: bool) -> None:
    """A policy that fails when the first instances join still gets them, without a restart."""
    policy = Failing(lambda e: isinstance(e, InstanceJoined), late=late, times=4)
    async with Cluster(policy) as cluster:
        client = await cluster.submit("r")
        await client.until_end()
        assert client.finish_reason == "length"
        await cluster.until(lambda: len(policy.view.instances) == 3, "all instances in the policy's books")
        assert not any(len(generation) > 1 for generation in cluster.engines.values())


@virtual_time
async def test_dispatches_that_a_failure_swallowed_are_made_again() -> None:
    """A policy that fails after recording a dispatch does not leave the request waiting for ever."""
    waiting: list[str] = []

    class Holding(Failing):
        """Holds `second` back until `first` ends, then fails before it returns the dispatch."""

        def handle(self, event: Event, now_s: float) -> list[Effect]:
            if isinstance(event, RequestArrived) and event.request_id == "second" and not waiting:
                waiting.append(event.cause)
                self.view.apply(event)
                return []
            if isinstance(event, RequestFinished) and event.request_id == "first":
                self.view.apply(event)
                self.view.carry_out([Dispatch(event.cause, "second", "a")])
                raise RuntimeError("swallowed")
            return super().handle(event, now_s)

    policy = Holding(lambda _: False)
    async with Cluster(policy) as cluster:
        first = await cluster.submit("first", 30, 20)
        second = await cluster.submit("second", 30, 20)
        for client in (first, second):
            await client.until_end()
            assert client.finish_reason == "length"
        assert failures(cluster, RequestFinished) == 2  # it was told a second time


@virtual_time
async def test_an_ended_migration_that_failed_hurts_nobody() -> None:
    """If the policy fails at the end of a move, the request decodes on at the target and completes."""
    async with Cluster(policy := Failing(lambda e: isinstance(e, MigrationEnded), times=1)) as cluster:
        policy.places = {"r": "a"}
        client = await cluster.submit("r", 40, 100)
        await client.until_tokens(5)
        cluster.move("r", "b")
        await client.until_end()
        assert client.finish_reason == "length"
        assert failures(cluster, MigrationEnded) == 1


@virtual_time
async def test_a_timer_that_cannot_be_named_is_a_failure() -> None:
    """A policy that fails when asked for its next timer is still asked as often, and everything else goes on."""
    policy = ScriptedPolicy()
    policy.next_timer_s = lambda: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    async with Cluster(policy) as cluster:
        client = await cluster.submit("r")
        await client.until_end()
        assert (failures(cluster, TimerFired) or 0) > 3

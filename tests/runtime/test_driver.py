"""The policy's driver: order of events and effects, and its timer."""

import asyncio
from collections.abc import Callable, Sequence

from runtime_cluster import Cluster, ScriptedPolicy

from cascadeinfer.core.effects import Dispatch, Effect, SendMessage
from cascadeinfer.core.events import Event, InstanceDraining, MessageReceived, RequestFinished, TimerFired
from cascadeinfer.core.messages import Ask
from cascadeinfer.runtime.driver import PolicyDriver
from support.virtual_time import VirtualTimeLoop, virtual_time


class Scripted:
    """Answers events with a function, and asks to be woken at given times."""

    def __init__(
        self, answer: Callable[[Event], list[Effect]] = lambda _: [], wake_s: list[float] | None = None
    ) -> None:
        """Nothing has happened yet."""
        self.answer = answer
        self.wake_s = wake_s or []
        self.seen: list[tuple[float, Event]] = []

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """See Policy."""
        self.seen.append((now_s, event))
        self.wake_s = [at_s for at_s in self.wake_s if at_s > now_s]
        return self.answer(event)

    def next_timer_s(self) -> float | None:
        """See Policy."""
        return min(self.wake_s, default=None)


def now_s() -> float:
    """Virtual seconds."""
    return asyncio.get_running_loop().time()


@virtual_time
async def test_timers_fire_when_asked() -> None:
    """A policy is woken at each time it names, not earlier, and not once the driver has stopped."""
    policy = Scripted(wake_s=[1.5, 2.0, 9.0])
    driver = PolicyDriver(policy, lambda _: None, now_s)
    driver.emit(InstanceDraining("start", "a"))
    await asyncio.sleep(5.0)
    assert [(at_s, type(event)) for at_s, event in policy.seen] == [
        (0.0, InstanceDraining),
        (1.5, TimerFired),
        (2.0, TimerFired),
    ]
    driver.stop()
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    assert not loop.timers()
    await asyncio.sleep(5.0)
    assert len(policy.seen) == 3


@virtual_time
async def test_an_event_on_the_way_waits_its_turn() -> None:
    """Events that an effect causes at once are handled, in order, after all effects of the current event."""
    log: list[str] = []

    def answer(event: Event) -> list[Effect]:
        log.append(f"event {event.cause}")
        return [Dispatch("x", "r1", "a"), Dispatch("x", "r2", "a")] if event.cause == "first" else []

    def perform(effect: Effect) -> None:
        assert isinstance(effect, Dispatch)
        driver.emit(RequestFinished(effect.request_id, effect.request_id, 0))
        log.append(f"effect {effect.request_id}")

    driver = PolicyDriver(Scripted(answer), perform, now_s)
    driver.emit(RequestFinished("first", "r0", 0))
    assert log == ["event first", "effect r1", "effect r2", "event r1", "event r2"]


@virtual_time
async def test_an_error_does_not_jam_the_driver() -> None:
    """A policy that raises affects neither the caller nor later events; watcher and repairer are told of the event."""
    placed = Dispatch("good", "r", "a")

    def answer(event: Event) -> list[Effect]:
        if event.cause == "bad":
            raise LookupError
        return [placed]

    policy = Scripted(answer)
    seen: list[tuple[str, tuple[Effect, ...], str | None]] = []
    failed: list[str] = []

    def watch(_: float, event: Event, effects: Sequence[Effect], failure: str | None = None) -> None:
        seen.append((event.cause, tuple(effects), failure))

    driver = PolicyDriver(policy, lambda _: None, now_s, failed=lambda e: failed.append(e.cause), observer=watch)
    driver.emit(RequestFinished("bad", "r", 0))
    driver.emit(RequestFinished("good", "r", 0))
    assert [event.cause for _, event in policy.seen] == ["bad", "good"]
    assert seen == [("bad", (), "LookupError"), ("good", (placed,), None)]
    assert failed == ["bad"]


@virtual_time
async def test_an_effect_that_cannot_be_carried_out_costs_no_other() -> None:
    """If starting one effect raises, that counts as a failure at its event; the effects after it are carried out."""
    begun: list[str] = []
    failed: list[Event] = []

    def perform(effect: Effect) -> None:
        assert isinstance(effect, Dispatch)
        begun.append(effect.instance_id)
        if effect.instance_id == "nowhere":
            raise KeyError(effect.instance_id)

    places = ("a", "nowhere", "b")
    policy = Scripted(lambda event: [Dispatch(event.cause, "r", place) for place in places])
    driver = PolicyDriver(policy, perform, now_s, failed=failed.append)
    driver.emit(event := RequestFinished("c", "r", 0))
    assert begun == ["a", "nowhere", "b"]
    assert failed == [event]


@virtual_time
async def test_messages_arrive_once_and_later() -> None:
    """A message between agents arrives exactly once, and not within the event that sent it."""
    policy = ScriptedPolicy()
    async with Cluster(policy) as cluster:
        message = Ask("ask1", "r", 100, "rebalance")
        cluster.do(SendMessage("x", "a", "b", message))
        assert not [e for e in policy.events if isinstance(e, MessageReceived)]
        await asyncio.sleep(0.01)
        (received,) = [e for e in policy.events if isinstance(e, MessageReceived)]
        assert received == MessageReceived("x", "a", "b", message)


@virtual_time
async def test_unknown_requests_are_no_news() -> None:
    """Aborting ids that are not live does nothing."""
    policy = ScriptedPolicy()
    async with Cluster(policy) as cluster:
        n_events = len(policy.events)
        cluster.runtime.abort(["nobody", "nobody"])
        assert len(policy.events) == n_events

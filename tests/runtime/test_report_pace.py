"""How often instances are asked for their load: idle ones rarely, and at once when that matters. In virtual time."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from runtime_cluster import CAPACITY, SUPERVISION, TIMES, Cluster, ScriptedPolicy

from cascadeinfer.core.events import InstanceReport, InstanceReported, InstanceSuspected
from cascadeinfer.engines.protocol import EngineCounters
from cascadeinfer.runtime.report_pace import ReportPace, has_nothing_to_do
from support.virtual_time import virtual_time

PACE = replace(SUPERVISION, report_s=0.1, idle_report_s=1.0, suspect_s=1.0, hang_s=60.0)
ROOMY = replace(CAPACITY, kv_blocks=1024)
NOTHING = InstanceReport((), (), (), (), 0)


def now_s() -> float:
    """Virtual seconds."""
    return asyncio.get_running_loop().time()


def asked(cluster: Cluster, instance_id: str) -> list[float]:
    """From now on, the times at which this instance is asked for its load."""
    times_s: list[float] = []
    engine = cluster[instance_id]
    report: Callable[[], Awaitable[Any]] = engine.report

    def noted() -> Awaitable[Any]:
        times_s.append(now_s())
        return report()

    engine.report = noted  # type: ignore[method-assign,assignment]
    return times_s


@virtual_time
async def test_idle_instances_are_asked_rarely_and_busy_ones_often() -> None:
    """Over ten seconds: the instance with a request ten times a second, the one without once; later both once."""
    policy = ScriptedPolicy({"r": "a"})
    async with Cluster(policy, capacity=ROOMY, supervision=PACE) as cluster:
        n_tokens = round(12.0 / TIMES.step_s)
        client = await cluster.submit("r", 40, n_tokens)
        await asyncio.sleep(1.5)
        at_a, at_b = asked(cluster, "a"), asked(cluster, "b")
        await asyncio.sleep(9.95)
        assert len(client.token_ids) < n_tokens
        assert 90 <= len(at_a) <= 100
        assert 9 <= len(at_b) <= 10
        await client.until_end()
        await asyncio.sleep(1.5)
        at_a.clear()
        policy.events.clear()
        await asyncio.sleep(9.95)
        assert 9 <= len(at_a) <= 10
        reports = [event.report for event in policy.events if isinstance(event, InstanceReported)]
        assert {report.intervals for report in reports} == {10}, "each stands for ten of a busy instance"


@virtual_time
async def test_a_new_request_is_followed_by_a_question() -> None:
    """An idle instance that gets a request is asked in the same moment, then at the busy interval."""
    policy = ScriptedPolicy({"r": "a"})
    async with Cluster(policy, supervision=PACE) as cluster:
        await asyncio.sleep(3.55)
        at_a, at_b = asked(cluster, "a"), asked(cluster, "b")
        client = await cluster.submit("r", 40, 60)
        sent_s = now_s()
        await asyncio.sleep(0.45)
        assert at_a[0] - sent_s < PACE.report_s
        assert len(at_a) >= 4
        assert len(at_b) <= 1
        await client.until_end()


@pytest.mark.parametrize("idle_report_s", [0.1, 1.0])
@virtual_time
async def test_silence_is_found_as_fast_as_by_asking_all_the_time(idle_report_s: float) -> None:
    """A request sent to an idle instance that has just hung is withdrawn within the limit, and ends elsewhere."""
    policy = ScriptedPolicy({"r": "a"})
    async with Cluster(policy, supervision=replace(PACE, idle_report_s=idle_report_s)) as cluster:
        await asyncio.sleep(3.55)
        cluster["a"].freeze()
        client = await cluster.submit("r", 40, 20)
        sent_s = now_s()
        await cluster.until(lambda: any(isinstance(event, InstanceSuspected) for event in policy.events))
        assert now_s() - sent_s <= PACE.suspect_s + PACE.report_s + 0.05
        await client.until_end()
        cluster["a"].thaw()
        await cluster.until(lambda: all(not record.suspect for record in cluster.runtime.fleet))


@virtual_time
async def test_a_suspect_is_asked_until_it_answers_in_time() -> None:
    """An idle instance that was silent is trusted again soon after it goes on, not an idle interval later."""
    async with Cluster(supervision=replace(PACE, idle_report_s=30.0)) as cluster:
        await asyncio.sleep(3.0)
        await cluster.submit("r", 40, 20)  # somewhere: at a, which is first
        cluster["a"].freeze()
        await cluster.until(lambda: cluster.runtime.fleet["a"].suspect)
        cluster["a"].thaw()
        thawed_s = now_s()
        await cluster.until(lambda: not cluster.runtime.fleet["a"].suspect)
        assert now_s() - thawed_s <= 3 * PACE.report_s
        await cluster.clients["r"].until_end()


@virtual_time
async def test_all_are_asked_when_one_dies() -> None:
    """What was on the dead one goes to instances that have answered since, so they are asked at once."""
    async with Cluster(supervision=replace(PACE, idle_report_s=30.0)) as cluster:
        await asyncio.sleep(3.0)
        at_b = asked(cluster, "b")
        cluster["a"].kill()
        await cluster.until(lambda: not cluster.runtime.fleet["a"].engine)
        died_s = now_s()
        await asyncio.sleep(0.2)
        assert at_b
        assert at_b[0] - died_s <= PACE.report_s
        await cluster.all_up()


@virtual_time
async def test_what_an_instance_holds_keeps_it_watched() -> None:
    """An instance without requests that holds room for one that is coming is asked like a busy one."""
    async with Cluster(supervision=PACE) as cluster:
        await asyncio.sleep(3.0)
        assert await cluster["a"].reserve("somebody", 64) is None
        await asyncio.sleep(1.1)
        at_a = asked(cluster, "a")
        await asyncio.sleep(0.95)
        assert len(at_a) >= 9
        await cluster["a"].release_reservation("somebody")


def test_nothing_to_do() -> None:
    """Requests of any process, anything held, or a dead side channel are something to do."""
    counters = EngineCounters(steps=7, held_blocks={"pins": 0})
    assert has_nothing_to_do(NOTHING, counters)
    assert not has_nothing_to_do(replace(NOTHING, foreign_waiting_tokens=(5,)), counters)
    assert not has_nothing_to_do(replace(NOTHING, waiting_ids=("r",), waiting_tokens=(5,)), counters)
    for busy in ({"reserved": 1}, {"pinned": 1}, {"held_blocks": {"unfreed": 2}}, {"listens": False}):
        assert not has_nothing_to_do(NOTHING, replace(counters, **busy))


async def rest_of(pace: ReportPace) -> float:
    """How long it waits before the next question."""
    began_s = now_s()
    await pace.wait()
    return now_s() - began_s


@virtual_time
async def test_two_equal_reports_of_nothing_make_it_quiet() -> None:
    """The third report of nothing is followed by a long pause; news, a late answer or a wake-up end that."""
    pace, counters = ReportPace(0.1, 1.0), EngineCounters()
    rests = []
    for _ in range(4):
        pace.reported(NOTHING, counters)
        rests.append(await rest_of(pace))
    assert rests == pytest.approx([0.1, 0.1, 1.0, 1.0])
    pace.reported(NOTHING, replace(counters, steps=3))  # it has worked and finished in between
    assert await rest_of(pace) == pytest.approx(0.1)
    pace.reported(NOTHING, replace(counters, steps=3))
    assert await rest_of(pace) == pytest.approx(1.0)
    pace.reported(NOTHING, replace(counters, steps=3), in_time=False)
    assert await rest_of(pace) == pytest.approx(0.1)


@virtual_time
async def test_a_wake_up_ends_the_pause_but_not_the_busy_interval() -> None:
    """Woken late in a pause, it asks at once; woken early, when the busy interval since the last answer has passed."""
    pace, counters = ReportPace(0.1, 1.0), EngineCounters()
    loop = asyncio.get_running_loop()
    for woken_s, waited_s in ((0.7, 0.7), (0.03, 0.1)):
        for _ in range(3):
            pace.reported(NOTHING, counters)
        loop.call_later(woken_s, pace.wake)
        assert await rest_of(pace) == pytest.approx(waited_s)
        for _ in range(2):  # the first question may have overtaken the request
            pace.reported(NOTHING, counters)
            assert await rest_of(pace) == pytest.approx(0.1)


@virtual_time
async def test_an_idle_interval_below_the_busy_one_counts_as_that() -> None:
    """Nobody is asked more often for being idle."""
    pace = ReportPace(0.5, 0.1)
    for _ in range(3):
        pace.reported(NOTHING, EngineCounters())
    assert await rest_of(pace) == pytest.approx(0.5)

"""
How often instances are asked for their load: idle ones rarely, and at once when that matters; ones that step not at
all, because their load comes along with their outputs. In virtual time.
"""

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
    report: Callable[[float | None], Awaitable[Any]] = engine.report

    def noted(next_after_s: float | None = None) -> Awaitable[Any]:
        times_s.append(now_s())
        return report(next_after_s)

    engine.report = noted  # type: ignore[method-assign,assignment]
    return times_s


def reports_of(policy: ScriptedPolicy, instance_id: str) -> list[InstanceReport]:
    """Those that the policy has seen."""
    seen = [event for event in policy.events if isinstance(event, InstanceReported)]
    return [event.report for event in seen if event.instance_id == instance_id]


@virtual_time
async def test_the_load_of_busy_ones_comes_along_and_idle_ones_are_asked_rarely() -> None:
    """Over ten seconds: the one with a request is never asked and reports all the time; idle ones are, once each."""
    policy = ScriptedPolicy({"r": "a"})
    async with Cluster(policy, capacity=ROOMY, supervision=PACE) as cluster:
        n_tokens = round(12.0 / TIMES.step_s)
        client = await cluster.submit("r", 40, n_tokens)
        await asyncio.sleep(1.5)
        at_a, at_b = asked(cluster, "a"), asked(cluster, "b")
        policy.events.clear()
        await asyncio.sleep(9.95)
        assert len(client.token_ids) < n_tokens
        assert at_a == []
        told = reports_of(policy, "a")
        assert 88 <= len(told) <= 100
        lengths = [report.running_tokens[0] for report in told]
        assert lengths == sorted(set(lengths)), "each tells of more tokens than the one before"
        assert {report.intervals for report in told} == {1}
        assert 9 <= len(at_b) <= 10
        await client.until_end()
        await asyncio.sleep(1.5)
        at_a.clear()
        policy.events.clear()
        await asyncio.sleep(9.95)
        assert 9 <= len(at_a) <= 10
        for name in "abc":
            assert {r.intervals for r in reports_of(policy, name)} == {10}, "each stands for ten of a busy instance"


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
        assert len(at_a) >= 2, "the first may have overtaken the request"
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


@pytest.mark.parametrize("is_busy", [False, True])
@virtual_time
async def test_all_are_asked_when_one_dies(is_busy: bool) -> None:
    """What was on the dead one goes to instances that have answered since, so they are asked at once; busy ones too."""
    policy = ScriptedPolicy({"r": "b"})
    async with Cluster(policy, capacity=ROOMY, supervision=replace(PACE, idle_report_s=30.0)) as cluster:
        if is_busy:
            await cluster.submit("r", 40, 600)
        await asyncio.sleep(3.0)
        at_b = asked(cluster, "b")
        await asyncio.sleep(0.5)
        assert at_b == []
        cluster["a"].kill()
        await cluster.until(lambda: not cluster.runtime.fleet["a"].engine)
        died_s = now_s()
        await asyncio.sleep(0.2)
        assert at_b
        assert at_b[0] - died_s <= PACE.report_s
        await cluster.all_up()
        if is_busy:
            await cluster.clients["r"].until_end()


@virtual_time
async def test_the_silence_of_a_busy_instance_is_found_as_fast_as_by_asking_all_the_time() -> None:
    """One that stops in the middle of its requests is suspected within the limit after its next report was due."""
    policy = ScriptedPolicy({"r": "a"})
    async with Cluster(policy, capacity=ROOMY, supervision=PACE) as cluster:
        client = await cluster.submit("r", 40, 1900)
        await asyncio.sleep(3.0)
        at_a = asked(cluster, "a")
        for pause_s in (0.0, 0.03, 0.07):  # anywhere between two reports
            await asyncio.sleep(pause_s)
            assert at_a == [], "its load comes by itself"
            cluster["a"].freeze()
            frozen_s = now_s()
            await cluster.until(lambda: cluster.runtime.fleet["a"].suspect)
            assert now_s() - frozen_s <= PACE.report_s + PACE.suspect_s + 0.05
            cluster["a"].thaw()
            await cluster.until(lambda: not cluster.runtime.fleet["a"].suspect)
            await asyncio.sleep(1.0)
            at_a.clear()
            await asyncio.sleep(5.0)  # it is forgotten that an answer took so long
        await client.until_end()


@virtual_time
async def test_a_busy_instance_that_sends_no_outputs_is_asked() -> None:
    """After a lull: long before its silence would make it suspect, and often enough for the policy."""
    policy = ScriptedPolicy({"r": "a"})
    async with Cluster(policy, capacity=ROOMY, supervision=PACE) as cluster:
        client = await cluster.submit("r", 40, 100)
        await asyncio.sleep(0.5)
        cluster["a"].pause()
        at_a = asked(cluster, "a")
        await asyncio.sleep(3.0)
        assert 8 <= len(at_a) <= 10
        assert not cluster.runtime.fleet["a"].suspect
        cluster["a"].unpause()
        await client.until_end()


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
async def test_loads_that_come_by_themselves_put_the_question_off() -> None:
    """A question follows a lull of three intervals, and says that the answer has been due for two of them."""
    pace, counters = ReportPace(0.1, 1.0), EngineCounters()
    loop = asyncio.get_running_loop()
    busy = replace(NOTHING, running_ids=("r",), running_tokens=(40,))
    pace.reported(busy, counters)
    for number in range(1, 6):
        loop.call_later(0.11 * number, pace.came, busy, counters)
    began_s = now_s()
    assert await pace.wait() == pytest.approx(0.2)
    assert now_s() - began_s == pytest.approx(0.55 + 0.3)
    loop.call_later(0.11, pace.came, NOTHING, counters)  # the last request has ended
    assert await rest_of(pace) == pytest.approx(0.11)


@virtual_time
async def test_who_must_answer_is_asked_although_its_load_comes_by_itself() -> None:
    """Twice: the first question may have been on its way already. A load that comes does not count as an answer."""
    pace, counters = ReportPace(0.1, 1.0), EngineCounters()
    loop = asyncio.get_running_loop()
    busy = replace(NOTHING, running_ids=("r",), running_tokens=(40,))
    pace.reported(busy, counters)
    loop.call_later(0.15, pace.wake)
    loop.call_later(0.2, lambda: pace.wake(must_answer=True))
    loop.call_later(0.2, pace.came, busy, counters)
    assert await rest_of(pace) == pytest.approx(0.2)
    for wanted_s in (0.1, 0.3):
        pace.reported(busy, counters)
        assert await rest_of(pace) == pytest.approx(wanted_s)


@virtual_time
async def test_a_late_one_is_asked_until_it_answers_in_time() -> None:
    """What comes unasked does not show that it answers."""
    pace, counters = ReportPace(0.1, 1.0), EngineCounters()
    busy = replace(NOTHING, running_ids=("r",), running_tokens=(40,))
    pace.reported(busy, counters, in_time=False)
    asyncio.get_running_loop().call_later(0.05, pace.came, busy, counters)
    assert await rest_of(pace) == pytest.approx(0.1)
    pace.reported(busy, counters)
    assert await rest_of(pace) == pytest.approx(0.3)


@virtual_time
async def test_a_quiet_one_that_gets_work_from_elsewhere_is_quiet_no_more() -> None:
    """Its load comes along with another front end's outputs: the long pause ends, and the next lull begins there."""
    pace, counters = ReportPace(0.1, 1.0), EngineCounters()
    foreign = replace(NOTHING, foreign_running_tokens=(40,))
    for _ in range(3):
        pace.reported(NOTHING, counters)
    asyncio.get_running_loop().call_later(0.5, pace.came, foreign, counters)
    assert await rest_of(pace) == pytest.approx(0.5 + 0.3)


@virtual_time
async def test_an_idle_interval_below_the_busy_one_counts_as_that() -> None:
    """Nobody is asked more often for being idle."""
    pace = ReportPace(0.5, 0.1)
    for _ in range(3):
        pace.reported(NOTHING, EngineCounters())
    assert await rest_of(pace) == pytest.approx(0.5)

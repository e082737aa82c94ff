"""Time limits exclude the time during which this process was stopped."""

import asyncio
import math

import pytest

from cascadeinfer.engines.patience import Alarm, within
from support.virtual_time import VirtualTimeLoop, virtual_time


def stall(seconds: float) -> None:
    """Stop the process for this long."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    loop.stall(seconds)


def now_s() -> float:
    """The loop's virtual time in seconds."""
    return asyncio.get_running_loop().time()


@virtual_time
async def test_an_answer_an_error_and_none() -> None:
    """Results and errors are passed on; what takes longer than the limit is cancelled."""
    assert await within(1.0, asyncio.sleep(0.5, "answer")) == "answer"
    assert await within(math.inf, asyncio.sleep(1e3, "late")) == "late"

    async def fail() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        await within(1.0, fail())
    never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    before_s = now_s()
    with pytest.raises(TimeoutError):
        await within(60.0, never)
    assert now_s() - before_s == pytest.approx(60.0)
    assert never.cancelled()
    with pytest.raises(TimeoutError):
        await within(0.0, asyncio.sleep(1.0))
    assert await within(0.0, asyncio.sleep(0, "at once")) == "at once"


@virtual_time
async def test_after_a_sleep_the_answer_is_still_waited_for() -> None:
    """An answer sent during the sleep is received; without one, the full limit starts again."""
    answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    slept: list[float] = []
    waiting = asyncio.ensure_future(within(60.0, answer, slept.append))
    await asyncio.sleep(50.0)
    stall(48.0)
    await asyncio.sleep(59.0)
    assert not waiting.done()
    assert slept == [pytest.approx(44.0, abs=6.1)]
    answer.set_result("here")
    assert await waiting == "here"


@virtual_time
async def test_after_a_sleep_the_limit_holds_again() -> None:
    """A peer that stays silent is still detected."""
    never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    waiting = asyncio.ensure_future(within(60.0, never))
    await asyncio.sleep(30.0)
    stall(1000.0)
    resumed_s = now_s()
    with pytest.raises(TimeoutError):
        await waiting
    assert now_s() - resumed_s == pytest.approx(60.0, abs=0.1)


@virtual_time
async def test_who_waits_can_be_cancelled() -> None:
    """The awaited operation is cancelled with its waiter."""
    never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    waiting = asyncio.ensure_future(within(60.0, never))
    await asyncio.sleep(1.0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert never.cancelled()


@virtual_time
async def test_an_alarm_that_was_slept_over_is_set_again() -> None:
    """It rings after its delay; if that fell into a sleep, after one more full delay; never when cancelled."""
    rung_s: list[float] = []
    Alarm(10.0, lambda: rung_s.append(now_s()))
    await asyncio.sleep(11.0)
    assert rung_s == [pytest.approx(10.0)]
    Alarm(10.0, lambda: rung_s.append(now_s()))
    Alarm(10.0, lambda: rung_s.append(-1.0)).cancel()
    await asyncio.sleep(1.0)
    stall(48.0)
    await asyncio.sleep(9.0)
    assert len(rung_s) == 1
    await asyncio.sleep(2.0)
    assert rung_s[1:] == [pytest.approx(70.0)]

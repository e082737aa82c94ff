"""Starts on shared devices come one after the other; others do not wait. Simulated starts on a virtual clock."""

import asyncio
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeinfer.cluster.start_turns import StartTurns
from cascadeinfer.core.errors import EngineError
from support.virtual_time import VirtualTimeLoop, run, virtual_time

LIMIT_S = 600.0
HANGS_S = 3000.0
EVENTUALLY_S = 100_000.0


@dataclass(slots=True)
class Start:
    """One start: what it needs, when it arrives, how long it takes; then when it began and was over."""

    devices: str
    arrives_s: float
    takes_s: float
    begun_s: float = -1.0
    over_s: float = -1.0


def now_s() -> float:
    """The virtual clock."""
    return asyncio.get_running_loop().time()


async def simulate(starts: list[Start]) -> list[Start]:
    """All starts, each as a launcher makes it; returns them in the order of their arrival."""
    turns = StartTurns(LIMIT_S)
    arrived: list[Start] = []

    async def one(number: int, start: Start) -> None:
        await asyncio.sleep(start.arrives_s)
        arrived.append(start)
        turn = turns.arrive(str(number), start.devices)
        await turns.come(turn)
        start.begun_s = now_s()
        await asyncio.sleep(start.takes_s)
        start.over_s = now_s()
        turns.leave(turn)

    await asyncio.gather(*(one(number, start) for number, start in enumerate(starts)))
    return arrived


STARTS = st.builds(
    Start,
    devices=st.sampled_from(["0", "1", "2", "0,1", "1,2"]),
    arrives_s=st.integers(0, 300).map(float),
    takes_s=st.one_of(st.integers(1, 500).map(float), st.just(HANGS_S)),
)


@given(st.lists(STARTS, max_size=8))
def test_starts_on_a_device_are_one_by_one(starts: list[Start]) -> None:
    """
    All begin. Two that share a device overlap only after the first has had its full time, and begin in order of
    arrival; one that nobody is in the way of begins at once.
    """
    in_order = run(simulate(starts), limit_s=EVENTUALLY_S)
    assert len(in_order) == len(starts)
    for number, start in enumerate(in_order):
        needed = set(start.devices.split(","))
        earlier = [other for other in in_order[:number] if needed & set(other.devices.split(","))]
        for other in earlier:
            assert start.begun_s >= min(other.over_s, other.begun_s + LIMIT_S) - 1e-6
        if all(other.over_s < start.arrives_s for other in earlier):
            assert start.begun_s == start.arrives_s


@virtual_time
async def test_a_start_that_hangs_holds_the_next_up_for_a_limited_time() -> None:
    """Then the next one begins; the one after waits for that, not for the hung one."""
    starts = [Start("0", 0.0, HANGS_S), Start("0", 100.0, 50.0), Start("0", 100.0, 50.0)]
    await simulate(starts)
    begun_s = [start.begun_s for start in starts]
    assert begun_s == [0.0, pytest.approx(700.0, abs=61.0), pytest.approx(begun_s[1] + 50.0)]


@virtual_time
async def test_who_has_left_is_not_waited_for() -> None:
    """A start that is given up while it waits, or stopped, ends with an error and holds nobody up."""
    turns = StartTurns(LIMIT_S)
    first, given_up, stopped, last = (turns.arrive(name, "0") for name in "abcd")
    await turns.come(first)
    waiting = [asyncio.ensure_future(turns.come(turn)) for turn in (given_up, stopped, last)]
    await asyncio.sleep(1.0)
    assert turns.in_the_way_of(last) is first
    waiting[0].cancel()
    turns.leave(stopped)
    await asyncio.sleep(1.0)
    assert waiting[0].cancelled()
    assert isinstance(waiting[1].exception(), EngineError)
    assert not waiting[2].done()
    turns.leave(first)
    turns.leave(first)
    await waiting[2]
    assert last.begun


@virtual_time
async def test_our_own_sleep_does_not_count() -> None:
    """A front end that was suspended gives the start that is under way its full time again."""
    turns = StartTurns(LIMIT_S)
    first, second = turns.arrive("a", "0"), turns.arrive("b", "0")
    await turns.come(first)
    waiting = asyncio.ensure_future(turns.come(second))
    await asyncio.sleep(1.0)
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    loop.stall(2 * LIMIT_S)
    await asyncio.sleep(LIMIT_S / 2)
    assert not waiting.done()
    turns.leave(first)
    await waiting

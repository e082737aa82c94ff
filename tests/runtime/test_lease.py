"""
The lease: whoever is late, no pull whose data is used reads blocks after their pin has ended.

The front end, the source and the target are each paused for a while at any moment of a move. A paused front end hears
nothing and its timers fire late; when it resumes, the pending messages and timers arrive in either order. `Cluster`
checks every token and, at the end, that no instance has used a pull that finished after the lease.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from runtime_cluster import MIGRATION, Client, Cluster, ScriptedPolicy

from cascadeinfer.core.events import MigrationEnded
from cascadeinfer.core.migration import Happening, State
from cascadeinfer.core.refusals import Refusal
from cascadeinfer.engines.simulated import SimulatedTimes
from cascadeinfer.runtime.supervise import SupervisionTimes
from support.virtual_time import run, virtual_time

PATIENT = SupervisionTimes(hang_s=600.0)
"""No instance is killed for being late: the tests look for lease violations, not for the recovery."""
COMMANDS = ("reserve", "cut", "undo_cut", "release_pin", "release_reservation")
MANY_STEPS = 20
"""Event loop turns within which everything queued is handled."""


class FrontEndStop:
    """Pauses a cluster's front end: while stopped it receives nothing, and its timers fire late."""

    def __init__(self, cluster: Cluster) -> None:
        """The front end runs."""
        self._cluster = cluster
        self._is_stopped = False
        self._late_timers: list[str] = []
        self._happen = cluster.runtime._migrator.happen
        cluster.runtime._migrator.happen = self._happen_unless_stopped  # type: ignore[method-assign]

    def _happen_unless_stopped(self, migration_id: str, happening: Happening, refusal: Refusal | None = None) -> None:
        if self._is_stopped and happening is Happening.TIMED_OUT:
            self._late_timers.append(migration_id)
        else:
            self._happen(migration_id, happening, refusal)

    def stop(self) -> None:
        """Pause from now on."""
        self._is_stopped = True
        for name in "ab":
            self._cluster[name].hold_outputs()
            for command in COMMANDS:
                self._cluster[name].hold_answers(command)

    async def go_on(self, *, timers_first: bool) -> None:
        """Handle everything that waits, the overdue timers before or after the rest."""
        self._is_stopped = False
        if timers_first:
            self._fire()
        for name in "ab":
            self._cluster[name].release_outputs()
            for command in COMMANDS:
                self._cluster[name].release_answers(command)
        for _ in range(MANY_STEPS):
            await asyncio.sleep(0)
        self._fire()

    def _fire(self) -> None:
        """The timer of a state that is over was cancelled: it does not fire, however late."""
        for migration_id in self._late_timers:
            record = self._cluster.runtime._migrator._records.get(migration_id)
            if record is not None and record.timer is not None and record.timer.when() <= self._now_s():
                self._happen(migration_id, Happening.TIMED_OUT)
        self._late_timers.clear()

    @staticmethod
    def _now_s() -> float:
        return asyncio.get_running_loop().time()


@dataclass(frozen=True)
class Stop:
    """A pause: how long after the start of the move it begins, and how long it lasts."""

    after_s: float
    for_s: float

    async def of_front_end(self, cluster: Cluster, *, timers_first: bool) -> None:
        """Stop the front end."""
        front_end = FrontEndStop(cluster)
        await asyncio.sleep(self.after_s)
        front_end.stop()
        await asyncio.sleep(self.for_s)
        await front_end.go_on(timers_first=timers_first)

    async def of(self, cluster: Cluster, name: str) -> None:
        """Stop an instance."""
        await asyncio.sleep(self.after_s)
        cluster[name].freeze()
        await asyncio.sleep(self.for_s)
        cluster[name].thaw()


@contextmanager
def of_one_move() -> Iterator[ScriptedPolicy]:
    """The policy has ended exactly one migration afterwards."""
    policy = ScriptedPolicy({"r": "a"})
    yield policy
    assert len(policy.ended_migrations()) == 1


async def move(front_end: Stop, source: Stop, target: Stop, *, pull_s: float, timers_first: bool) -> MigrationEnded:
    """Move a request while each party is paused for a while; returns how the migration ended."""
    times = SimulatedTimes(pull_s=pull_s)
    with of_one_move() as policy:
        async with Cluster(policy, "ab", times=times, supervision=PATIENT) as cluster:
            client: Client = await cluster.submit("r", 100, 60)
            await client.until_tokens(5)
            cluster.move("r", "b")
            await asyncio.gather(
                front_end.of_front_end(cluster, timers_first=timers_first),
                source.of(cluster, "a"),
                target.of(cluster, "b"),
            )
            await client.until_end()
            assert client.finish_reason == "length"
    return policy.ended_migrations()[0]


NEVER = Stop(0.0, 0.0)
STOPS = st.builds(
    Stop,
    st.one_of(st.integers(0, 60).map(lambda n: n / 1000), st.floats(0, 12)),
    st.one_of(st.just(0.0), st.sampled_from([1.0, 4.7, 6.9, 7.05, 9.9, 10.05, 10.4]), st.floats(0, 12)),
)


@settings(max_examples=150, deadline=None)
@given(STOPS, STOPS, STOPS, st.sampled_from([0.015, 0.5, 3.0, 6.9, 11.0]), st.booleans())
@example(Stop(0.015, 4.7), NEVER, Stop(0.03, 10.4), 0.015, True)
@example(Stop(0.03, 10.6), NEVER, Stop(0.03, 10.4), 0.015, False)
def test_no_pull_that_is_used_is_over_after_the_lease(
    front_end: Stop, source: Stop, target: Stop, pull_s: float, timers_first: bool
) -> None:
    """Whoever is paused, when and for how long, the text is right and no block is used after its pin has ended."""
    run(move(front_end, source, target, pull_s=pull_s, timers_first=timers_first))


@pytest.mark.parametrize(
    ("front_end", "target", "outcome", "detail"),
    [
        pytest.param(NEVER, NEVER, "moved", "", id="nobody late"),
        pytest.param(Stop(0.015, 4.7), NEVER, "moved", "", id="front end late"),
        pytest.param(NEVER, Stop(0.03, 6.0), "moved", "", id="target late"),
        pytest.param(Stop(0.015, 4.7), Stop(0.03, 10.4), "stayed", "timed_out", id="both late"),
        pytest.param(Stop(0.03, 7.2), NEVER, "stayed", "timed_out", id="token heard too late"),
    ],
)
def test_how_it_ends(front_end: Stop, target: Stop, outcome: str, detail: str) -> None:
    """The deadline is seven seconds after the cut was sent; anything heard later is not used, in any order."""
    for timers_first in (False, True):
        ended = run(move(front_end, NEVER, target, pull_s=0.015, timers_first=timers_first))
        assert (ended.outcome.value, ended.detail) == (outcome, detail)


def test_a_cut_that_is_heard_too_late() -> None:
    """With less time left than a pull needs, the source takes the request back, even if its timer fires first."""
    for timers_first, end in ((False, ("stayed", "cut_late")), (True, ("stayed", "timed_out"))):
        ended = run(move(Stop(0.015, 6.9), NEVER, NEVER, pull_s=0.015, timers_first=timers_first))
        assert (ended.outcome.value, ended.detail) == end


@virtual_time
async def test_a_pull_that_ends_late_is_not_used() -> None:
    """A target paused during its pull until the lease is over recomputes the KV cache itself."""
    with of_one_move() as policy:
        async with Cluster(policy, "ab", times=SimulatedTimes(pull_s=1.0), supervision=PATIENT) as cluster:
            client = await cluster.submit("r", 100, 60)
            await client.until_tokens(5)
            stop = FrontEndStop(cluster)  # otherwise it tells the target to recompute before the target finds out
            cluster.move("r", "b")
            await cluster.until(lambda: cluster["b"].core.pulls == 1, "the pull has begun")
            stop.stop()
            cluster["b"].freeze()
            await asyncio.sleep(cluster["a"].times.lease_s)
            cluster["b"].thaw()
            await cluster.until(lambda: cluster["b"].core.failed_pulls == 1, "the pull is found to be late")
            assert cluster["b"].core.running, "it decodes from a KV cache of its own"
            await stop.go_on(timers_first=False)
            await client.until_end()


@virtual_time
async def test_the_deadline_is_counted_from_the_cut() -> None:
    """The target's deadline is the time of the cut plus the limit, however late the front end hears of the cut."""
    with of_one_move() as policy:
        async with Cluster(policy, "ab", supervision=PATIENT) as cluster:
            client = await cluster.submit("r", 100, 60)
            await client.until_tokens(5)
            cluster["a"].hold_outputs()
            cluster["b"].pause()
            cluster.move("r", "b")
            await cluster.until(lambda: cluster.migration("r").state is State.CUTTING, "cut")
            sent_s = asyncio.get_running_loop().time()
            await asyncio.sleep(4.0)
            cluster["a"].release_outputs()
            await cluster.until(lambda: bool(cluster["b"].core.waiting), "resumed")
            (sequence,) = cluster["b"].core.waiting
            assert sent_s - 0.02 <= sequence.pull_before_s - MIGRATION.resume_s <= sent_s
            cluster["b"].unpause()
            await client.until_end()

"""
Every (state, event) pair of the migration table, forced on a running runtime.

`reach` brings the migration of a request from instance a to b into a state and freezes it there; `HAPPEN` triggers the
event. After each: the pair has occurred, the client has received exactly its tokens, and nothing is left on any
instance (`Cluster`).
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import pytest
from runtime_cluster import Client, Cluster, ScriptedPolicy

from cascadeinfer.core.events import MigrationOutcome
from cascadeinfer.core.migration import IGNORED, OUTCOMES, TRANSITIONS, Happening, MigrationLimits, State
from cascadeinfer.core.refusals import Refusal
from support.virtual_time import virtual_time

N_OUTPUT = 60
LIMITS = MigrationLimits(ask_s=1.0, cut_s=0.3, resume_s=0.6)
NO_TIMER = {(state, Happening.TIMED_OUT) for state in (State.WITHDRAWING, State.RECOMPUTING, State.RETURNING)}
"""Ignored by the table, and the runtime sets no timer in these states, so they cannot be forced."""
NOBODY_COMPUTES_IT = {(State.PARKED, Happening.REQUEST_ENDED)}
"""A parked request cannot end by itself."""
PAIRS = sorted(
    (TRANSITIONS.keys() | IGNORED) - NO_TIMER - NOBODY_COMPUTES_IT, key=lambda pair: (pair[0].value, pair[1].value)
)
OPEN = [state for state in State if state not in OUTCOMES]


@dataclass
class Scene:
    """Request `r` on instance a, which is to move to b; c stands by."""

    cluster: Cluster
    client: Client

    async def in_state(self, state: State) -> None:
        """Wait until the migration is in this state."""

        def there() -> bool:
            migration = self.cluster.migration("r")
            return migration is not None and migration.state is state

        await self.cluster.until(there, state.value)

    async def asking(self) -> None:
        """The target's answer is held back."""
        self.cluster["b"].hold_answers("reserve")
        self.cluster.move("r", "b")
        await self.in_state(State.ASKING)
        await asyncio.sleep(0.02)

    async def parked(self) -> None:
        """The request is parked, and the target's answer is held back."""
        self.cluster["b"].hold_answers("reserve")
        self.cluster.move("r", "b")
        await self.in_state(State.PARKED)
        await asyncio.sleep(0.02)

    async def copying(self) -> None:
        """The target reads, but its answer is held back."""
        self.cluster["b"].hold_answers("precopy")
        self.cluster.move("r", "b")
        await self.in_state(State.COPYING)
        await asyncio.sleep(0.02)

    async def cutting(self) -> None:
        """The source is paused."""
        self.cluster["a"].pause()
        self.cluster.move("r", "b")
        await self.in_state(State.CUTTING)
        await asyncio.sleep(0.02)

    async def withdrawing(self) -> None:
        """The cut has timed out; the answer to undoing it is held back."""
        self.cluster["a"].hold_answers("undo_cut")
        await self.cutting()
        await self.in_state(State.WITHDRAWING)

    async def withdrawing_in_vain(self) -> None:
        """The cut has taken effect, but its output is held back and it has timed out."""
        self.cluster["a"].hold_outputs()
        self.cluster.move("r", "b")
        await self.in_state(State.WITHDRAWING)

    async def resuming(self) -> None:
        """The target is paused."""
        self.cluster["b"].pause()
        self.cluster.move("r", "b")
        await self.in_state(State.RESUMING)

    async def recomputing(self) -> None:
        """The target is paused, and there was nothing to pull."""
        self.cluster["a"].spoil_cut()
        self.cluster["b"].pause()
        self.cluster.move("r", "b")
        await self.in_state(State.RECOMPUTING)

    async def returning(self) -> None:
        """The source takes the request back but does not step."""
        await self.withdrawing_in_vain()
        self.cluster["a"].pause()
        self.cluster["a"].release_outputs()
        await self.in_state(State.RETURNING)
        await asyncio.sleep(0.02)

    async def reach(self, state: State) -> None:
        """Bring the migration into this state."""
        await getattr(self, state.value)()

    def thaw(self) -> None:
        """Let everything go on."""
        for name in "abc":
            engine = self.cluster[name]
            for command in ("reserve", "precopy", "cut", "undo_cut"):
                engine.release_answers(command)
            engine.release_outputs()
            engine.unpause()
            engine.thaw()

    def has(self, state: State) -> str:
        """The instance that holds the request in this state."""
        return "b" if state in {State.RESUMING, State.RECOMPUTING} else "a"


async def room_granted(scene: Scene, _: State) -> None:
    """The held-back answer arrives."""
    scene.thaw()


async def room_refused(scene: Scene, _: State) -> None:
    """The target refuses."""
    scene.cluster["b"].refuse_room(Refusal.NO_BLOCKS)
    scene.cluster.move("r", "b")


async def not_copied(scene: Scene, _: State) -> None:
    """The source has given the blocks to others."""
    scene.cluster["a"].lose_pins()
    scene.thaw()


async def cut_done(scene: Scene, state: State) -> None:
    """The cut takes effect (in WITHDRAWING: its held-back output arrives)."""
    if state is State.WITHDRAWING:
        await scene.withdrawing_in_vain()
    else:
        scene.cluster.move("r", "b")
        await scene.in_state(State.RESUMING)
    scene.thaw()


async def cut_empty(scene: Scene, state: State) -> None:
    """The cut takes effect without a KV cache to pull."""
    scene.cluster["a"].spoil_cut()
    await cut_done(scene, state) if state is State.WITHDRAWING else scene.cluster.move("r", "b")


async def cut_late(scene: Scene, state: State) -> None:
    """The cut's output comes with no lease time left; in CUTTING the front end was paused, so its timer is late too."""
    if state is State.WITHDRAWING:
        await scene.withdrawing_in_vain()
    else:
        scene.cluster["a"].hold_outputs()
        scene.cluster.move("r", "b")
        await scene.in_state(State.CUTTING)
        (record,) = scene.cluster.runtime._migrator._records.values()
        assert record.timer is not None
        record.timer.cancel()
    await asyncio.sleep(LIMITS.resume_s)
    scene.thaw()


async def pin_lost(scene: Scene, _: State) -> None:
    """The lease is over before it is renewed."""
    scene.cluster["a"].lose_pins()
    scene.cluster.move("r", "b")


async def cut_refused(scene: Scene, state: State) -> None:
    """The request is about to end."""
    await scene.client.until_tokens(N_OUTPUT - 1)
    scene.cluster["a"].pause()
    scene.cluster["a"].hold_answers("cut")
    scene.cluster["a"].hold_answers("undo_cut")
    scene.cluster.move("r", "b")
    await scene.in_state(state)
    scene.cluster["a"].release_answers("cut")
    await asyncio.sleep(0.01)
    scene.thaw()


async def go_on(scene: Scene, _: State) -> None:
    """What was frozen goes on: a held-back answer arrives, or a step runs."""
    scene.thaw()


async def first_token(scene: Scene, state: State) -> None:
    """The instance that runs the request sends a token, while answers stay held back."""
    seen = len(scene.client.token_ids)
    if state is State.CUTTING:  # the cut's own token would be its end: hold the cut's effect back, not its token
        scene.cluster["a"].unpause()
    scene.cluster[scene.has(state)].unpause()
    await scene.client.until_tokens(seen + 1)


async def request_ended(scene: Scene, state: State) -> None:
    """The request ends by itself: at its length limit if it decodes, by an engine error if it waits for KV cache."""
    if state in {State.ASKING, State.COPYING, State.WITHDRAWING}:
        scene.cluster["a"].unpause()
        await scene.client.until_end()
    else:
        scene.cluster[scene.has(state)].end_all("error")


async def client_left(scene: Scene, _: State) -> None:
    """The client leaves."""
    scene.cluster.abort(scene.client)


async def source_lost(scene: Scene, _: State) -> None:
    """The source dies."""
    scene.cluster["a"].kill()
    await asyncio.sleep(0.1)


async def target_lost(scene: Scene, _: State) -> None:
    """The target dies."""
    scene.cluster["b"].kill()
    await asyncio.sleep(0.1)


async def timed_out(scene: Scene, state: State) -> None:
    """The state's time limit passes."""
    scene.cluster["a"].pause()
    limits = {
        State.ASKING: LIMITS.ask_s,
        State.PARKED: LIMITS.ask_s,
        State.COPYING: LIMITS.resume_s,
        State.CUTTING: LIMITS.cut_s,
        State.RESUMING: LIMITS.resume_s,
    }
    await asyncio.sleep(limits[state] - 0.1)
    assert (state, Happening.TIMED_OUT) not in scene.cluster.pairs
    await asyncio.sleep(0.15)
    assert (state, Happening.TIMED_OUT) in scene.cluster.pairs


async def place_silent(scene: Scene, state: State) -> None:
    """The instance that holds the request stops answering."""
    scene.cluster[scene.has(state)].freeze()


HAPPEN: dict[Happening, Callable[[Scene, State], Awaitable[None]]] = {
    Happening.ROOM_GRANTED: room_granted,
    Happening.ROOM_TO_COPY: room_granted,
    Happening.ROOM_REFUSED: room_refused,
    Happening.COPIED: go_on,
    Happening.NOT_COPIED: not_copied,
    Happening.CUT_DONE: cut_done,
    Happening.CUT_EMPTY: cut_empty,
    Happening.CUT_LATE: cut_late,
    Happening.CUT_REFUSED: cut_refused,
    Happening.CUT_UNDONE: go_on,
    Happening.PIN_LOST: pin_lost,
    Happening.FIRST_TOKEN: first_token,
    Happening.REQUEST_ENDED: request_ended,
    Happening.CLIENT_LEFT: client_left,
    Happening.SOURCE_LOST: source_lost,
    Happening.TARGET_LOST: target_lost,
    Happening.TIMED_OUT: timed_out,
    Happening.PLACE_SILENT: place_silent,
}
FROM_THE_START = {room_refused, pin_lost, cut_done, cut_empty, cut_late, cut_refused}
"""These bring the request into the state themselves."""


def limits_for(state: State, happening: Happening | None = None) -> MigrationLimits:
    """Full blocks are copied ahead if that is the way to this state, or what happens there."""
    return replace(LIMITS, precopy=state is State.COPYING or happening is Happening.ROOM_TO_COPY)


async def submit(cluster: Cluster, state: State) -> Client:
    """Send request `r`, which is parked if its migration is to be in a state that only parked ones reach."""
    assert isinstance(cluster.policy, ScriptedPolicy)
    if state is State.PARKED:
        cluster.policy.parks.add("r")
    return await cluster.submit("r", 100, N_OUTPUT)


@pytest.mark.parametrize(("state", "happening"), PAIRS, ids=lambda value: value.value)
@virtual_time
async def test_pair(state: State, happening: Happening) -> None:
    """After this event in this state every token comes exactly once, and nothing is left anywhere."""
    policy = ScriptedPolicy({"r": "a", "s": "b"})
    async with Cluster(policy, migration=limits_for(state, happening)) as cluster:
        client = await submit(cluster, state)
        beside = await cluster.submit("s", 30, 4 * N_OUTPUT)
        scene = Scene(cluster, await client.until_tokens(1 if state is State.PARKED else 5))
        happen = HAPPEN[happening]
        if happen not in FROM_THE_START:
            await scene.reach(state)
        await happen(scene, state)
        await cluster.until(lambda: (state, happening) in cluster.pairs, f"{state}, {happening}")
        scene.thaw()
        await client.until_end()
        await beside.until_end()
        if happening is not Happening.REQUEST_ENDED:
            assert client.finish_reason == (None if client.left else "length")
        (ended,) = policy.ended_migrations()
        following = TRANSITIONS.get((state, happening), (state, ()))[0]
        if following in OUTCOMES:
            assert ended.outcome is OUTCOMES[following]
        n_lost = {"a": happening is Happening.SOURCE_LOST, "b": happening is Happening.TARGET_LOST}
        for name, lost in n_lost.items():
            await cluster.until(lambda name=name, lost=lost: len(cluster.engines[name]) == 1 + lost)
        await cluster.all_up()


@pytest.mark.parametrize("state", OPEN, ids=lambda state: state.value)
@virtual_time
async def test_bystander_dies(state: State) -> None:
    """The death of an instance that takes no part in a migration does not affect it."""
    policy = ScriptedPolicy({"r": "a", "s": "c"})
    async with Cluster(policy, migration=limits_for(state)) as cluster:
        client = await submit(cluster, state)
        beside = await cluster.submit("s", 30, N_OUTPUT)
        scene = Scene(cluster, await client.until_tokens(1 if state is State.PARKED else 5))
        await scene.reach(state)
        cluster["c"].kill()
        await asyncio.sleep(0.1)
        migration = cluster.migration("r")
        assert migration is not None
        assert migration.state is state
        scene.thaw()
        await client.until_end()
        await beside.until_end()
        assert policy.ended_migrations()[0].outcome is not MigrationOutcome.LOST
        await cluster.all_up()


DEATHS = {"a": Happening.SOURCE_LOST, "b": Happening.TARGET_LOST}


@pytest.mark.parametrize("order", ["ab", "ba"])
@pytest.mark.parametrize("state", OPEN, ids=lambda state: state.value)
@virtual_time
async def test_both_die(state: State, order: str) -> None:
    """If source and target die in quick succession, the request completes elsewhere."""
    expected = state
    for name in order:
        expected = TRANSITIONS.get((expected, DEATHS[name]), (expected, ()))[0]
    policy = ScriptedPolicy({"r": "a"})
    async with Cluster(policy, migration=limits_for(state)) as cluster:
        client = await submit(cluster, state)
        scene = Scene(cluster, await client.until_tokens(1 if state is State.PARKED else 5))
        await scene.reach(state)
        for name in order:
            cluster[name].kill()
            await asyncio.sleep(0.001)
        await client.until_end()
        assert client.finish_reason == "length"
        assert [e.outcome for e in policy.ended_migrations()] == [OUTCOMES[expected]]
        await cluster.all_up()

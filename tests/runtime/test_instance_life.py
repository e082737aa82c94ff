"""
Every transition of an instance's life, forced on a running runtime, and what each state allows requests and operators.

`Scene.reach` brings an instance into a state; `HAPPEN` triggers the event. After each: the transition has occurred,
every client has received exactly its tokens, and nothing is left on any instance (`Cluster`).
"""

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace

import pytest
from runtime_cluster import SUPERVISION, Client, Cluster, ScriptedPolicy

from cascadeinfer.core.errors import ScalingRefusedError
from cascadeinfer.core.events import PinReason
from cascadeinfer.engines.simulated import SimulatedEngine
from cascadeinfer.runtime.instance_state import ALLOWED, FIRST, TRANSITIONS, Deed, Happening, InstanceLife, State
from support.virtual_time import virtual_time

PATIENT = replace(SUPERVISION, hang_s=60.0)
LONG_S = 600.0
SOON_S = 2.0
"""Time-out of an overdue drain: longer than a suspicion takes, shorter than any request here."""
N_OUTPUT = 4000

Pair = tuple[State, Happening]
PAIRS = sorted(TRANSITIONS, key=lambda pair: (pair[0].value, pair[1].value))
NEW = FIRST | {State.GONE}
"""States of an added instance; all other states are reached with instance a."""


@pytest.fixture
def occurred(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, Pair]]]:
    """Which event happens to which instance, in which state."""
    pairs: list[tuple[str, Pair]] = []
    happen = InstanceLife.happen

    def noted(life: InstanceLife, happening: Happening, now_s: float, why: str = "") -> bool:
        pairs.append((life._instance_id, (life.state, happening)))
        return happen(life, happening, now_s, why)

    monkeypatch.setattr(InstanceLife, "happen", noted)
    yield pairs
    assert not [pair for pair in pairs if pair[1] in TRANSITIONS and pair[1][0] is State.GONE]


class Scene:
    """Instances a, b and c, and one that is added; `name` is the instance under test."""

    def __init__(self, cluster: Cluster, drain_s: float = LONG_S) -> None:
        """
        Args:
            cluster: A started cluster.
            drain_s: Time-out of drains, in seconds.
        """
        self.cluster = cluster
        self.drain_s = drain_s
        self.name = "a"
        self.client: Client | None = None

    @property
    def life(self) -> InstanceLife:
        """The instance's."""
        return self.cluster.runtime.fleet[self.name].supervisor.life

    @property
    def engine(self) -> SimulatedEngine:
        """Of its last start."""
        return self.cluster[self.name]

    async def until(self, state: State) -> None:
        """Wait until it is in this state."""
        await self.cluster.until(lambda: self.life.state is state, f"{self.name} is {state.value}, not {self.life}")

    async def reach(self, state: State) -> None:
        """Bring it into this state."""
        await getattr(self, state.value)()
        assert self.life.state is state

    async def added(self) -> None:
        """It lasts for this turn of the event loop."""
        (self.name,) = self.cluster.runtime.elastic.add()

    async def starting(self) -> None:
        """Its start is slow."""
        await self.added()
        await self.until(State.STARTING)

    async def joining(self) -> None:
        """A peer does not answer its handshake."""
        self.cluster["b"].hold_answers("handshake")
        await self.added()
        await self.until(State.JOINING)

    async def up(self) -> None:
        """It is up and runs a request."""
        self.client = await self.cluster.submit("r", 40, N_OUTPUT, pin_reason=PinReason.LORA)
        await self.client.until_tokens(3)
        assert self.cluster.where("r") == self.name

    async def suspect(self) -> None:
        """It computes, but its reports are held back."""
        await self.up()
        self.engine.hold_answers("report")
        await self.until(State.SUSPECT)

    async def condemned(self) -> None:
        """Its death is noticed a little later."""
        await self.up()
        self.condemn()

    async def draining(self) -> None:
        """Its request is pinned."""
        await self.up()
        self.drain()

    async def draining_suspect(self) -> None:
        """It is drained while silent."""
        await self.suspect()
        self.drain()

    async def doomed(self) -> None:
        """It is condemned while it drains."""
        await self.draining()
        self.condemn()

    async def down(self) -> None:
        """It waits for its restart."""
        self.engine.kill()
        await self.until(State.DOWN)

    async def restarting(self) -> None:
        """Its restart is slow."""
        await self.down()
        await self.until(State.RESTARTING)

    async def rejoining(self) -> None:
        """A peer does not answer its handshake."""
        self.cluster["b"].hold_answers("handshake")
        await self.down()
        await self.until(State.REJOINING)

    async def removing(self) -> None:
        """It lasts for this turn of the event loop."""
        await self.down()
        self.drain()

    def condemn(self) -> None:
        """Kill it without blaming any request."""
        self.cluster.runtime.fleet[self.name].supervisor.condemn(self.engine, "the test wants it")

    def drain(self) -> None:
        """Drain it, as an operator does."""
        self.cluster.runtime.elastic.drain(self.name, self.drain_s)

    async def thaw(self) -> None:
        """Let everything go on until the request ends."""
        for engine in [engine for engines in self.cluster.engines.values() for engine in engines[-1:]]:
            engine.release_answers("report")
            engine.release_answers("handshake")
        if self.client is not None and self.client.finish_reason is None:
            self.cluster.abort(self.client)
        await self.cluster.all_up()


async def nothing(_: Scene) -> None:
    """Happens without our help."""


async def silence(scene: Scene) -> None:
    """Hold its reports back."""
    scene.engine.hold_answers("report")


async def answers(scene: Scene) -> None:
    """Release its reports."""
    scene.engine.release_answers("report")


async def handshake(scene: Scene) -> None:
    """Have its peer answer."""
    scene.cluster["b"].release_answers("handshake")


async def condemn(scene: Scene) -> None:
    """Kill it on purpose."""
    scene.condemn()


async def death(scene: Scene) -> None:
    """Its process is killed from outside."""
    scene.engine.kill()


async def drain(scene: Scene) -> None:
    """An operator removes it."""
    scene.drain()


async def request_ends(scene: Scene) -> None:
    """Its client leaves; the next report says that it is empty."""
    assert scene.client is not None
    scene.cluster.abort(scene.client)
    await asyncio.sleep(3 * PATIENT.report_s)
    scene.engine.release_answers("report")


HAPPEN: dict[Happening, Callable[[Scene], Awaitable[None]]] = {
    Happening.START: nothing,
    Happening.STARTED: nothing,
    Happening.START_FAILED: nothing,
    Happening.JOINED: handshake,
    Happening.SUSPECTED: silence,
    Happening.TRUSTED: answers,
    Happening.CONDEMNED: condemn,
    Happening.DIED: death,
    Happening.DRAIN: drain,
    Happening.EMPTIED: request_ends,
    Happening.DRAIN_OVERDUE: nothing,
    Happening.REMOVED: nothing,
}


async def doomed_and_empty(scene: Scene) -> None:
    """An idle instance is condemned, then drained: it is empty before its death is noticed."""
    scene.condemn()
    scene.drain()
    assert scene.life.state is State.DOOMED


async def doomed_and_overdue(scene: Scene) -> None:
    """An instance with a request is condemned, then drained with no time, as when a front end hears of both at once."""
    await scene.condemned()
    scene.cluster.runtime.elastic.drain(scene.name, 0.0)
    assert scene.life.state is State.DOOMED


async def silent_and_empty(scene: Scene) -> None:
    """A silent instance is drained; with its request's last output comes the load, which says that it is empty."""
    await scene.draining_suspect()
    scene.engine.load(0.0)
    scene.engine.end_all("error")


SPECIAL: dict[Pair, Callable[[Scene], Awaitable[None]]] = {
    (State.DOOMED, Happening.EMPTIED): doomed_and_empty,
    (State.DOOMED, Happening.DRAIN_OVERDUE): doomed_and_overdue,
    (State.DRAINING_SUSPECT, Happening.EMPTIED): silent_and_empty,
}


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0].value}-{pair[1].value}")
@virtual_time
async def test_each_transition_occurs(pair: Pair, occurred: list[tuple[str, Pair]]) -> None:
    """Every transition of the table is reached, and requests and instances survive each of them."""
    state, happening = pair
    fails = happening is Happening.START_FAILED

    def start_error(name: str, n_start: int) -> str | None:
        return "no memory" if fails and (name, n_start) == (("3", 0) if state in NEW else ("a", 1)) else None

    async with Cluster(ScriptedPolicy({"r": "a"}), supervision=PATIENT, start_error=start_error) as cluster:
        scene = Scene(cluster, SOON_S if happening is Happening.DRAIN_OVERDUE else LONG_S)
        if pair in SPECIAL:
            await SPECIAL[pair](scene)
            life = scene.life
        else:
            await scene.reach(state)
            life = scene.life
            await HAPPEN[happening](scene)
        await cluster.until(lambda: (scene.name, pair) in occurred, f"{pair} has not occurred: {life.story()}")
        passage = next(p for p in life.history if (p.happening, p.state) == (happening, TRANSITIONS[pair]))
        assert passage.at_s <= asyncio.get_running_loop().time()
        await scene.thaw()


def shown(cluster: Cluster, name: str) -> dict[str, object]:
    """What `/admin/instances` shows of an instance."""
    return next(i for i in cluster.runtime.snapshot()["instances"] if i["id"] == name)


HELD = [state for state in State if state not in {State.ADDED, State.REMOVING, State.GONE}]
"""States that last for more than one turn of the event loop."""
LASTING = [
    State.JOINING, State.UP, State.SUSPECT, State.DRAINING, State.DRAINING_SUSPECT, State.REJOINING,
]  # fmt: skip
"""States that can be made to last for seconds."""
IN_VIEW = {
    State.UP: (False, False),
    State.SUSPECT: (False, True),
    State.CONDEMNED: (False, False),
    State.DRAINING: (True, False),
    State.DRAINING_SUSPECT: (True, True),
    State.DOOMED: (True, False),
}
"""For states that the policy knows of: whether its view has the instance as (draining, suspect)."""


@pytest.mark.parametrize("state", HELD, ids=lambda state: state.value)
@virtual_time
async def test_what_a_state_allows(state: State) -> None:
    """Who gets requests, which engine is used and what may be drained match the table, as do policy and admin views."""
    policy = ScriptedPolicy({"r": "a"})
    async with Cluster(policy, supervision=PATIENT) as cluster:
        scene = Scene(cluster)
        await scene.reach(state)
        name, allowed = scene.name, ALLOWED[state]
        in_use = Deed.RUN in allowed
        assert (name in [engine.instance_id for engine in cluster.runtime.live_engines()]) == in_use
        assert (cluster.runtime.fleet.engine(name) is scene.engine) == in_use
        assert cluster.runtime.fleet.connected(name, "c") == in_use
        view = policy.view.instances.get(name)
        assert (view is None) == (state not in IN_VIEW)
        if view is not None:
            assert (view.draining, view.suspect) == IN_VIEW[state]
        assert shown(cluster, name)["state"] == state.value
        assert shown(cluster, name)["up"] == in_use
        assert [p["state"] for p in shown(cluster, name)["history"]][-1] == state.value  # type: ignore[attr-defined, index]

        clients = [await cluster.submit(f"n{number}", 40, 30) for number in range(9)]
        places = [cluster.where(client.request.request_id) for client in clients]
        assert scene.life.state is state
        # The policy learns of a condemned instance only once it is dead: what it places there is orphaned at once.
        assert (name in places) == (Deed.TAKE in allowed or state is State.CONDEMNED)

        refused = contextlib.nullcontext() if Deed.BE_DRAINED in allowed else pytest.raises(ScalingRefusedError)
        with refused:
            scene.drain()
        for client in clients:
            await client.until_end()
            assert client.finish_reason == "length"
        await scene.thaw()


@pytest.mark.parametrize("state", LASTING, ids=lambda state: state.value)
@virtual_time
async def test_who_serves_in_need(state: State) -> None:
    """With all others suspect, an UP instance gets all new requests, a suspect one its share, any other state none."""
    policy = ScriptedPolicy({"r": "a"})
    async with Cluster(policy, supervision=PATIENT) as cluster:
        scene = Scene(cluster)
        await scene.reach(state)
        others = [name for name in "abc" if name != scene.name]
        for other in others:
            cluster[other].hold_answers("report")
        lives = [cluster.runtime.fleet[other].supervisor.life for other in others]
        await cluster.until(lambda: all(life.state is State.SUSPECT for life in lives), "all others are silent")
        assert scene.life.state is state
        clients = [await cluster.submit(f"n{number}", 40, 30) for number in range(9)]
        places = {cluster.where(client.request.request_id) for client in clients}
        assert (scene.name in places) == (Deed.TAKE_IN_NEED in ALLOWED[state])
        assert (places == {scene.name}) == (Deed.TAKE in ALLOWED[state])
        for client in clients:
            await client.until_end()
        await scene.thaw()


@pytest.mark.parametrize("state", HELD, ids=lambda state: state.value)
@virtual_time
async def test_who_may_be_the_only_one(state: State) -> None:
    """The last other instance may be drained only if this one can take its requests, at least in need."""
    async with Cluster(ScriptedPolicy({"r": "a"}), "ab", supervision=PATIENT) as cluster:
        scene = Scene(cluster)
        if state in FIRST:
            cluster.runtime.elastic.drain("a", 0.0)
            await cluster.gone("a")
        await scene.reach(state)
        if Deed.TAKE_IN_NEED in ALLOWED[state]:
            cluster.runtime.elastic.drain("b", LONG_S)
        else:
            with pytest.raises(ScalingRefusedError, match="nowhere to go"):
                cluster.runtime.elastic.drain("b", LONG_S)
        await scene.thaw()


@virtual_time
async def test_only_who_may_be_asked_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through lives of all kinds, an instance is polled for load and given requests only in states that allow it."""
    asked: set[State] = set()
    given: set[State] = set()
    report, add = SimulatedEngine.report, SimulatedEngine.add
    cluster = Cluster(ScriptedPolicy({"r": "a"}), supervision=PATIENT, max_instances=60)

    def state_of(engine: SimulatedEngine) -> State:
        return cluster.runtime.fleet[engine.instance_id].supervisor.life.state

    async def noted_report(engine: SimulatedEngine, next_after_s: float | None = None) -> object:
        asked.add(state_of(engine))
        return await report(engine, next_after_s)

    async def noted_add(engine: SimulatedEngine, *args: object, park: bool = False) -> None:
        given.add(state_of(engine))
        await add(engine, *args, park=park)  # type: ignore[arg-type]

    monkeypatch.setattr(SimulatedEngine, "report", noted_report)
    monkeypatch.setattr(SimulatedEngine, "add", noted_add)
    async with cluster:
        for number, (state, happening) in enumerate(
            itertools.product(LASTING, (Happening.DIED, Happening.DRAIN, Happening.TRUSTED))
        ):
            scene = OnAnAddedOne(cluster, f"r{number}")
            await scene.reach(state)
            await asyncio.sleep(2 * PATIENT.report_s)
            with contextlib.suppress(ScalingRefusedError):
                await HAPPEN[happening](scene)
            await asyncio.sleep(2 * PATIENT.report_s)
            await scene.thaw()
            if scene.name in cluster.runtime.fleet.records:
                with contextlib.suppress(ScalingRefusedError):
                    cluster.runtime.elastic.drain(scene.name, 0.0)
                await cluster.gone(scene.name)
    assert asked <= {state for state in State if Deed.BE_ASKED in ALLOWED[state]}
    assert given <= {state for state in State if Deed.RUN in ALLOWED[state]}
    assert set(LASTING) <= asked
    assert State.UP in given


class OnAnAddedOne(Scene):
    """The same scenes on an instance that is added for the purpose."""

    def __init__(self, cluster: Cluster, request_id: str) -> None:
        """
        Args:
            cluster: A started cluster.
            request_id: Id of the added instance's request.
        """
        super().__init__(cluster)
        self.request_id = request_id

    async def up(self) -> None:
        """Add it, with a request."""
        await self.added()
        await self.until(State.UP)
        assert isinstance(self.cluster.policy, ScriptedPolicy)
        self.cluster.policy.places[self.request_id] = self.name
        self.client = await self.cluster.submit(self.request_id, 40, N_OUTPUT, pin_reason=PinReason.LORA)
        await self.client.until_tokens(3)

    async def down(self) -> None:
        """Add it, then kill it."""
        await self.added()
        await self.until(State.UP)
        await super().down()

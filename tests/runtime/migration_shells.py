"""
The two shells of the migration protocol, each moving one request between instances that the test scripts.

`Simulator` is the simulated cluster over scripted instances; `Live` is the runtime over scripted engines. The instances
compute nothing: they give the answers that the test chooses, when it chooses. Everything between them and the policy is
real.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from prometheus_client import CollectorRegistry
from runtime_cluster import CAPACITY, ScriptedPolicy
from scripted_engine import ScriptedEngine

from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.effects import Effect, MigrationReason, StartMigration
from cascadeinfer.core.events import Event, MigrationEnded, TimerFired
from cascadeinfer.core.migration import Happening, Migration, MigrationLimits, State
from cascadeinfer.core.policies.least_loaded import LeastLoaded
from cascadeinfer.core.refusals import Refusal
from cascadeinfer.core.types import InstanceId, MigrationId
from cascadeinfer.engines.protocol import EngineRequest
from cascadeinfer.engines.simulated.model import SimulatedDelta, SimulatedTicket
from cascadeinfer.runtime.metrics import RuntimeMetrics
from cascadeinfer.runtime.shell import Runtime
from cascadeinfer.sim.cluster import SimCluster
from cascadeinfer.sim.instance import SimInstance
from cascadeinfer.sim.kernel import Priority
from cascadeinfer.sim.requests import Phase, SimRequest
from cascadeinfer.sim.settings import NetworkConfig, SimConfig, instance_ids
from cascadeinfer.sim.steps import StepEnd
from cascadeinfer.workload.trace import Trace

IDS = instance_ids(3)
SOURCE, TARGET, _ = IDS
MOVE = StartMigration("test", "m", "r0", SOURCE, TARGET, MigrationReason.OPERATOR)
PROMPT_TOKENS = 100
CONTROL_S = 0.001
"""Time for one simulated command to travel one way."""
FULL_TOKENS = 96
"""In the full blocks of the request."""
TURNS = 30
"""Event loop turns within which everything queued is handled."""


@dataclass(frozen=True)
class Ending:
    """
    How a migration ended.

    Attributes:
        event: The event that the policy receives.
        record: The stored outcome, reason and detail.
        story: States and events, in order.
        asked_tokens: Room requested from the target; None if none was.
    """

    event: MigrationEnded
    record: tuple[str, str, str]
    story: tuple[str, ...]
    asked_tokens: int | None


class Shell(Protocol):
    """One of the two shells with a request at the source that is to move."""

    @property
    def now_s(self) -> float:
        """The time on the shell's clock."""
        ...

    @property
    def migration(self) -> Migration:
        """The migration; still available once it is over."""
        ...

    async def begin(self) -> None:
        """Have the policy start the move."""
        ...

    async def bring(self, happening: Happening) -> None:
        """Trigger this event now."""
        ...

    async def grow(self, n_tokens: int) -> None:
        """Have the source send this many tokens."""
        ...

    async def deliver(self) -> None:
        """Deliver the command in transit."""
        ...

    async def wait(self, until_s: float) -> None:
        """Let time pass while nobody answers anything."""
        ...

    async def end(self) -> Ending:
        """Shut everything down."""
        ...


# --- the simulated cluster --------------------------------------------------------------------------------------------


class Moves(LeastLoaded):
    """Least loaded; starts the move when its timer fires."""

    def __init__(self, at_s: float) -> None:
        super().__init__()
        self._at_s: float | None = at_s
        self.ended: list[MigrationEnded] = []

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """See `Policy.handle`."""
        effects = super().handle(event, now_s)
        if isinstance(event, MigrationEnded):
            self.ended.append(event)
        if isinstance(event, TimerFired) and self._at_s is not None:
            self._at_s = None
            self.view.carry_out([MOVE])
            effects.append(MOVE)
        return effects

    def next_timer_s(self) -> float | None:
        """When the move is to start."""
        return self._at_s


class ScriptedInstance(SimInstance):
    """Never steps; refuses what the test chooses, and receives nothing while it is down."""

    refusal: Refusal | None = None
    asked_tokens: int | None = None
    full_tokens = FULL_TOKENS

    def reserve(self, migration_id: MigrationId, length_tokens: int, now_s: float) -> Refusal | None:  # noqa: ARG002 - SimInstance
        """See SimInstance."""
        self.asked_tokens = length_tokens
        return self.refusal

    def request_cut(self, request: SimRequest, now_s: float) -> Refusal | None:  # noqa: ARG002 - SimInstance
        """See SimInstance."""
        return self.refusal

    def full_block_tokens(self, request: SimRequest) -> int:  # noqa: ARG002 - SimInstance
        """See SimInstance."""
        return self.full_tokens

    def expect(self, request: SimRequest, migration_id: MigrationId, now_s: float) -> int:  # noqa: ARG002 - SimInstance
        """See SimInstance."""
        return request.settled_tokens - 1

    def push(self, request: SimRequest, now_s: float) -> None:
        """See SimInstance."""

    def remove(self, request: SimRequest, now_s: float) -> None:
        """See SimInstance."""


class Simulator:
    """The simulator; see Shell."""

    def __init__(self, limits: MigrationLimits) -> None:
        """A cluster of scripted instances with one request."""
        config = SimConfig(
            instances=len(IDS),
            capacity=CAPACITY,
            step_model=StepModel(0.01, 0.0, 0.0, 0.0, 0.0),
            kv_bytes_per_token=1e5,
            context_tokens=1024,
            network=NetworkConfig(control_s=CONTROL_S),
            migration=limits,
        )
        self._policy = Moves(0.05)
        self._cluster = SimCluster(Trace.from_columns([PROMPT_TOKENS], [200], [0.01]), self._policy, config)

    @property
    def now_s(self) -> float:
        """See Shell."""
        return self._cluster.kernel.now_s

    @property
    def migration(self) -> Migration:
        """See Shell."""
        return self._migration

    async def begin(self) -> None:
        """See Shell."""
        cluster = self._cluster
        self._run_to(0.005)
        for number, name in enumerate(IDS):
            coefficients = cluster.config.step_model.coefficients()
            cluster.fleet.instances[name] = ScriptedInstance(name, number, CAPACITY, coefficients)
        self._target = self._instance(TARGET)
        while not cluster.migrator.moves:
            cluster.step()
        self._move = cluster.migrator.moves[MOVE.migration_id]
        self._migration = self._move.migration
        self._request = self._move.request
        assert self._request.instance_id == SOURCE

    async def bring(self, happening: Happening) -> None:  # noqa: C901, PLR0912 - one arm per happening
        """See Shell; the migrator is told directly of events that no simulated instance reports."""
        match happening:
            case Happening.ROOM_GRANTED | Happening.ROOM_TO_COPY:
                self._run_to(self.now_s + 2 * CONTROL_S)
            case Happening.COPIED:
                while self.migration.state is State.COPYING:
                    self._cluster.step()
            case Happening.NOT_COPIED:
                self._instance(SOURCE).full_tokens = 0
                self._run_to(self.now_s + 2 * CONTROL_S)
            case Happening.ROOM_REFUSED:
                self._instance(TARGET).refusal = Refusal.NO_BLOCKS
                self._run_to(self.now_s + 2 * CONTROL_S)
            case Happening.CUT_DONE | Happening.CUT_LATE:
                self._hear(StepEnd(cut=[self._request]), SOURCE)
            case Happening.CUT_REFUSED if self.migration.state is State.CUTTING:
                self._instance(SOURCE).refusal = Refusal.ENDING
                await self.deliver()
            case Happening.CUT_REFUSED:
                self._cluster.migrator.happen(self._move, happening, Refusal.ENDING)
            case Happening.CUT_UNDONE:
                await self.deliver()
            case Happening.CUT_EMPTY | Happening.PLACE_SILENT:
                self._cluster.migrator.happen(self._move, happening)
            case Happening.FIRST_TOKEN:
                self._hear(StepEnd(watched=[self._request]), self._holder())
            case Happening.REQUEST_ENDED:
                self._request.phase = Phase.FINISHED
                self._hear(StepEnd(finished=[self._request]), self._holder())
            case Happening.CLIENT_LEFT:
                self._cluster._disconnect(self._request.row)
            case Happening.SOURCE_LOST:
                self._cluster.instance_lost(self._instance(SOURCE))
            case Happening.TARGET_LOST:
                self._cluster.instance_lost(self._instance(TARGET))
            case _:
                raise AssertionError(happening)

    async def grow(self, n_tokens: int) -> None:
        """See Shell."""
        self._request.produced += n_tokens

    async def deliver(self) -> None:
        """See Shell."""
        self._run_to(self.now_s + CONTROL_S)

    async def wait(self, until_s: float) -> None:
        """See Shell."""
        instances = self._cluster.fleet.instances.values()
        for instance in instances:
            instance.alive = False
        self._run_to(until_s)
        for instance in instances:
            instance.alive = True

    async def end(self) -> Ending:
        """See Shell."""
        (event,) = self._policy.ended
        records = self._cluster.recorder.migrations()
        (record,) = zip(records.outcome, records.reason, records.detail, strict=True)
        return Ending(event, record, tuple(self.migration.story), self._target.asked_tokens)

    def _run_to(self, until_s: float) -> None:
        self._cluster.kernel.at(until_s, Priority.TIMER, lambda _: None, None)
        while self._cluster.kernel.step(until_s):
            pass

    def _instance(self, instance_id: InstanceId) -> ScriptedInstance:
        instance = self._cluster.fleet.instances[instance_id]
        assert isinstance(instance, ScriptedInstance)
        return instance

    def _holder(self) -> InstanceId:
        return TARGET if self.migration.at_target else SOURCE

    def _hear(self, end: StepEnd, instance_id: InstanceId) -> None:
        self._cluster.instance_stepped(self._instance(instance_id), end)


# --- the runtime ------------------------------------------------------------------------------------------------------


class Live:
    """The runtime; see Shell."""

    def __init__(self, limits: MigrationLimits) -> None:
        """A runtime over scripted engines."""
        self._registry = CollectorRegistry()
        self._engines: dict[InstanceId, ScriptedEngine] = {}
        self._policy = ScriptedPolicy({"r0": SOURCE})
        self._runtime = Runtime(
            {name: self._factory(name) for name in IDS},
            self._policy,
            lambda read: RuntimeMetrics(self._registry, read),
            migration=limits,
            poison_deaths=10,
            clock=lambda: asyncio.get_running_loop().time(),
        )

    def _factory(self, name: InstanceId) -> Callable[[int], ScriptedEngine]:
        def make(_: int) -> ScriptedEngine:
            return self._engines.setdefault(name, ScriptedEngine(name, CAPACITY))  # no restart within the test

        return make

    @property
    def now_s(self) -> float:
        """See Shell."""
        return asyncio.get_running_loop().time()

    @property
    def migration(self) -> Migration:
        """See Shell."""
        return self._migration

    async def begin(self) -> None:
        """See Shell."""
        await self._runtime.start()
        await self._settle()
        await self._runtime.submit(EngineRequest("r0", list(range(PROMPT_TOKENS)), 200, None))
        stream = self._runtime._streams.get("r0")
        assert stream is not None
        self._stream = stream
        self._policy.queue.append(MOVE)
        self._runtime.emit(TimerFired("test"))
        assert stream.migration is not None
        self._migration = stream.migration
        await self._settle()

    async def bring(self, happening: Happening) -> None:  # noqa: C901, PLR0912 - one arm per happening
        """See Shell; silence is reported to the migrator directly, as waiting for a suspicion would take too long."""
        match happening:
            case Happening.ROOM_GRANTED | Happening.ROOM_TO_COPY:
                self._engines[TARGET].answer("reserve", None)
            case Happening.COPIED:
                self._engines[SOURCE].answer("pin_full_blocks", SimulatedTicket("scripted", "r0", FULL_TOKENS))
                await self._settle()
                self._engines[TARGET].answer("precopy", result=True)
            case Happening.NOT_COPIED:
                self._engines[SOURCE].answer("pin_full_blocks", None)
            case Happening.ROOM_REFUSED:
                self._engines[TARGET].answer("reserve", Refusal.NO_BLOCKS)
            case Happening.CUT_DONE | Happening.CUT_LATE:
                self._say([1], "length", SimulatedTicket("scripted", "r0", PROMPT_TOKENS))
            case Happening.CUT_EMPTY:
                self._say([1], "length", SimulatedTicket("scripted", "r0", 0))
            case Happening.CUT_REFUSED:
                self._engines[SOURCE].answer("cut", Refusal.ENDING)
            case Happening.CUT_UNDONE:
                self._engines[SOURCE].answer("undo_cut", result=True)
            case Happening.PLACE_SILENT:
                self._runtime._migrator.happen(MOVE.migration_id, happening)
            case Happening.FIRST_TOKEN:
                self._say([1])
            case Happening.REQUEST_ENDED:
                self._say([], "stop")
            case Happening.CLIENT_LEFT:
                self._runtime.abort(["r0"])
            case Happening.SOURCE_LOST:
                self._engines[SOURCE].die()
            case Happening.TARGET_LOST:
                self._engines[TARGET].die()
            case _:
                raise AssertionError(happening)
        await self._settle()

    async def grow(self, n_tokens: int) -> None:
        """See Shell."""
        self._say([1] * n_tokens)
        await self._settle()

    async def deliver(self) -> None:
        """See Shell."""
        await self._settle()

    async def wait(self, until_s: float) -> None:
        """See Shell."""
        await asyncio.sleep(until_s - self.now_s)
        await self._settle()

    async def end(self) -> Ending:
        """See Shell."""
        (event,) = self._policy.ended_migrations()
        (record,) = (
            (sample.labels["outcome"], sample.labels["reason"], sample.labels["detail"])
            for metric in self._registry.collect()
            for sample in metric.samples
            if sample.name == "cascadeinfer_migrations_total" and sample.value == 1
        )
        await self._runtime.stop(0.0)
        return Ending(event, record, tuple(self.migration.story), self._engines[TARGET].asked_tokens)

    def _say(
        self, token_ids: list[int], finish_reason: str | None = None, ticket: SimulatedTicket | None = None
    ) -> None:
        """Have the instance that runs the request send this."""
        stream = self._stream
        assert stream.instance_id is not None
        assert stream.engine_request_id is not None
        self._engines[stream.instance_id].send(
            SimulatedDelta(stream.engine_request_id, token_ids, finish_reason, ticket)
        )

    @staticmethod
    async def _settle() -> None:
        for _ in range(TURNS):
            await asyncio.sleep(0)

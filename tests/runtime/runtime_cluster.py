"""
A runtime over simulated engines in virtual time, with clients that check every token and a final check for leftovers.

`async with Cluster(...)` starts everything. On exit it asserts that nothing is left: no stream or migration; no
request, block, pin or reservation on any engine (checked well before an expiring lease could hide a leak); no error in
the log; and no timer. `@virtual_time` also asserts that no task is left.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

from prometheus_client import CollectorRegistry

from cascadeinfer.core.effects import Dispatch, Effect, MigrationReason, StartMigration
from cascadeinfer.core.errors import ConfigError, ScalingRefusedError
from cascadeinfer.core.events import Event, MigrationEnded, PinReason, TimerFired
from cascadeinfer.core.kind import InstanceTerms
from cascadeinfer.core.migration import Happening, Migration, MigrationLimits, State
from cascadeinfer.core.placing.dispatch import Chosen
from cascadeinfer.core.policies.least_loaded import LeastLoaded
from cascadeinfer.core.policy import Policy
from cascadeinfer.core.quarantine import DEATHS
from cascadeinfer.core.refusals import Refusal
from cascadeinfer.core.types import InstanceCapacity
from cascadeinfer.core.view import ClusterView, InstanceView, RequestView
from cascadeinfer.engines.build import FIRST_BUILD, Build
from cascadeinfer.engines.protocol import EngineRequest
from cascadeinfer.engines.simulated import SimulatedEngine, SimulatedParams, SimulatedTimes, generate
from cascadeinfer.runtime import instance_state
from cascadeinfer.runtime.driver import Observer
from cascadeinfer.runtime.instance_state import Deed
from cascadeinfer.runtime.metrics import RuntimeMetrics
from cascadeinfer.runtime.shell import Runtime
from cascadeinfer.runtime.supervise import SupervisionTimes
from cascadeinfer.runtime.view import Departed
from support.virtual_time import VirtualTimeLoop

CAPACITY = InstanceCapacity(kv_blocks=128, block_size_tokens=16, max_num_seqs=8, max_batched_tokens=64)
TIMES = SimulatedTimes()
SUPERVISION = SupervisionTimes(report_s=0.1, hang_s=2.0, backoff_first_s=1.0, backoff_max_s=8.0, window_s=30.0)
MIGRATION = MigrationLimits(ask_s=2.0, cut_s=5.0, resume_s=7.0)
GRACE_S = 0.5
"""Everything must be free this long after the last request's end: far below the life of a lease or reservation."""
PATIENCE_S = 600.0
MANY_DEATHS = 1_000_000
"""For tests that kill several instances in turn while they run one request, as a poison request would."""
WATCH_S = 0.02
DEFECTS = ("internal error", "a command", "a migration command")
"""Prefixes of log records that report our own bugs."""


class ScriptedPolicy(LeastLoaded):
    """
    Least loaded, except where a test decides otherwise; records every event.

    Attributes:
        parks: Requests that are to be parked where they are first dispatched.
    """

    def __init__(self, places: dict[str, str] | None = None) -> None:
        """Requests in `places` go to the instance named there while it is up."""
        super().__init__()
        self.places = places or {}
        self.parks: set[str] = set()
        self.queue: deque[Effect] = deque()
        self.events: list[Event] = []
        self.answers: list[Callable[[Event], list[Effect]]] = []

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """The effects of least loaded, then those that the test has queued."""
        self.events.append(event)
        effects = [self._parked(effect) for effect in super().handle(event, now_s)]
        more = [*self.queue, *(effect for answer in self.answers for effect in answer(event))]
        self.queue.clear()
        self.view.carry_out(more)
        return effects + more

    def _parked(self, effect: Effect) -> Effect:
        if not isinstance(effect, Dispatch) or effect.request_id not in self.parks:
            return effect
        self.parks.remove(effect.request_id)
        parked = replace(effect, park=True)
        self.view.carry_out([parked])
        return parked

    def choose(self, request: RequestView, candidates: Sequence[InstanceView]) -> Chosen:
        """The instance that the test names, or the least loaded one."""
        wanted = self.places.get(request.request_id)
        named = next((c for c in candidates if c.instance_id == wanted), None)
        return super().choose(request, candidates) if named is None else Chosen(named)

    def ended_migrations(self) -> list[MigrationEnded]:
        """All migrations that have ended, in order."""
        return [event for event in self.events if isinstance(event, MigrationEnded)]


class Client:
    """A client that checks each token of its request against the undisturbed output as it arrives."""

    def __init__(self, request: EngineRequest) -> None:
        """A client that has just sent this request."""
        self.request = request
        self.expected = generate(request.prompt_token_ids, request.max_output_tokens, request.payload.stop_token_ids)
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.left = False
        self.news = asyncio.Event()

    def hear(self, delta: Any) -> None:
        """Take one output of the runtime for this request."""
        name = self.request.request_id
        assert self.finish_reason is None, f"{name}: words after the last word"
        assert not self.left, f"{name}: words to a client that has left"
        assert delta.kv_transfer_params is None, f"{name}: a ticket reached the client"
        self.token_ids += delta.new_token_ids
        seen = len(self.token_ids)
        assert self.token_ids == self.expected[:seen], f"{name}: wrong, lost or repeated token at {seen - 1}"
        self.finish_reason = delta.finish_reason
        if self.finish_reason in {"stop", "length"}:
            assert seen == len(self.expected), f"{name}: ended after {seen} of {len(self.expected)} tokens"
        self.news.set()

    async def until(self, condition: Callable[["Client"], bool]) -> Self:
        """Wait until the condition holds or the request is over."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition(self) and self.finish_reason is None and not self.left:
                self.news.clear()
                await self.news.wait()
        return self

    async def until_tokens(self, n: int) -> Self:
        """Wait for at least this many tokens."""
        return await self.until(lambda client: len(client.token_ids) >= n)

    async def until_end(self) -> Self:
        """Wait for the end."""
        return await self.until(lambda _: False)


class Cluster:
    """See the module header."""

    def __init__(
        self,
        policy: Policy | None = None,
        instance_ids: Iterable[str] = "abc",
        *,
        capacity: InstanceCapacity = CAPACITY,
        times: SimulatedTimes = TIMES,
        supervision: SupervisionTimes = SUPERVISION,
        migration: MigrationLimits = MIGRATION,
        start_error: Callable[[str, int], str | None] = lambda _id, _n: None,
        max_instances: int = 8,
        observer: Observer | None = None,
        poison_deaths: int = DEATHS,
        terms: Mapping[str, InstanceTerms] | None = None,
        nodes: Mapping[str, str] | None = None,
        own: Mapping[str, Build] | None = None,
    ) -> None:
        """
        Args:
            policy: A ScriptedPolicy by default.
            instance_ids: The instances.
            capacity: Capacity of each instance.
            times: Times of each instance.
            supervision: Limits and intervals of supervision.
            migration: Time limits of migrations.
            start_error: Why an instance's n-th start fails, or None.
            max_instances: Number of places for instances.
            observer: Sees events and effects.
            poison_deaths: Deaths after which a request is taken for the cause.
            terms: Roles and chunk budgets.
            nodes: Where instances say that they run; others do not say.
            own: What instances are started with that are not started like the others.
        """
        self.policy = policy or ScriptedPolicy()
        self.registry = CollectorRegistry()
        self.engines: dict[str, list[SimulatedEngine]] = {instance_id: [] for instance_id in instance_ids}
        self.clients: dict[str, Client] = {}
        self.pairs: list[tuple[State, Happening]] = []
        self.defects: list[str] = []
        self._start_error = start_error
        self._max_instances = max_instances
        self.placed = set(self.engines)
        self._capacity = capacity
        self._times = times
        self._nodes = nodes or {}
        self._pump: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._numbers = 0
        self._observer = observer

        self.build = FIRST_BUILD
        self.noted: list[list[int]] = []
        self.own = dict(own or {})
        self.runtime = Runtime(
            {instance_id: self._factory(instance_id) for instance_id in self.engines},
            self.policy,
            lambda read: RuntimeMetrics(self.registry, read),
            supervision=supervision,
            migration=migration,
            source=self,
            observer=self._observe,
            poison_deaths=poison_deaths,
            terms=terms,
            clock=lambda: asyncio.get_running_loop().time(),
        )
        happen = self.runtime._migrator.happen

        def watched(migration_id: str, happening: Happening, refusal: Refusal | None = None) -> None:
            record = self.runtime._migrator._records.get(migration_id)
            if record is not None:
                self.pairs.append((record.migration.state, happening))
            happen(migration_id, happening, refusal)

        self.runtime._migrator.happen = watched  # type: ignore[method-assign]

    def prepare(self, options: Sequence[str]) -> Build:
        """See EngineSource."""
        raise ConfigError("cannot be changed", option=options[0])

    async def note(self, builds: Collection[Build]) -> None:
        """See EngineSource."""
        self.noted.append(sorted(build.number for build in builds))

    @property
    def own_builds(self) -> Mapping[str, Build]:
        """See EngineSource."""
        return self.own

    @property
    def first_builds(self) -> Mapping[str, Build]:
        """See EngineSource."""
        return self.own

    async def check(self, build: Build) -> None:
        """See EngineSource."""

    async def has_room(self, *, shared: bool) -> bool:  # noqa: ARG002 - none is shared
        """See EngineSource."""
        return len(self.placed) < self._max_instances

    def place(self, instance_id: str, build: Build | None = None) -> Callable[[int], SimulatedEngine]:  # noqa: ARG002
        """See EngineSource."""
        if len(self.placed) >= self._max_instances:
            raise ScalingRefusedError("no place left")
        assert instance_id not in self.engines, "an id is used twice"
        self.placed.add(instance_id)
        self.engines[instance_id] = []
        return self._factory(instance_id)

    def release(self, instance_id: str) -> None:
        """See EngineSource."""
        self.placed.remove(instance_id)

    def _factory(self, instance_id: str) -> Callable[[int], SimulatedEngine]:
        def make(n_start: int) -> SimulatedEngine:
            error = self._start_error(instance_id, n_start)
            engine = SimulatedEngine(
                instance_id, n_start, self._capacity, times=self._times, start_error=error,
                node=self._nodes.get(instance_id, ""),
            )  # fmt: skip
            self.engines[instance_id].append(engine)
            return engine

        return make

    def __getitem__(self, instance_id: str) -> SimulatedEngine:
        """The engine of an instance's latest start."""
        return self.engines[instance_id][-1]

    async def __aenter__(self) -> Self:
        """Start."""
        self._handler = _Defects(self.defects)
        logging.getLogger("cascadeinfer").addHandler(self._handler)
        await self.runtime.start()
        self._pump = asyncio.get_running_loop().create_task(self._listen(), name="clients")
        self._watch = asyncio.get_running_loop().create_task(self._watch_attempts(), name="watch")
        return self

    async def __aexit__(self, exc_type: object, exc: object, traceback: object) -> None:
        """Stop; assert that nothing is left unless the test has failed already."""
        try:
            if exc_type is None:
                await self.settled()
        finally:
            await self.runtime.stop(0.0)
            for task in (self._pump, self._watch):
                if task is not None:
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
            logging.getLogger("cascadeinfer").removeHandler(self._handler)
        if exc_type is None:
            assert not self.defects, self.defects
            loop = asyncio.get_running_loop()
            assert isinstance(loop, VirtualTimeLoop)
            assert not loop.timers(), loop.timers()
            assert not list(self.registry.collect())

    async def _listen(self) -> None:
        while True:
            for delta in (await self.runtime.next_outputs()).outputs:
                self.clients[delta.request_id].hear(delta)

    def _observe(self, now_s: float, event: Event, effects: Sequence[Effect], failed: str | None = None) -> None:
        """The policy places nothing on an instance whose state forbids it, unless it has failed before."""
        for effect in effects:
            if isinstance(effect, Dispatch) and not self.runtime._driver._failures:
                self._check_place(effect)
        if self._observer is not None:
            self._observer(now_s, event, effects, failed)

    def _check_place(self, effect: Dispatch) -> None:
        lives = {record.instance_id: record.life for record in self.runtime.fleet}
        life = lives[effect.instance_id]
        in_need = not any(other.allows(Deed.TAKE) for other in lives.values())
        # The policy is told of a condemned instance only once it is dead.
        if (
            not life.allows(Deed.TAKE_IN_NEED if in_need else Deed.TAKE)
            and life.state is not instance_state.State.CONDEMNED
        ):
            self.defects.append(f"{effect}, but {life}")

    async def _watch_attempts(self) -> None:
        """A live engine never keeps working on an attempt that the runtime has given up."""
        before: set[tuple[str, str]] = set()
        twice: set[tuple[str, str]] = set()
        while True:
            await asyncio.sleep(WATCH_S)
            now = set(self._abandoned())
            assert not now & twice, f"attempts that nobody hears and nobody aborts: {now & twice}"
            before, twice = now, now & before

    def _abandoned(self) -> Iterator[tuple[str, str]]:
        for engine in self.runtime.live_engines():
            assert isinstance(engine, SimulatedEngine)
            for sequence in engine.core.running + engine.core.waiting:
                stream = self.runtime._streams.of_attempt(sequence.engine_request_id)
                if engine.serves and (stream is None or stream.instance_id != engine.instance_id):
                    yield engine.core.core_id, sequence.engine_request_id

    def check_pump(self) -> None:
        """Raise the first error of a client or an engine."""
        for task in (self._pump, self._watch):
            if task is not None and task.done():
                task.result()

    async def submit(
        self,
        request_id: str,
        n_prompt: int = 40,
        n_output: int = 60,
        *,
        stop_at: int | None = None,
        pin_reason: PinReason | None = None,
        priority: int = 0,
        prefix_hashes: tuple[int, ...] = (),
    ) -> Client:
        """Send a request whose prompt depends on its id; it ends at output token `stop_at`, if given."""
        seed = sum(ord(c) * 31**i for i, c in enumerate(request_id))
        prompt = [(seed + 7 * i) % 32_000 for i in range(n_prompt)]
        stops = frozenset() if stop_at is None else frozenset({generate(prompt, stop_at)[-1]})
        request = EngineRequest(
            request_id, prompt, n_output, SimulatedParams(stops), pin_reason, priority, prefix_hashes
        )
        client = self.clients[request_id] = Client(request)
        await self.runtime.submit(request)
        return client

    def abort(self, client: Client) -> None:
        """Have the client leave."""
        client.left = True
        client.news.set()
        self.runtime.abort([client.request.request_id])

    def do(self, *effects: Effect) -> None:
        """Have the policy return these effects now."""
        assert isinstance(self.policy, ScriptedPolicy)
        self.policy.queue.extend(effects)
        self.runtime._driver.emit(TimerFired("test"))

    def move(self, request_id: str, target_id: str) -> str:
        """Have the policy move a request from where it is; returns the migration's id."""
        stream = self.runtime._streams.get(request_id)
        assert stream is not None
        assert stream.instance_id is not None
        self._numbers += 1
        migration_id = f"move{self._numbers}"
        reason = MigrationReason.OPERATOR
        self.do(StartMigration("test", migration_id, request_id, stream.instance_id, target_id, reason))
        return migration_id

    def migration(self, request_id: str) -> Migration | None:
        """The migration that a request takes part in."""
        stream = self.runtime._streams.get(request_id)
        return None if stream is None else stream.migration

    def where(self, request_id: str) -> str | None:
        """The instance that a request is on."""
        stream = self.runtime._streams.get(request_id)
        return None if stream is None else stream.instance_id

    async def until(self, condition: Callable[[], bool], what: str = "") -> None:
        """Wait until the condition holds."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not condition():
                    self.check_pump()
                    await asyncio.sleep(0.002)
        except TimeoutError:
            raise AssertionError(f"not within {PATIENCE_S:g} virtual seconds: {what}") from None

    async def all_up(self) -> None:
        """Wait until every instance is up."""
        await self.until(
            lambda: len(self.runtime.live_engines()) == len(self.runtime.fleet.records), "all instances up"
        )

    async def gone(self, instance_id: str) -> Departed:
        """Wait until an instance has been removed; returns how it ended."""
        await self.until(lambda: instance_id not in self.runtime.fleet.records, f"{instance_id} is gone")
        return next(d for d in self.runtime.fleet.departed if d.instance_id == instance_id)

    async def settled(self) -> None:
        """After the last request's end nothing is left, within `GRACE_S`."""
        await self.until(lambda: all(c.finish_reason is not None or c.left for c in self.clients.values()), "all ended")
        await asyncio.sleep(GRACE_S)
        self.check_pump()
        assert self.runtime.n_live_requests == 0
        assert self.placed == set(self.runtime.fleet.records), "a place was not given back"
        assert len(self.runtime._migrator) == 0
        assert not self.runtime._performer.parkings._parked
        assert self.runtime._performer.parkings.n_parked == 0
        assert not self.runtime._streams._by_attempt
        assert not list(self.runtime._streams)
        for engine in self.runtime.live_engines():
            assert isinstance(engine, SimulatedEngine)
            core = engine.core
            held = {"running": core.running, "waiting": core.waiting, "pins": core.pins, "room": core.reservations}
            held |= {"full blocks": core.precopies.pinned, "copies": core.precopies.n_copies}
            assert not any(held.values()), f"{core.core_id} still holds {held}"
            assert core.free_blocks() == core.capacity.kv_blocks
        for generation in self.engines.values():
            assert not sum(engine.core.stale_reads for engine in generation), "a pull after the lease"
        if isinstance(self.policy, LeastLoaded):
            if not self.runtime._driver._failures:
                self._check_view(self.policy.view)
            assert not self.policy.view.requests
            assert not [i for i in self.policy.view.instances.values() if i.request_ids or i.inbound or i.outbound]
            assert not [i for i in self.policy.view.instances.values() if i.kv_tokens or i.waiting]

    def _check_view(self, view: ClusterView) -> None:
        """The policy's view and the runtime agree on which instances are present, draining and suspect."""
        there = {record.instance_id: record for record in self.runtime.fleet if record.engine is not None}
        assert view.instances.keys() == there.keys()
        for instance_id, record in there.items():
            instance = view.instances[instance_id]
            assert instance.draining == (record.drain is not None), record.life
            assert instance.suspect == record.suspect, record.life


class _Defects(logging.Handler):
    """Collects log records that report a bug of ours."""

    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith(DEFECTS):
            self._messages.append(f"{message}: {record.exc_info and record.exc_info[1]!r}")

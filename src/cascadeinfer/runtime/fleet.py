"""
The directory of instances: their supervisors, what is known of them and the stages they form; also connects newcomers
to the others.

An instance is listed from before its start until its removal; it has an engine here only while it is up and connected.
Instances that were removed, or failed to start after being added, are remembered for a while (`departed`), so that
operators can see what became of them.
"""

import asyncio
import dataclasses
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from cascadeinfer.core.errors import EngineError
from cascadeinfer.core.kind import NO_TERMS, InstanceKind, InstanceTerms
from cascadeinfer.core.layout import Stage, StageLayout
from cascadeinfer.core.links import Links
from cascadeinfer.core.types import InstanceCapacity, InstanceId
from cascadeinfer.engines.build import FIRST_BUILD, FIRST_ORIGIN, Origin
from cascadeinfer.engines.protocol import Engine
from cascadeinfer.runtime.gauges import FleetGauges
from cascadeinfer.runtime.instance_state import Deed, Happening
from cascadeinfer.runtime.pairs import Pairs
from cascadeinfer.runtime.supervise import Listener, SupervisionTimes, Supervisor
from cascadeinfer.runtime.view import Departed, InstanceRecord

DEPARTED_REMEMBERED = 32


@dataclass(frozen=True, slots=True)
class LayoutNote:
    """
    Since when, and why, the stages in force are in force.

    Attributes:
        since_s: On the runtime's clock.
        why: As the policy has put it; empty when instances came or went.
        failure: What has kept the policy from changing them since; empty if nothing has.
    """

    since_s: float
    why: str
    failure: str = ""


class FleetWatcher(Protocol):
    """Notified when instances join and leave."""

    def instance_joins(self, engine: Engine) -> None:
        """It is about to take requests, for the first time or again."""
        ...

    def instance_left(self, instance_id: InstanceId) -> None:
        """It was removed for good; its id is never reused."""
        ...


class Fleet:
    """
    All instances of a runtime.

    Attributes:
        records: What is known of each instance.
        departed: The most recently removed instances.
        layout: The stages in force, as the policy has published them.
        prefill: The prefill stages in force, likewise.
        layout_note: What is known of them; None without stages.
        watchers: Notified whenever an instance joins or leaves.
        pairs: Which instances have completed the handshake with each other.
        changed: Set whenever the state of an instance changes; whoever waits for that clears it.
        links: How fast KV cache goes between their nodes, from the moves of this process.
    """

    def __init__(
        self,
        make_engines: Mapping[InstanceId, Callable[[int], Engine]],
        listener: Listener,
        times: SupervisionTimes,
        clock: Callable[[], float],
        terms: Mapping[InstanceId, InstanceTerms] | None = None,
        origins: Mapping[InstanceId, Origin] | None = None,
    ) -> None:
        """
        Args:
            make_engines: Per instance, makes its engine for the n-th start.
            listener: Notified of what happens to them.
            times: Limits and intervals of their supervision.
            clock: The time in seconds.
            terms: Roles and chunk budgets of instances; None: leave all engines as they are.
            origins: Of instances that are not started like the others, or take over the place of one that is gone.
        """
        self._terms = None if terms is None else dict(terms)
        self._clock = clock
        self._listener = listener
        self._times = times
        self.changed = asyncio.Event()
        self.records: dict[InstanceId, InstanceRecord] = {}
        self._heir_of: dict[InstanceId, InstanceId] = {}
        for instance_id, make in make_engines.items():
            self.add(instance_id, make, (origins or {}).get(instance_id, FIRST_ORIGIN))
        self.departed: deque[Departed] = deque(maxlen=DEPARTED_REMEMBERED)
        self.watchers: list[FleetWatcher] = []
        self.layout: StageLayout | None = None
        self.prefill: tuple[Stage, ...] = ()
        self.layout_note: LayoutNote | None = None
        self.links = Links()
        self.pairs = Pairs(self.live_engines, self._condemn, self._may_exchange)

    def __iter__(self) -> Iterator[InstanceRecord]:
        """All instances, up or not; safe against concurrent changes."""
        return iter(list(self.records.values()))

    def __getitem__(self, instance_id: InstanceId) -> InstanceRecord:
        """What is known of an instance."""
        return self.records[instance_id]

    def add(
        self,
        instance_id: InstanceId,
        make_engine: Callable[[int], Engine],
        origin: Origin = FIRST_ORIGIN,
    ) -> InstanceRecord:
        """Add an instance without starting it; one that replaces another gets its role and its chunk budget."""
        assert instance_id not in self.records, f"instance {instance_id} is there already"
        replaces = origin.replaces
        if replaces is not None:
            self._heir_of[instance_id] = self._heir_of.get(replaces, replaces)
            if self._terms is not None and replaces in self._terms:
                self._terms[instance_id] = self._terms[replaces]
        supervisor = Supervisor(instance_id, make_engine, self._listener, self._times)
        record = InstanceRecord(supervisor, origin.build, replaces, self._heir_of.get(instance_id))
        record.supervisor.on_change = self.changed.set
        self.records[instance_id] = record
        return record

    def remove(self, instance_id: InstanceId, how: str, error: str | None, now_s: float) -> None:
        """Remove a stopped instance for good."""
        record = self.records[instance_id]
        record.supervisor.happen(Happening.REMOVED, how)
        del self.records[instance_id]
        self.pairs.forget(instance_id)
        self.links.left(instance_id)
        self.departed.append(Departed(instance_id, how, error, now_s, record.life))
        for watcher in self.watchers:
            watcher.instance_left(instance_id)

    def engine(self, instance_id: InstanceId) -> Engine | None:
        """The engine when it is up."""
        record = self.records.get(instance_id)
        return None if record is None else record.engine

    def wake(self, instance_id: InstanceId) -> None:
        """Something is being sent to an instance, whose load is therefore about to change."""
        if (record := self.records.get(instance_id)) is not None:
            record.supervisor.wake()

    def connected(self, one_id: InstanceId, other_id: InstanceId) -> bool:
        """Whether both are up and KV cache can be transferred from one to the other."""
        one, other = self.engine(one_id), self.engine(other_id)
        return one is not None and other is not None and self.pairs.connected(one, other)

    def doubt(self, target_id: InstanceId, source_id: InstanceId, why: str) -> None:
        """A read has not come to an end: nothing moves between the two until the target reaches the source."""
        target, source = self.engine(target_id), self.engine(source_id)
        if target is not None and source is not None:
            self.pairs.doubt(target, source, why)

    def model_version_of(self, instance_id: InstanceId) -> str:
        """The version of the model that an instance runs."""
        record = self.records.get(instance_id)
        return FIRST_BUILD.model_version if record is None else record.build.model_version

    def _may_exchange(self, one: Engine, other: Engine) -> bool:
        groups = {self.records[engine.instance_id].build.kv_group for engine in (one, other)}
        return len(groups) == 1

    def live_engines(self) -> list[Engine]:
        """Engines that are up, in the order in which they were made known."""
        return [record.engine for record in self.records.values() if record.engine is not None]

    def publish(self, layout: StageLayout, why: str, failure: str = "", prefill: tuple[Stage, ...] = ()) -> None:
        """
        These stages are in force from now on, if they were not before.

        Args:
            layout: The stages in which requests decode.
            why: See `LayoutNote`.
            failure: Likewise; with one, the reason for the stages stays, too.
            prefill: The prefill stages.
        """
        since_s, note = self._clock(), self.layout_note
        if note is not None and (layout, prefill) == (self.layout, self.prefill):
            since_s = note.since_s
        if note is not None and failure:
            why = note.why
        self.layout, self.prefill, self.layout_note = layout, prefill, LayoutNote(since_s, why, failure)

    def gauges(self) -> FleetGauges:
        """All instances for Prometheus."""
        broken = Counter(instance_id for pair in self.pairs.broken() for instance_id in pair.instance_ids)
        return FleetGauges(
            [record.gauges(self.layout, broken[record.instance_id]) for record in self],
            self.layout,
            None if self.layout_note is None else self._clock() - self.layout_note.since_s,
            self.links.known(),
        )

    async def start(self) -> None:
        """
        Start all in parallel; returns when every one is up.

        Raises:
            EngineError: An instance did not start. Others may be running: call `stop`.
        """
        starts = [asyncio.ensure_future(record.supervisor.start()) for record in self]
        self.pairs.strict = True
        try:
            await asyncio.gather(*starts)
            for record in self:
                await record.first_up()
        finally:
            for start in starts:
                start.cancel()
            self.pairs.strict = False

    async def join(self, engine: Engine, capacity: InstanceCapacity) -> InstanceKind:
        """
        An instance has started: connect it to all that are up. It counts as up from now on.

        Returns:
            What it is.

        Raises:
            EngineError: It cannot be connected, and the fault is its own.
        """
        terms, started_tokens = (self._terms or {}).get(engine.instance_id, NO_TERMS), capacity.max_batched_tokens
        if self._terms is not None:
            budget = await engine.set_step_budget(terms.budget_tokens)
            capacity = dataclasses.replace(capacity, max_batched_tokens=budget)
        await self.pairs.introduce(engine)
        record = self.records[engine.instance_id]  # no other has come up since its last handshake
        if not record.life.allows(Deed.JOIN):
            raise EngineError("is being removed", instance_id=engine.instance_id)
        for watcher in self.watchers:
            watcher.instance_joins(engine)
        self.links.joined(engine.instance_id, engine.node)
        return record.came_up(engine, capacity, terms.role, started_tokens)

    async def assign(self, instance_id: InstanceId, terms: InstanceTerms) -> InstanceKind | None:
        """
        Give an instance other terms, now and whenever it comes back.

        Returns:
            What it is from now on; None while it is not up.

        Raises:
            EngineError: It did not take the budget, and keeps the terms that it has.
        """
        engine, budget = self.engine(instance_id), 0
        if engine is not None:
            budget = await engine.set_step_budget(terms.budget_tokens)
        self._terms = (self._terms or {}) | {instance_id: terms}
        record = self.records.get(instance_id)
        if engine is None or record is None or record.engine is not engine:
            return None  # if it is coming back, it gets them when it is up
        return record.changed(InstanceTerms(terms.role, budget))

    def follow_terms(self, instance_id: InstanceId, terms: InstanceTerms) -> InstanceKind | None:
        """
        The front end that plans for all has given an instance these terms.

        Returns:
            What it is from now on; None if it has them already, or is not up here.
        """
        record = self.records[instance_id]
        if record.engine is None or record.kind is None or record.kind == record.kind.with_terms(terms):
            return None
        return record.changed(terms)

    def went_down(self, instance_id: InstanceId, why: str) -> InstanceRecord:
        """It is out of use, or never was in use; its next life starts without handshakes."""
        record = self.records[instance_id]
        record.went_down(why)
        self.pairs.forget(instance_id)
        for other in self:
            if other is not record:
                other.supervisor.wake(must_answer=True)  # what was there goes to those that answer
        return record

    async def stop(self, timeout_s: float) -> None:
        """Stop all for good."""
        await self.pairs.stop()
        await asyncio.gather(*(record.supervisor.stop(timeout_s) for record in self))
        await self.pairs.stop()  # what the last ones have begun

    def _condemn(self, engine: Engine, why: str) -> None:
        if self.engine(engine.instance_id) is engine:
            self.records[engine.instance_id].supervisor.condemn(engine, why)

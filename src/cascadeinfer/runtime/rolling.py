"""
The rolling update: replaces all instances by others with new engine options, one by one, while they serve.

Theory of operation. Where a place is free, a new instance is added, and once it is up, an old one is drained: its
requests move to the others live where that is possible, else they finish there. Where none is free, the old one is
drained first, and the new one gets its place. The next old instance is touched only when all others are ready, so that
never more than one is missing on account of this; instances that die by themselves are waited for, and an old one that
is down is replaced first. The new one takes over the stage of the one that it replaces.

A new instance that does not come up, or that keeps dying, ends the update: it is removed, one with the old options is
started if there are fewer instances than before, and all that run go on, each restarted with the options that it has.

Which options may change, and what becomes of KV caches and running requests, is the source's to say
(`engines.source.EngineSource.prepare`); `versions.py` keeps requests with their version of the model.
"""

import asyncio
import enum
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from cascadeinfer.core.errors import ConfigError, ScalingRefusedError
from cascadeinfer.core.types import InstanceId
from cascadeinfer.engines.build import Build
from cascadeinfer.engines.source import EngineSource
from cascadeinfer.runtime.fleet import Fleet
from cascadeinfer.runtime.instance_state import FIRST, Deed
from cascadeinfer.runtime.view import InstanceRecord

logger = logging.getLogger(__name__)

MAX_DEATHS: Final = 3
"""A new instance that has died so often, within the window of its restarts, will not do better."""


class Phase(enum.StrEnum):
    """How far a rolling update is."""

    ROLLING = "rolling"
    DONE = "done"
    FAILED = "failed"


class Told(NamedTuple):
    """A line for the operator, and its time on the runtime's clock."""

    at_s: float
    line: str


class RollFailed(Exception):  # noqa: N818 - the end of an update, with the reason for the operator
    """
    It cannot go on; see the module header.

    Attributes:
        instance_id: The new instance that is to blame, or None.
    """

    def __init__(self, message: str, instance_id: InstanceId | None = None) -> None:
        self.instance_id = instance_id
        super().__init__(message)


@dataclass(slots=True)
class Roll:
    """
    One rolling update.

    Attributes:
        build: What all instances are to be started with.
        n_instances: How many there were when it began.
        n_least: So many must be ready after one has been taken from its requests.
        timeout_s: Of each drain.
        replaced: What the old instances were started with, the last drained one at least.
        began_s: On the runtime's clock.
        ended_s: Likewise; None before.
        error: Why it has failed, and what to do.
    """

    build: Build
    n_instances: int
    n_least: int
    timeout_s: float
    replaced: Build
    began_s: float
    phase: Phase = Phase.ROLLING
    n_replaced: int = 0
    ended_s: float | None = None
    error: str | None = None
    told: list[Told] = field(default_factory=list)


class Rolling:
    """
    See the module header.

    Attributes:
        roll: The update under way, or the last one.
    """

    def __init__(
        self,
        fleet: Fleet,
        source: EngineSource | None,
        add: Callable[[Build, InstanceId | None], InstanceId],
        drain: Callable[[InstanceId, float], InstanceRecord],
        clock: Callable[[], float],
    ) -> None:
        """
        Args:
            fleet: The instances.
            source: Makes the new ones; None: whoever starts them is elsewhere.
            add: Adds an instance of a build, to take over the stage of another.
            drain: Drains an instance, within a time in seconds.
            clock: The time in seconds.
        """
        self._fleet = fleet
        self._source = source
        self._add = add
        self._drain = drain
        self._clock = clock
        self._is_preparing = False
        self._task: asyncio.Task[None] | None = None
        self.roll: Roll | None = None

    @property
    def is_under_way(self) -> bool:
        """Whether an update is being prepared or under way."""
        return self._is_preparing or (self.roll is not None and self.roll.phase is Phase.ROLLING)

    def refuse_meanwhile(self) -> None:
        """Raises ScalingRefusedError while an update is under way."""
        if self.is_under_way:
            raise ScalingRefusedError("a rolling update is under way; GET /admin/roll shows it")

    async def begin(self, options: Sequence[str], timeout_s: float) -> Roll:
        """
        Check engine options; then replace, in the background, all instances that have others.

        Args:
            options: Words of a command line: what changes against the options in force.
            timeout_s: What is left of an old instance's requests after this time continues elsewhere, recomputed.

        Raises:
            ConfigError: These options cannot be rolled out; nothing was touched.
            ScalingRefusedError: Another update is under way, or there is no room.
        """
        self.refuse_meanwhile()
        if self._source is None:
            raise ConfigError("engines that others start are updated by whoever starts them")
        self._is_preparing = True
        try:
            self.roll = await self._prepared(self._source, options, timeout_s)
        finally:
            self._is_preparing = False
        self._task = asyncio.get_running_loop().create_task(self._run(self.roll, self._source), name="roll")
        return self.roll

    async def _prepared(self, source: EngineSource, options: Sequence[str], timeout_s: float) -> Roll:
        build = await asyncio.to_thread(source.prepare, options)
        present = self._present()
        if all(record.build == build for record in present):
            raise ConfigError("all instances have these options already")
        if len(present) == 1 and not source.has_room(shared=True):
            raise ScalingRefusedError("the only instance serves, and there is no free place for a new one beside it")
        try:
            await source.note({record.build for record in present} | {build})
        except OSError as error:
            raise ScalingRefusedError(f"that an update is under way cannot be written down: {error}") from error
        n_begun = sum(record.life.state not in FIRST for record in present)
        return Roll(build, len(present), n_begun - 1, timeout_s, source.build, self._clock())

    def shown(self) -> dict[str, Any]:
        """The JSON of `/admin/roll`, documented in `docs/operating.md`."""
        roll = self.roll
        if roll is None:
            return {"state": "none"}
        until_s = self._clock() if roll.ended_s is None else roll.ended_s
        present = self._present()
        return {
            "state": roll.phase.value,
            "build": roll.build.number,
            "options": list(roll.build.options),
            "old": [record.instance_id for record in present if record.build != roll.build],
            "new": [record.instance_id for record in present if record.build == roll.build],
            "instances": roll.n_instances,
            "replaced": roll.n_replaced,
            "seconds": round(until_s - roll.began_s, 1),
            "lines": [{"seconds": round(told.at_s - roll.began_s, 1), "line": told.line} for told in roll.told],
            "error": roll.error,
        }

    async def stop(self) -> None:
        """The server stops: touch no further instance."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self, roll: Roll, source: EngineSource) -> None:
        try:
            while self._old(roll):
                await self._replace_one(roll, source)
        except RollFailed as failed:
            await self._restore(roll, failed.instance_id)
            await self._note_end(roll, source)
            self._fail(roll, str(failed))
        except ScalingRefusedError as refused:
            await self._note_end(roll, source)
            self._fail(roll, str(refused))
        except Exception as error:  # a bug of ours must not leave an operator waiting
            logger.exception("internal error in a rolling update")
            self._fail(roll, f"internal error: {error!r}")
        else:
            source.build = roll.build
            await self._note_end(roll, source)
            roll.phase = Phase.DONE
            self._tell(roll, "done: all instances have the new options")
        finally:
            roll.ended_s = self._clock()

    async def _note_end(self, roll: Roll, source: EngineSource) -> None:
        try:
            await source.note({record.build for record in self._present()})
        except OSError as error:
            self._tell(roll, f"the end of the update cannot be written down: {error}", logging.ERROR)

    def _fail(self, roll: Roll, why: str) -> None:
        roll.phase = Phase.FAILED
        old = [record.instance_id for record in self._old(roll)]
        n_new = len(self._present()) - len(old)
        roll.error = (
            f"{why.rstrip('.')}; with the old options go on: {', '.join(old) or 'none'}; with the new ones: {n_new} "
            f"(to go on, roll again with options that work{'; to go back, roll without options' if n_new else ''})"
        )
        self._tell(roll, f"stopped: {roll.error}", logging.ERROR)

    async def _replace_one(self, roll: Roll, source: EngineSource) -> None:
        is_alone = len(self._present()) == 1
        has_room = source.has_room(shared=is_alone)
        chosen = min(self._old(roll), key=_is_ready)
        new_id = self._added_beside(roll, chosen, is_alone=is_alone) if has_room else None
        if new_id is not None:
            await self._until_up(roll, new_id)
        victim = await self._replaceable(roll, None if new_id is None else chosen)
        if victim is None:
            return
        self._drain(victim.instance_id, roll.timeout_s)
        roll.replaced = victim.build
        assert victim.drain is not None
        self._tell(roll, f"instance {victim.instance_id} hands over its requests ({victim.drain.n_requests})")
        await self._until(lambda: victim.instance_id not in self._fleet.records)
        self._tell(roll, f"instance {victim.instance_id} is gone")
        if new_id is None:
            try:
                new_id = self._add_new(roll, victim, "in its place")
            except ScalingRefusedError as refused:
                raise RollFailed(str(refused)) from refused
            await self._until_up(roll, new_id)
        roll.n_replaced += 1

    def _added_beside(self, roll: Roll, old: InstanceRecord, *, is_alone: bool) -> InstanceId | None:
        try:
            return self._add_new(roll, old, "beside it")
        except ScalingRefusedError:  # a place, but no memory: once another has left, there may be some
            if is_alone:
                raise
            return None

    def _add_new(self, roll: Roll, old: InstanceRecord, where: str) -> InstanceId:
        instance_id = self._add(roll.build, old.instance_id)
        self._tell(roll, f"instance {instance_id} starts for instance {old.instance_id}, {where}")
        return instance_id

    async def _restore(self, roll: Roll, bad_id: InstanceId | None) -> None:
        """After a failure: without the instance that is to blame, and with as many as before."""
        try:
            bad = None if bad_id is None else self._fleet.records.get(bad_id)
            if bad is not None and bad.life.allows(Deed.BE_DRAINED):
                self._drain(bad.instance_id, roll.timeout_s)
            await self._until(lambda: bad_id not in self._fleet.records)
            while len(self._present()) < roll.n_instances:
                self._tell(roll, f"instance {self._add(roll.replaced, None)} starts with the old options")
        except ScalingRefusedError as refused:
            self._tell(roll, f"no instance could be put back: {refused}", logging.ERROR)

    async def _replaceable(self, roll: Roll, chosen: InstanceRecord | None) -> InstanceRecord | None:
        """
        Wait until an old instance may go, and return it; None if all have gone by themselves.

        Args:
            roll: The update.
            chosen: The one that a new instance has come up for, or None; else those that are down go first.
        """
        while (victim := self._next_victim(roll, chosen)) is None and self._old(roll):
            self._check_deaths(roll)
            await self._next_change()
        return victim

    def _next_victim(self, roll: Roll, chosen: InstanceRecord | None) -> InstanceRecord | None:
        for record in sorted(self._old(roll), key=lambda record: (record is not chosen, _is_ready(record))):
            n_others = sum(_is_ready(other) for other in self._present() if other is not record)
            if n_others >= (max(1, roll.n_least) if _is_ready(record) else 1):
                return record
        return None

    async def _until_up(self, roll: Roll, instance_id: InstanceId) -> None:
        record = self._fleet[instance_id]
        await self._until(lambda: record.settled.is_set() or instance_id not in self._fleet.records)
        if record.engine is not None:
            self._tell(roll, f"instance {instance_id} is up")
            return
        gone = (gone.error for gone in self._fleet.departed if gone.instance_id == instance_id)
        why = next(gone, None) or f"instance {instance_id}: {record.last_error}"
        raise RollFailed(why, instance_id)

    def _check_deaths(self, roll: Roll) -> None:
        now_s = asyncio.get_running_loop().time()
        for record in self._present():
            if record.build == roll.build and len(record.supervisor.back_off.in_window(now_s)) >= MAX_DEATHS:
                raise RollFailed(
                    f"instance {record.instance_id} keeps dying ({record.supervisor.last_error})", record.instance_id
                )

    async def _until(self, fact: Callable[[], bool]) -> None:
        """Wait for a fact about the states of instances."""
        while not fact():
            await self._next_change()

    async def _next_change(self) -> None:
        self._fleet.changed.clear()
        await self._fleet.changed.wait()

    def _present(self) -> list[InstanceRecord]:
        """Instances that are neither drained nor removed."""
        return [record for record in self._fleet if record.life.allows(Deed.BE_DRAINED)]

    def _old(self, roll: Roll) -> list[InstanceRecord]:
        return [record for record in self._present() if record.build != roll.build]

    def _tell(self, roll: Roll, line: str, level: int = logging.INFO) -> None:
        roll.told.append(Told(self._clock(), line))
        logger.log(level, "rolling update: %s", line)


def _is_ready(record: InstanceRecord) -> bool:
    """Whether it takes requests, if need be while a report of it is overdue."""
    return record.life.allows(Deed.TAKE_IN_NEED)

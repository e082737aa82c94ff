"""
Adds and drains instances while the others serve.

An added instance starts in the background and joins like any other: it is connected to all that are up, then the policy
may use it. If its first start fails, it is given up, its place is freed, and `Fleet.departed` says why. Ids are never
reused.

A draining instance takes no new requests. The policy migrates its running requests live; those that cannot move finish
there. Once it is empty and no other process uses it, or its time is up, it is stopped and forgotten. Requests still
there when the time is up continue elsewhere from prompt and output so far, as after a death. An instance that dies
while draining is not restarted. One that is starting, or down, is removed at once.
"""

import asyncio
import itertools
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from cascadeinfer.core.errors import EngineError, ScalingRefusedError, UnknownInstanceError
from cascadeinfer.core.events import Event, InstanceDraining
from cascadeinfer.core.types import InstanceId
from cascadeinfer.engines.build import FIRST_ORIGIN, Build, Origin
from cascadeinfer.engines.patience import within
from cascadeinfer.engines.protocol import Engine
from cascadeinfer.engines.source import EngineSource
from cascadeinfer.runtime.fleet import Fleet
from cascadeinfer.runtime.instance_state import FIRST, Deed, Happening, State
from cascadeinfer.runtime.migrate import Migrator
from cascadeinfer.runtime.rolling import Rolling
from cascadeinfer.runtime.streams import StreamTable
from cascadeinfer.runtime.supervise import Listener
from cascadeinfer.runtime.view import Drain, InstanceRecord

logger = logging.getLogger(__name__)

MAX_INSTANCES = 1024
DID_NOT_START = "did not start"
"""How an instance has left that was added and never came up."""
STOP_TIMEOUT_S = 5.0
"""Time for an idle instance's process to exit before it is killed."""


class Elasticity:
    """
    See the module header.

    Attributes:
        rolling: Replaces all instances by others, one by one.
        used_elsewhere: Whether another process may send requests to an instance, or has some there.
    """

    def __init__(
        self,
        fleet: Fleet,
        streams: StreamTable,
        migrator: Migrator,
        listener: Listener,
        emit: Callable[[Event], None],
        clock: Callable[[], float],
        source: EngineSource | None,
    ) -> None:
        """
        Args:
            fleet: The instances.
            streams: The live requests.
            migrator: The migrations under way.
            listener: Notified when an instance is taken from its requests.
            emit: Takes events for the policy.
            clock: The time in seconds.
            source: Makes engines for added instances; None if none can be added.
        """
        self._fleet = fleet
        self._streams = streams
        self._migrator = migrator
        self._listener = listener
        self._emit = emit
        self._clock = clock
        self._source = source
        highest = max((int(name) for name in fleet.records if name.isdecimal()), default=-1)
        self._numbers = itertools.count(max(highest + 1, len(fleet.records)))
        self._tasks: dict[InstanceId, asyncio.Task[None]] = {}
        self._stopping = False
        self.used_elsewhere: Callable[[InstanceId], bool] = lambda _: False
        self.rolling = Rolling(
            fleet, source, lambda build, replaced: self.add(1, build, replaced)[0], self.drain, clock
        )

    def add(self, count: int = 1, build: Build | None = None, replaces: InstanceId | None = None) -> list[InstanceId]:
        """
        Add instances; they start in the background.

        Args:
            count: How many.
            build: What they are started with; None: what all are that are added now.
            replaces: The instance whose place among the stages one is to take over.

        Returns:
            Their ids.

        Raises:
            ScalingRefusedError: There is not enough room for all of them; none was added.
        """
        self._refuse_when_stopping()
        if self._source is None:
            raise ScalingRefusedError("instances cannot be added to this server")
        if len(self._fleet.records) + count > MAX_INSTANCES:
            raise ScalingRefusedError(
                f"{len(self._fleet.records)} instances and {count} more are above {MAX_INSTANCES}"
            )
        origin = Origin(build or self._source.build, replaces)
        placed: dict[InstanceId, Callable[[int], Any]] = {}
        try:
            for _ in range(count):
                instance_id = str(next(self._numbers))
                placed[instance_id] = self._source.place(instance_id, origin.build)
        except BaseException:
            for instance_id in placed:
                self._source.release(instance_id)
            raise
        for instance_id, make in placed.items():
            self._spawn(instance_id, self._start(self._fleet.add(instance_id, make, origin)))
        return list(placed)

    def adopt(
        self, instance_id: InstanceId, make_engine: Callable[[int], Engine], origin: Origin = FIRST_ORIGIN
    ) -> None:
        """Take in an instance that another process added or restarted; it joins once it is up."""
        if not self._stopping:
            self._spawn(instance_id, self._start(self._fleet.add(instance_id, make_engine, origin)))

    def drain(self, instance_id: InstanceId, timeout_s: float) -> InstanceRecord:
        """
        Empty an instance, then stop and remove it.

        Args:
            instance_id: The instance.
            timeout_s: After this time its remaining requests continue elsewhere and are recomputed.

        Raises:
            UnknownInstanceError: There is no such instance.
            ScalingRefusedError: It is already draining or being removed, or it is the last one that could serve.
        """
        self._refuse_when_stopping()
        record = self._fleet.records.get(instance_id)
        if record is None:
            raise UnknownInstanceError(instance_id)
        if not record.life.allows(Deed.BE_DRAINED):
            how = "is being removed" if record.life.state is State.REMOVING else "drains"
            raise ScalingRefusedError(f"instance {instance_id} {how} already")
        is_first = record.life.state in FIRST
        others = [other for other in self._fleet if other is not record and other.life.allows(Deed.TAKE_IN_NEED)]
        if not is_first and not others:
            raise ScalingRefusedError(
                f"no instance but {instance_id} is up: its requests would have nowhere to go "
                "(add one, wait until it is up)"
            )
        now_s = self._clock()
        record.drain = Drain(now_s, now_s + timeout_s, len(self._streams.on_instance(instance_id)))
        was_in_use = record.engine is not None
        record.supervisor.happen(Happening.DRAIN)
        if (start := self._tasks.get(instance_id)) is not None:
            start.cancel()
        if was_in_use:
            self._emit(InstanceDraining(f"drain:{instance_id}", instance_id))
            self._spawn(instance_id, self._empty(record, record.drain, timeout_s))
        else:
            how = "removed before it was up" if is_first else "removed while down"
            self._spawn(instance_id, self._put_away(record, how))
        return record

    def look(self, record: InstanceRecord) -> None:
        """An instance has reported or gone down: if it is draining, it may be empty now."""
        if record.drain is not None:
            record.drain.news.set()

    def look_at_all(self) -> None:
        """Another process has said which instances it uses: those that are draining may be empty now."""
        for record in self._fleet:
            self.look(record)

    def in_use(self) -> list[InstanceId]:
        """Instances to which this process may send requests, now or once they are up, or where it has some."""
        return [record.instance_id for record in self._fleet if record.drain is None or self._has_own(record)]

    async def stop(self) -> None:
        """Abandon what is under way; the fleet stops all instances."""
        self._stopping = True
        await self.rolling.stop()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _refuse_when_stopping(self) -> None:
        if self._stopping:
            raise ScalingRefusedError("the server is stopping")

    async def _start(self, record: InstanceRecord) -> None:
        try:
            await record.supervisor.start()
        except Exception as error:  # whatever it is, it must not harm the others
            if not isinstance(error, EngineError):
                logger.exception("added instance %s did not start", record.instance_id)
            await record.supervisor.stop(0.0)
            self._remove(record, DID_NOT_START, str(error))

    async def _empty(self, record: InstanceRecord, drain: Drain, timeout_s: float) -> None:
        def begin_anew(_slept_s: float) -> None:
            drain.ends_s = self._clock() + timeout_s

        error, ended = None, Happening.EMPTIED
        try:
            await within(timeout_s, self._until_empty(record, drain), begin_anew)
        except TimeoutError:
            left = len(self._streams.on_instance(record.instance_id))
            error = f"time-out after {timeout_s:g} s: {left} requests were taken from it"
            ended = Happening.DRAIN_OVERDUE
            logger.warning("instance %s: drain %s", record.instance_id, error)
        if record.engine is None:
            await self._put_away(record, "died while it drained", record.last_error)
            return
        record.supervisor.happen(ended)
        self._listener.instance_down(record.instance_id, "drained", planned=True)
        await self._put_away(record, "drained", error)

    async def _put_away(self, record: InstanceRecord, how: str, error: str | None = None) -> None:
        """Stop what remains of an instance that is out of use."""
        try:
            await record.supervisor.stop(STOP_TIMEOUT_S)
        finally:
            self._remove(record, how, error)

    async def _until_empty(self, record: InstanceRecord, drain: Drain) -> None:
        while record.engine is not None and not self._is_empty(record):
            drain.news.clear()
            await drain.news.wait()

    def _is_empty(self, record: InstanceRecord) -> bool:
        report = record.report
        return not (
            report.n_running or report.n_waiting or self._has_own(record) or self.used_elsewhere(record.instance_id)
        )

    def _has_own(self, record: InstanceRecord) -> bool:
        """Whether requests of this process are there, or on their way from or to it."""
        return bool(self._streams.on_instance(record.instance_id)) or self._migrator.involves(record.instance_id)

    def _remove(self, record: InstanceRecord, how: str, error: str | None) -> None:
        instance_id = record.instance_id
        self._fleet.remove(instance_id, how, error, self._clock())
        if self._source is not None:
            self._source.release(instance_id)
        logger.warning("instance %s is gone: %s", instance_id, how if error is None else f"{how} ({error})")

    def _spawn(self, instance_id: InstanceId, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work, name=f"scaling-{instance_id}")
        self._tasks[instance_id] = task
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks = {instance_id: other for instance_id, other in self._tasks.items() if other is not task}
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("internal error while an instance was added or drained", exc_info=error)

"""
One instance's life: start, pump its outputs, ask for its load, notice its death or silence, restart it with back-off.

A `Supervisor` runs one task per instance for as long as the runtime lives. It reports facts through the `Listener` protocol and
decides nothing.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from cascadeinfer.core.errors import EngineError
from cascadeinfer.core.events import InstanceReport
from cascadeinfer.core.types import InstanceCapacity, InstanceId
from cascadeinfer.engines.protocol import Engine, EngineCounters, EngineDied, StepOutputs
from cascadeinfer.runtime.answers import AnswerWatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SupervisionTimes:
    """
    Seconds.

    Attributes:
        report_s: Between two load reports.
        suspect_s: An instance whose report is overdue by this much is suspected: others get what is new.
        hang_s: An instance that answers nothing for this long is taken for hung and killed. Must exceed its longest step.
        backoff_first_s: Before the first restart; doubled after each failure in a row.
        backoff_max_s: At most this long.
        steady_s: After this long without a death the back-off starts anew.
    """

    report_s: float = 0.1
    suspect_s: float = 1.0
    hang_s: float = 60.0
    backoff_first_s: float = 1.0
    backoff_max_s: float = 60.0
    steady_s: float = 300.0


class Listener(Protocol):
    """Who is told."""

    async def instance_up(self, engine: Engine, capacity: InstanceCapacity) -> None:
        """It answers and has a capacity; connect it to the others, then use it. May raise EngineError."""
        ...

    def instance_outputs(self, engine: Engine, outputs: StepOutputs) -> None:
        """It sent a step's outputs."""
        ...

    def instance_reported(self, engine: Engine, report: InstanceReport, counters: EngineCounters) -> None:
        """It said how loaded it is, perhaps before it is in use."""
        ...

    def instance_suspected(self, engine: Engine) -> None:
        """Its report is overdue, perhaps before it is in use."""
        ...

    def instance_trusted(self, engine: Engine) -> None:
        """It answers in time again."""
        ...

    def instance_down(self, instance_id: InstanceId, why: str) -> None:
        """It is gone."""
        ...


class Supervisor:
    """Keeps one instance alive."""

    def __init__(
        self,
        instance_id: InstanceId,
        make_engine: Callable[[int], Engine],
        listener: Listener,
        times: SupervisionTimes,
    ) -> None:
        """
        Args:
            instance_id: Its name, the same over restarts.
            make_engine: Makes a fresh engine for the n-th start (0, 1, ...).
            listener: Who is told.
            times: Limits and intervals.
        """
        self.instance_id = instance_id
        self._make_engine = make_engine
        self._listener = listener
        self._times = times
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self._retired = False
        self.engine: Engine | None = None
        self.restarts = 0
        self.last_error = ""

    async def start(self) -> None:
        """First start; raises EngineError when the instance does not come up."""
        engine = self._make_engine(0)
        self.engine = engine
        capacity = await engine.start()
        self._task = asyncio.get_running_loop().create_task(
            self._live(engine, capacity), name=f"instance-{self.instance_id}"
        )

    def retire(self) -> None:
        """When it goes down from now on, it is not started again."""
        self._retired = True

    async def stop(self, timeout_s: float) -> None:
        """Stop the instance for good."""
        self._stopping = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self.engine is not None:
            await self.engine.stop(timeout_s)

    async def _live(self, engine: Engine, capacity: InstanceCapacity) -> None:
        failures = 0
        loop = asyncio.get_running_loop()
        while not self._stopping:
            born_s = loop.time()
            why = await self._one_life(engine, capacity)
            self.last_error = why
            logger.error("instance %s is down: %s", self.instance_id, why)
            self._listener.instance_down(self.instance_id, why)
            if self._retired:
                await self._put_away(engine)
                return
            failures = 0 if loop.time() - born_s > self._times.steady_s else failures
            started: InstanceCapacity | None = None
            while started is None:
                await self._put_away(engine)
                await asyncio.sleep(min(self._times.backoff_first_s * 2**failures, self._times.backoff_max_s))
                failures += 1
                self.restarts += 1
                try:
                    engine = self._make_engine(self.restarts)
                    self.engine = engine
                    started = await engine.start()
                except EngineError as error:
                    self.last_error = str(error)
                    logger.error("instance %s did not restart: %s", self.instance_id, error)  # noqa: TRY400 - no bug of ours
                except Exception as error:  # no port left, no memory, our own bug: the next try may do better
                    self.last_error = str(error)
                    logger.exception("instance %s did not restart", self.instance_id)
            capacity = started

    async def _put_away(self, engine: Engine) -> None:
        """What is left of a dead engine must not keep the next one from starting."""
        try:
            await engine.stop(0.0)
        except Exception:
            logger.exception("internal error while instance %s was stopped", self.instance_id)

    async def _one_life(self, engine: Engine, capacity: InstanceCapacity) -> str:
        """From up to down; returns why it went down."""
        why = "its tasks ended"
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(engine))
                group.create_task(self._ask_for_load(engine))  # from the start: it may hang while it is connected
                await self._listener.instance_up(engine, capacity)
        except* EngineDied:
            why = "its process died"
        except* EngineError as errors:
            why = "; ".join(str(error) for error in errors.exceptions)
        except* Exception as errors:  # our own bug must not end the supervision of an instance
            logger.exception("internal error; instance %s is restarted", self.instance_id, exc_info=errors)
            why = f"internal error: {errors.exceptions[0]!r}"
        return why

    async def _pump(self, engine: Engine) -> None:
        while True:
            self._listener.instance_outputs(engine, await engine.next_outputs())

    async def _ask_for_load(self, engine: Engine) -> None:
        watch = AnswerWatch(
            self._times.suspect_s,
            partial(self._listener.instance_suspected, engine),
            partial(self._listener.instance_trusted, engine),
        )
        while True:
            await asyncio.sleep(self._times.report_s)
            watch.asked()
            try:
                async with asyncio.timeout(self._times.hang_s):
                    report, counters = await engine.report()
                watch.answered()
            except TimeoutError:
                engine.kill()
                raise EngineError(
                    f"no answer for {self._times.hang_s:g} s, taken for hung", instance_id=self.instance_id
                ) from None
            finally:
                watch.stop()
            self._listener.instance_reported(engine, report, counters)

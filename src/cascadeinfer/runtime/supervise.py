"""
One instance's life: start it, pump its outputs, hear its load, notice death or silence, restart it with back-off.

Its load comes along with its outputs while it steps; when it is asked besides is said in `report_pace.py`.

Silence is measured so that this process's own pauses do not count (`core/silence.py`): a front end that was suspended
for a minute does not kill instances for it.

A `Supervisor` runs one task per instance for as long as the runtime lives. It reports facts through the `Listener`
protocol and decides nothing; what may happen next, such as a restart, is in the table of `instance_state.py`.
"""

import asyncio
import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from cascadeinfer.core.back_off import BackOff
from cascadeinfer.core.errors import EngineError
from cascadeinfer.core.events import InstanceReport
from cascadeinfer.core.types import InstanceCapacity, InstanceId
from cascadeinfer.engines.patience import within
from cascadeinfer.engines.protocol import Engine, EngineCounters, EngineDied, StepOutputs
from cascadeinfer.runtime.answers import AnswerWatch
from cascadeinfer.runtime.instance_state import Deed, Happening, InstanceLife
from cascadeinfer.runtime.report_pace import ReportPace

logger = logging.getLogger(__name__)

DEAF_REPORTS = 10
"""After this many consecutive reports of a dead side channel, the instance cannot repair it."""
DEAF = "its side channel is dead and stays so"


@dataclass(frozen=True, slots=True)
class SupervisionTimes:
    """
    Limits and intervals of supervision, in seconds.

    Attributes:
        report_s: Between two load reports of an instance that has work.
        idle_report_s: Between two questions to one that has had none for a while; see `report_pace.py`.
        suspect_s: An instance whose report is overdue by this much is suspected: new requests go to others.
        hang_s: An instance that is silent for this long counts as hung and is killed. Must exceed its longest step.
        backoff_first_s: Pause before a restart after one death; doubles with each further death or failed start
            (`core/back_off.py`).
        backoff_max_s: Longest pause.
        window_s: How long a death counts.
    """

    report_s: float = 0.1
    idle_report_s: float = 1.0
    suspect_s: float = 1.0
    hang_s: float = 60.0
    backoff_first_s: float = 1.0
    backoff_max_s: float = 60.0
    window_s: float = 600.0


class Listener(Protocol):
    """Notified of what happens to an instance."""

    async def instance_up(self, engine: Engine, capacity: InstanceCapacity) -> None:
        """It answers and has a capacity: connect it to the others, then use it. May raise EngineError."""
        ...

    def instance_outputs(self, engine: Engine, outputs: StepOutputs) -> None:
        """It sent a step's outputs."""
        ...

    def instance_reported(
        self, engine: Engine, report: InstanceReport, counters: EngineCounters, asked_s: float | None
    ) -> None:
        """
        It reported its load, perhaps before it is in use; the query was sent at that time on the loop's clock, or none
        was.
        """
        ...

    def instance_suspected(self, engine: Engine) -> None:
        """Its report is overdue, perhaps before it is in use."""
        ...

    def instance_trusted(self, engine: Engine) -> None:
        """It answers in time again."""
        ...

    def instance_down(self, instance_id: InstanceId, why: str, *, planned: bool = False) -> None:
        """It is gone. `planned` means on purpose, so that no request is to blame."""
        ...


class Supervisor:
    """
    Keeps one instance alive.

    Attributes:
        life: Its state and history; changed only through `happen`.
        engine: The engine of its last start.
        restarts: Number of restarts, attempts included.
        back_off: Its recent deaths.
        next_start_s: When it will be restarted, on the loop's clock; None while it is up or starting.
        condemned: Why it is being restarted although no request is to blame; None if it is not.
        on_change: Called after each change of its state.
    """

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
            listener: Notified of what happens.
            times: Limits and intervals.
        """
        self.instance_id = instance_id
        self._make_engine = make_engine
        self._listener = listener
        self._times = times
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self._pace = ReportPace(times.report_s, times.idle_report_s)
        self._heard_s = 0.0
        self.life = InstanceLife(instance_id)
        self.engine: Engine | None = None
        self.restarts = 0
        self.last_error = ""
        self.back_off = BackOff(times.backoff_first_s, times.backoff_max_s, times.window_s)
        self.next_start_s: float | None = None
        self.condemned: str | None = None
        self.on_change: Callable[[], None] = lambda: None

    async def start(self) -> None:
        """First start; raises EngineError when the instance does not come up."""
        self.happen(Happening.START)
        try:
            engine = self._make_engine(0)
            self.engine = engine
            capacity = await engine.start()
        except Exception as error:
            self.happen(Happening.START_FAILED, str(error))
            raise
        self.happen(Happening.STARTED)
        self._task = asyncio.get_running_loop().create_task(
            self._live(engine, capacity), name=f"instance-{self.instance_id}"
        )

    def happen(self, happening: Happening, why: str = "") -> bool:
        """
        Something happened to it now.

        Returns:
            Whether its state has changed.

        Raises:
            InvalidTransition: That cannot happen in its state.
        """
        has_changed = self.life.happen(happening, asyncio.get_running_loop().time(), why)
        self.on_change()
        return has_changed

    def condemn(self, engine: Engine, why: str) -> None:
        """A fault that a restart cures: end this life of the instance."""
        if engine is self.engine and self.condemned is None:
            self.condemned = why
            self.happen(Happening.CONDEMNED, why)
            engine.kill()

    def wake(self, *, must_answer: bool = False) -> None:
        """It is being given something, or its answer matters now: see `ReportPace.wake`."""
        self._pace.wake(must_answer=must_answer)

    async def stop(self, timeout_s: float) -> None:
        """Stop the instance for good."""
        self._stopping = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self.engine is not None:
            await self.engine.stop(timeout_s)

    async def _live(self, engine: Engine, capacity: InstanceCapacity) -> None:
        while not self._stopping:
            why = await self._one_life(engine, capacity)
            wait_s = self._note_death(why)
            logger.error("instance %s is down: %s", self.instance_id, why)
            self.happen(Happening.DIED, why)
            self._listener.instance_down(self.instance_id, why, planned=self.condemned is not None)
            started: InstanceCapacity | None = None
            while started is None:
                await self._put_away(engine)
                if self.life.allows(Deed.BE_RESTARTED):
                    await self._wait(wait_s)
                if not self.life.allows(Deed.BE_RESTARTED):
                    return  # it is being removed
                self.restarts += 1
                self.happen(Happening.START)
                try:
                    engine = self._make_engine(self.restarts)
                    self.engine, self.condemned = engine, None
                    started = await engine.start()
                except EngineError as error:
                    wait_s = self._note_failed_start(error)
                    logger.error("instance %s did not restart: %s", self.instance_id, error)  # noqa: TRY400 - no bug of ours
                except Exception as error:  # no port left, no memory, our own bug: the next try may do better
                    wait_s = self._note_failed_start(error)
                    logger.exception("instance %s did not restart", self.instance_id)
            self.happen(Happening.STARTED)
            capacity = started

    def _note_death(self, why: str) -> float:
        """It died or did not start; returns how long to wait."""
        self.last_error = why
        return self.back_off.died(asyncio.get_running_loop().time(), why)

    def _note_failed_start(self, error: Exception) -> float:
        self.happen(Happening.START_FAILED, str(error))
        return self._note_death(str(error))

    async def _wait(self, wait_s: float) -> None:
        self.next_start_s = asyncio.get_running_loop().time() + wait_s
        try:
            await asyncio.sleep(wait_s)
        finally:
            self.next_start_s = None

    async def _put_away(self, engine: Engine) -> None:
        """Clean up a dead engine, so that it cannot keep the next one from starting."""
        try:
            await engine.stop(0.0)
        except Exception:
            logger.exception("internal error while instance %s was stopped", self.instance_id)

    async def _one_life(self, engine: Engine, capacity: InstanceCapacity) -> str:
        """From up to down; returns why it went down."""
        why = "its tasks ended"
        self._pace = ReportPace(self._times.report_s, self._times.idle_report_s)
        self._heard_s = asyncio.get_running_loop().time()
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
        return self.condemned or why

    async def _pump(self, engine: Engine) -> None:
        while True:
            outputs = await engine.next_outputs()
            told = engine.load_in(outputs)
            if told is None or outputs.outputs:
                self._listener.instance_outputs(engine, outputs)
            if told is not None:
                self._pace.came(*told)
                self._heard(engine, *told, asked_s=None)

    async def _ask_for_load(self, engine: Engine) -> None:
        pace = self._pace
        watch = AnswerWatch(
            self._times.suspect_s,
            self._times.report_s,
            partial(self._listener.instance_suspected, engine),
            partial(self._listener.instance_trusted, engine),
        )
        deaf_reports = 0
        while True:
            watch.asked(await pace.wait())
            asked_s = asyncio.get_running_loop().time()
            try:
                report, counters = await within(self._times.hang_s, engine.report(self._times.report_s))
                watch.answered()
            except TimeoutError:
                engine.kill()
                raise EngineError(
                    f"no answer for {self._times.hang_s:g} s, taken for hung", instance_id=self.instance_id
                ) from None
            finally:
                watch.stop()
            pace.reported(report, counters, in_time=not watch.is_suspect)
            self._heard(engine, report, counters, asked_s=asked_s)
            deaf_reports = 0 if counters.listens else deaf_reports + 1
            if deaf_reports == DEAF_REPORTS:
                self.condemn(engine, DEAF)
                raise EngineError(DEAF, instance_id=self.instance_id)

    def _heard(
        self, engine: Engine, report: InstanceReport, counters: EngineCounters, *, asked_s: float | None
    ) -> None:
        now_s = asyncio.get_running_loop().time()
        intervals = max(1, round((now_s - self._heard_s) / self._times.report_s))
        self._heard_s = now_s
        self._listener.instance_reported(engine, dataclasses.replace(report, intervals=intervals), counters, asked_s)

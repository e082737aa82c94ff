"""
A simulated instance's "process", which serves commands between steps, and the connection to it.

As with vLLM, commands are carried out in call order between two steps, and answers and outputs come back in order. The
death of a process is noticed a moment later, and pending calls then get an EngineError. A hung process answers nothing,
but its pinned blocks can still be pulled.

A held answer, or held outputs, delay only the delivery: the command has already taken effect at the instance. Times are
those of the running event loop.
"""

import asyncio
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cascadeinfer.core.errors import EngineError
from cascadeinfer.core.events import InstanceReport
from cascadeinfer.core.types import InstanceId
from cascadeinfer.engines.protocol import EngineCounters, EngineDied
from cascadeinfer.engines.simulated.core import SimulatedCore
from cascadeinfer.engines.simulated.model import SimulatedDelta, SimulatedTimes


@dataclass(slots=True)
class SimulatedOutputs:
    """See `cascadeinfer.engines.protocol.StepOutputs`; with the load that comes along, if one does."""

    outputs: list[Any]
    load: tuple[InstanceReport, EngineCounters] | None = None


@dataclass(slots=True)
class _Command:
    """A command on its way to the instance; `answer` is None when the sender does not wait for one."""

    name: str
    carry_out: Callable[[], Any]
    answer: asyncio.Future[Any] | None


class SimulatedProcess:
    """
    It steps a core. The faults that can befall a process are methods.

    Attributes:
        core: What it does in a step; its `alive` is this process's.
    """

    def __init__(self, instance_id: InstanceId, core: SimulatedCore, times: SimulatedTimes) -> None:
        """
        Args:
            instance_id: Its name.
            core: See above.
            times: How long things take.
        """
        self.instance_id = instance_id
        self.core = core
        self.times = times
        self._inbox: deque[_Command] = deque()
        self._news = asyncio.Event()
        self._pending: set[asyncio.Future[Any]] = set()
        self._outputs: asyncio.Queue[SimulatedOutputs | None] = asyncio.Queue()
        self._process: asyncio.Task[None] | None = None
        self._known_dead = False
        self._steps = True
        self._thawed = asyncio.Event()
        self._thawed.set()
        self._held_answers: dict[str, list[tuple[asyncio.Future[Any], Any]]] = {}
        self._held_outputs: list[SimulatedOutputs] | None = None
        self._load_interval_s = math.inf
        self._load_told_s = 0.0

    def begin(self) -> None:
        """Run from now on."""
        self._process = asyncio.get_running_loop().create_task(self._run(), name=f"simulated-{self.core.core_id}")

    async def next_outputs(self) -> SimulatedOutputs:
        """See Engine.next_outputs."""
        outputs = await self._outputs.get()
        if outputs is None:
            self._outputs.put_nowait(None)
            self._fail_pending()
            raise EngineDied(self.instance_id)
        return outputs

    def kill(self) -> None:
        """See Engine.kill; its client notices after `notice_s`."""
        if not self.core.alive:
            return
        self.core.alive = False
        if self._process is not None:
            self._process.cancel()
            asyncio.get_running_loop().call_later(self.times.notice_s, self._notice_death)

    async def end(self) -> None:
        """Stop it at once, whatever it does; harmless when it has ended."""
        self.core.alive = False
        if self._process is not None:
            self._process.cancel()
            await asyncio.wait([self._process])
            if not self._process.cancelled():
                self._process.result()  # a bug of this engine: say so
        self._notice_death()
        self._fail_pending()

    # --- faults ------------------------------------------------------------------------------------------------------

    @property
    def serves(self) -> bool:
        """Whether it takes commands: it has started, lives and does not hang."""
        return (
            self._thawed.is_set()
            and self._process is not None
            and not self._process.done()
            and not self._process.cancelling()
        )

    def pause(self) -> None:
        """Serve commands but do not step: a request neither gains a token nor ends until `unpause`."""
        self._steps = False

    def unpause(self) -> None:
        """Step again."""
        self._steps = True
        self._news.set()

    def freeze(self) -> None:
        """Neither answer nor step until `thaw`, as a process that is stopped; what is pinned can still be pulled."""
        self._thawed.clear()

    def thaw(self) -> None:
        """Go on."""
        self._thawed.set()

    def hang(self) -> None:
        """Neither answer nor step any more; what is pinned can still be pulled."""
        if self._process is not None:
            self._process.cancel()

    def hold_answers(self, command: str) -> None:
        """Carry this command out but keep its answers back until `release_answers`."""
        self._held_answers.setdefault(command, [])

    def release_answers(self, command: str) -> None:
        """Send the answers held back."""
        for future, result in self._held_answers.pop(command, []):
            self._answer(command, future, result)

    def hold_outputs(self) -> None:
        """Keep outputs back until `release_outputs`."""
        if self._held_outputs is None:
            self._held_outputs = []

    def release_outputs(self) -> None:
        """Send the outputs held back, in order."""
        held, self._held_outputs = self._held_outputs or [], None
        for outputs in held:
            self._outputs.put_nowait(outputs)

    # --- the process -------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            await self._thawed.wait()
            while self._inbox:
                self._carry_out(self._inbox.popleft())
            if self._steps and self.core.has_work() and self.times.step_model is not None:
                # Its duration depends on its contents: compute the step first, then wait, then publish the results.
                deltas = self.core.step(self._now_s())
                await asyncio.sleep(self.core.step_s)
                await self._thawed.wait()
                self._emit(deltas)
            elif self._steps and self.core.has_work():
                await asyncio.sleep(self.times.step_s)
                await self._thawed.wait()
                if self._steps:
                    self._emit(self.core.step(self._now_s()))
            else:
                self._news.clear()
                await self._news.wait()

    def _carry_out(self, command: _Command) -> None:
        result = command.carry_out()
        if command.answer is not None:
            self._answer(command.name, command.answer, result)

    def _answer(self, name: str, future: asyncio.Future[Any], result: Any) -> None:
        if name in self._held_answers:
            self._held_answers[name].append((future, result))
        elif not future.done():
            future.set_result(result)

    def _emit(self, deltas: list[SimulatedDelta]) -> None:
        if not deltas:
            return
        outputs = SimulatedOutputs(list(deltas))
        if self._now_s() - self._load_told_s >= self._load_interval_s:
            outputs.load = self.load(None)
        if self._held_outputs is not None:
            self._held_outputs.append(outputs)
        else:
            self._outputs.put_nowait(outputs)

    def load(self, next_after_s: float | None) -> tuple[InstanceReport, EngineCounters]:
        """The load as it is told now; see Engine.report."""
        self._load_told_s = self._now_s()
        if next_after_s is not None:
            self._load_interval_s = next_after_s
        return self.core.report(self._load_told_s)

    # --- the client --------------------------------------------------------------------------------------------------

    def _send(self, name: str, carry_out: Callable[[], Any], answer: asyncio.Future[Any] | None = None) -> None:
        self._inbox.append(_Command(name, carry_out, answer))
        self._news.set()

    async def _call(self, name: str, carry_out: Callable[[], Any]) -> Any:
        if self._known_dead:
            raise EngineError("died", instance_id=self.instance_id)
        future = asyncio.get_running_loop().create_future()
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        self._send(name, carry_out, future)
        return await future

    def _notice_death(self) -> None:
        if not self._known_dead:
            self._known_dead = True
            self._outputs.put_nowait(None)

    def _fail_pending(self) -> None:
        for future in list(self._pending):
            if not future.done():
                future.set_exception(EngineError("died", instance_id=self.instance_id))

    @staticmethod
    def _now_s() -> float:
        return asyncio.get_running_loop().time()

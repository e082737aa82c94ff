"""
The asynchronous side of a simulated instance: a "process" that serves commands between steps, and its client.

As with vLLM, commands are carried out in the order of the calls, between two steps, and answers and outputs come back
in order. The death of an instance is noticed a moment later, and whoever waits for its answer then gets an EngineError.
A hung instance answers nothing, but its pinned blocks can still be pulled.

Faults are injected by `kill` (part of the protocol) and the methods under "faults". Commands whose answers are held
back have already taken effect at the instance, and so have steps whose outputs are held back. Times are those of the
running event loop.
"""

import asyncio
import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cascadeinfer.core.errors import EngineError
from cascadeinfer.core.events import InstanceReport
from cascadeinfer.core.refusals import Refusal
from cascadeinfer.core.types import InstanceCapacity, InstanceId, RequestId
from cascadeinfer.engines.protocol import (
    Engine,
    EngineCounters,
    EngineDied,
    EngineRequest,
    KvTicket,
    Resume,
    TokenDelta,
)
from cascadeinfer.engines.simulated.core import CUT, SimulatedCore
from cascadeinfer.engines.simulated.model import SimulatedDelta, SimulatedTimes


@dataclass(slots=True)
class SimulatedOutputs:
    """See `cascadeinfer.engines.protocol.StepOutputs`."""

    outputs: list[Any]


@dataclass(slots=True)
class _Command:
    """A command on its way to the instance; `answer` is None when the sender does not wait for one."""

    name: str
    carry_out: Callable[[], Any]
    answer: asyncio.Future[Any] | None


class SimulatedEngine:
    """See `cascadeinfer.engines.protocol.Engine`."""

    def __init__(
        self,
        instance_id: InstanceId,
        n_start: int,
        capacity: InstanceCapacity,
        *,
        max_model_len: int = 4096,
        times: SimulatedTimes | None = None,
        start_error: str | None = None,
    ) -> None:
        """
        Args:
            instance_id: Its name.
            n_start: Which start of the instance this is; each makes a new engine.
            capacity: What it can hold.
            max_model_len: Longest sequence in tokens.
            times: How long things take.
            start_error: Why its start fails; None if it succeeds.
        """
        self.instance_id = instance_id
        self.times = times or SimulatedTimes()
        self._start_error = start_error
        self._peers: dict[str, SimulatedCore] = {}
        self.core = SimulatedCore(f"{instance_id}#{n_start}", capacity, self.times, max_model_len, self._peers.get)
        self._inbox: deque[_Command] = deque()
        self._news = asyncio.Event()
        self._pending: set[asyncio.Future[Any]] = set()
        self._outputs: asyncio.Queue[SimulatedOutputs | None] = asyncio.Queue()
        self._process: asyncio.Task[None] | None = None
        self._starting: asyncio.Task[None] | None = None
        self._known_dead = False
        self._stopped = False
        self._steps = True
        self._thawed = asyncio.Event()
        self._thawed.set()
        self._refused_connections = 0
        self._deaf = False
        self._says_it_listens = True
        self._refusals: deque[Refusal] = deque()
        self._held_answers: dict[str, list[tuple[asyncio.Future[Any], Any]]] = {}
        self._held_outputs: list[SimulatedOutputs] | None = None

    # --- the protocol ------------------------------------------------------------------------------------------------

    async def start(self) -> InstanceCapacity:
        """See Engine.start."""
        self._starting = asyncio.ensure_future(asyncio.sleep(self.times.start_s))
        try:
            await asyncio.wait([self._starting])
        finally:
            self._starting.cancel()
        if self._stopped or self._start_error is not None:
            self.core.alive = False
            raise EngineError(f"did not start: {self._start_error or 'stopped'}", instance_id=self.instance_id)
        self._process = asyncio.get_running_loop().create_task(self._run(), name=f"simulated-{self.core.core_id}")
        return self.core.capacity

    async def connect(self, peers: Sequence[Engine]) -> None:
        """See Engine.connect."""
        for peer in peers:
            assert isinstance(peer, SimulatedEngine)
            await asyncio.gather(self._handshake(peer), peer._handshake(self))  # noqa: SLF001

    async def _handshake(self, peer: "SimulatedEngine") -> None:
        await self._call("handshake", lambda: self._peers.update({peer.core.core_id: peer.core}))
        if self._refused_connections:
            self._refused_connections -= 1
            raise EngineError(f"no KV handshake with {peer.instance_id}", instance_id=self.instance_id)
        if peer._deaf:  # noqa: SLF001 - another of this class
            self._peers.pop(peer.core.core_id, None)
            raise EngineError(f"{peer.instance_id} does not answer", instance_id=self.instance_id)

    async def listens(self) -> bool:
        """See Engine.listens."""
        return bool(await self._call("listens", lambda: not self._deaf))

    async def add(self, engine_request_id: str, request: EngineRequest, resume: Resume | None = None) -> None:
        """See Engine.add."""
        self._send("add", lambda: self.core.add(engine_request_id, request, resume))

    async def abort(self, engine_request_ids: list[str]) -> None:
        """See Engine.abort."""
        self._send("abort", lambda: self.core.abort(engine_request_ids))

    async def cut(self, engine_request_id: str) -> Refusal | None:
        """See Engine.cut."""
        refused: Refusal | None = await self._call("cut", lambda: self.core.cut(engine_request_id))
        return refused

    async def undo_cut(self, engine_request_id: str) -> bool:
        """See Engine.undo_cut."""
        return bool(await self._call("undo_cut", lambda: self.core.undo_cut(engine_request_id)))

    async def reserve(self, reservation_id: str, n_tokens: int) -> Refusal | None:
        """See Engine.reserve."""

        def at_instance() -> Refusal | None:
            if self._refusals:
                return self._refusals.popleft()
            return self.core.reserve(reservation_id, n_tokens, self._now_s())

        refused: Refusal | None = await self._call("reserve", at_instance)
        return refused

    async def release_reservation(self, reservation_id: str) -> None:
        """See Engine.release_reservation."""
        await self._call("release_reservation", lambda: self.core.release_reservation(reservation_id))

    async def release_pin(self, engine_request_id: str) -> None:
        """See Engine.release_pin."""
        await self._call("release_pin", lambda: self.core.release_pin(engine_request_id))

    async def report(self) -> tuple[InstanceReport, EngineCounters]:
        """See Engine.report."""
        loaded: tuple[InstanceReport, EngineCounters] = await self._call(
            "report", lambda: self.core.report(self._now_s())
        )
        said, counters = loaded
        return said, dataclasses.replace(counters, listens=self._says_it_listens)

    async def next_outputs(self) -> SimulatedOutputs:
        """See Engine.next_outputs."""
        outputs = await self._outputs.get()
        if outputs is None:
            self._outputs.put_nowait(None)
            self._fail_pending()
            raise EngineDied(self.instance_id)
        return outputs

    def ticket_of(self, delta: TokenDelta) -> KvTicket | None:
        """See Engine.ticket_of."""
        params = delta.kv_transfer_params
        return params if params is not None and params.get(CUT) else None

    def has_dropped(self, delta: TokenDelta) -> bool:
        """See Engine.has_dropped."""
        return bool(delta.finish_reason == "abort")

    def has_failed(self, delta: TokenDelta) -> bool:
        """See Engine.has_failed."""
        return bool(delta.finish_reason == "error")

    def failure_of(self, request_id: RequestId) -> SimulatedOutputs:
        """See Engine.failure_of."""
        return SimulatedOutputs([SimulatedDelta(request_id, [], "error")])

    @property
    def pid(self) -> int | None:
        """It has no process."""
        return None

    def kill(self) -> None:
        """See Engine.kill; its client notices after `notice_s`."""
        if not self.core.alive:
            return
        self.core.alive = False
        if self._process is not None:
            self._process.cancel()
            asyncio.get_running_loop().call_later(self.times.notice_s, self._notice_death)

    async def stop(self, timeout_s: float) -> None:  # noqa: ARG002 - it never takes long
        """See Engine.stop."""
        self._stopped = True
        self.core.alive = False
        if self._starting is not None:
            self._starting.cancel()
        if self._process is not None:
            self._process.cancel()
            await asyncio.wait([self._process])
            if not self._process.cancelled():
                self._process.result()  # raises if this engine has a bug
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
        """Neither answer nor step until `thaw`, like a stopped process; what is pinned can still be pulled."""
        self._thawed.clear()

    def thaw(self) -> None:
        """End `freeze`."""
        self._thawed.set()

    def hang(self) -> None:
        """Neither answer nor step any more; what is pinned can still be pulled."""
        if self._process is not None:
            self._process.cancel()

    def hold_answers(self, command: str) -> None:
        """Carry this command out but hold its answers back until `release_answers`."""
        self._held_answers.setdefault(command, [])

    def release_answers(self, command: str) -> None:
        """Send the answers held back."""
        for future, result in self._held_answers.pop(command, []):
            self._answer(command, future, result)

    def hold_outputs(self) -> None:
        """Hold outputs back until `release_outputs`."""
        if self._held_outputs is None:
            self._held_outputs = []

    def release_outputs(self) -> None:
        """Send the outputs held back, in order."""
        held, self._held_outputs = self._held_outputs or [], None
        for outputs in held:
            self._outputs.put_nowait(outputs)

    def refuse_room(self, reason: Refusal) -> None:
        """Refuse the next reservation."""
        self._refusals.append(reason)

    def refuse_connection(self, n: int = 1) -> None:
        """Fail the next `n` handshakes that this side begins."""
        self._refused_connections += n

    def turn_deaf(self) -> None:
        """Fail all further handshakes of peers with this instance."""
        self._deaf = True

    def close_side_channel(self) -> None:
        """Close its side channel; the instance notices."""
        self._deaf = True
        self._says_it_listens = False

    def lose_pins(self) -> None:
        """Free what is pinned, so that pulls of it fail."""
        self.core.pins.clear()

    def spoil_cut(self) -> None:
        """Let the next cut take effect without KV cache to pull, as when the request was preempted in the same step."""
        self.core.spoiled_cuts += 1

    def end_all(self, finish_reason: str) -> None:
        """End every request without a token: `abort` as on SIGTERM, `error` as after an internal error."""
        everyone = [s.engine_request_id for s in self.core.running + self.core.waiting]
        self.core.abort(everyone)
        self._emit([SimulatedDelta(request_id, [], finish_reason) for request_id in everyone])

    # --- the process -------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            await self._thawed.wait()
            while self._inbox:
                self._carry_out(self._inbox.popleft())
            if self._steps and self.core.has_work() and self.times.step_model is not None:
                # The duration depends on the batch, so compute first, then wait, then emit.
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
        if self._held_outputs is not None:
            self._held_outputs.append(outputs)
        else:
            self._outputs.put_nowait(outputs)

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

"""
A simulated instance: the engine protocol on a simulated process (`process.py`), with fault injection.

Faults are `kill` (part of the protocol), those of the process, and the methods under "faults" here.
"""

import asyncio
import dataclasses
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

from cascadeinfer.core.errors import EngineError
from cascadeinfer.core.events import InstanceReport
from cascadeinfer.core.refusals import Refusal
from cascadeinfer.core.types import InstanceCapacity, InstanceId, NodeId, RequestId
from cascadeinfer.engines.protocol import (
    Engine,
    EngineCounters,
    EngineRequest,
    InstanceIdentity,
    KvTicket,
    Resume,
    StepOutputs,
    TokenDelta,
)
from cascadeinfer.engines.simulated.core import SimulatedCore
from cascadeinfer.engines.simulated.model import IDENTITY, SimulatedDelta, SimulatedTicket, SimulatedTimes
from cascadeinfer.engines.simulated.process import SimulatedOutputs, SimulatedProcess

PRECOPY_POLL_S: Final = 0.005


class SimulatedEngine(SimulatedProcess):
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
        index: int = 0,
        movable: bool = True,
        node: NodeId = "",
    ) -> None:
        """
        Args:
            instance_id: Its name.
            n_start: Which start of the instance this is; each makes a new engine.
            capacity: What it can hold.
            max_model_len: Longest sequence in tokens.
            times: How long things take.
            start_error: Why it does not start, when it shall not.
            index: Its number.
            movable: Whether it says that its requests can move.
            node: Where it says that it runs.
        """
        times = times or SimulatedTimes()
        self._peers: dict[str, SimulatedCore] = {}
        core = SimulatedCore(f"{instance_id}#{n_start}", capacity, times, max_model_len, self._peers.get)
        super().__init__(instance_id, core, times)
        self.index = index
        self.node = node
        self._movable = movable
        self._start_error = start_error
        self._starting: asyncio.Task[None] | None = None
        self._stopped = False
        self._refused_connections = 0
        self._deaf = False
        self._says_it_listens = True
        self._says_it_is_paused = False
        self._refusals: deque[Refusal] = deque()

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
        self.begin()
        return self.core.capacity

    async def stop(self, timeout_s: float) -> None:  # noqa: ARG002 - it never takes long
        """See Engine.stop."""
        self._stopped = True
        if self._starting is not None:
            self._starting.cancel()
        await self.end()

    @property
    def config(self) -> None:
        """It has none."""
        return

    @property
    def movable(self) -> bool:
        """See Engine.movable."""
        if self._process is None:
            raise EngineError("not started", instance_id=self.instance_id)
        return self._movable

    async def identity(self) -> InstanceIdentity:
        """See Engine.identity."""
        identity: InstanceIdentity = await self._call("identity", lambda: IDENTITY)
        return identity

    async def forget_client(self, client_index: int) -> int:
        """See Engine.forget_client; the process that has made it is its only client."""

        def at_instance() -> int:
            everyone = [] if client_index else self._everyone()
            if client_index == 0:
                self.core.reservations.clear()
                self.core.precopies.keep_only(set())
            self.core.abort(everyone)
            return len(everyone)

        n_requests: int = await self._call("forget_client", at_instance)
        return n_requests

    async def utility(self, method: str, *_: Any, **__: Any) -> Any:
        """See Engine.utility."""
        raise EngineError(f"has no {method}", instance_id=self.instance_id)

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

    async def reaches(self, peer: Engine) -> bool:
        """See Engine.reaches."""
        assert isinstance(peer, SimulatedEngine)

        def it_answers() -> bool:
            return peer.core.alive and not peer._deaf and peer.core.core_id not in self.core.apart_from  # noqa: SLF001

        return bool(await self._call("reaches", it_answers))

    async def add(
        self, engine_request_id: str, request: EngineRequest, resume: Resume | None = None, *, park: bool = False
    ) -> None:
        """See Engine.add."""
        self._send("add", lambda: self.core.add(engine_request_id, request, resume, park=park))

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

    async def reserve(
        self,
        reservation_id: str,
        n_tokens: int,
        *,
        for_parked: bool = False,  # noqa: ARG002 - it counts no migrations
    ) -> Refusal | None:
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

    async def renew_pin(self, engine_request_id: str) -> bool:
        """See Engine.renew_pin."""
        return bool(await self._call("renew_pin", lambda: self.core.renew_pin(engine_request_id, self._now_s())))

    async def pin_full_blocks(self, engine_request_id: str) -> SimulatedTicket | None:
        """See Engine.pin_full_blocks."""

        def at_instance() -> SimulatedTicket | None:
            return self.core.pin_full_blocks(engine_request_id, self._now_s())

        ticket: SimulatedTicket | None = await self._call("pin_full_blocks", at_instance)
        return ticket

    async def release_full_blocks(self, engine_request_id: str) -> None:
        """See Engine.release_full_blocks."""
        await self._call("release_full_blocks", lambda: self.core.precopies.pinned.pop(engine_request_id, None))

    async def precopy(self, reservation_id: str, ticket: KvTicket, pull_before_s: float) -> bool:
        """See Engine.precopy."""
        assert isinstance(ticket, SimulatedTicket)

        def precopied() -> bool | None:
            if ticket.core_id in self.core.apart_from:
                return None
            source = self._peers.get(ticket.core_id)
            return self.core.precopies.outcome(reservation_id, source, self._now_s())

        begun = await self._call(
            "precopy", lambda: self.core.precopy(reservation_id, ticket, self._now_s(), pull_before_s)
        )
        while begun and (is_here := await self._call("precopied", precopied)) is None:  # noqa: ASYNC110 - as vLLM
            await asyncio.sleep(PRECOPY_POLL_S)
        return bool(begun and is_here)

    async def set_step_budget(self, n_tokens: int | None) -> int:
        """See Engine.set_step_budget."""
        told: int | str = await self._call("set_step_budget", lambda: self.core.set_step_budget(n_tokens))
        if isinstance(told, str):
            raise EngineError(told, instance_id=self.instance_id)
        return told

    async def report(self, next_after_s: float | None = None) -> tuple[InstanceReport, EngineCounters]:
        """See Engine.report."""
        told: tuple[InstanceReport, EngineCounters] = await self._call("report", lambda: self.load(next_after_s))
        return told

    def load(self, next_after_s: float | None) -> tuple[InstanceReport, EngineCounters]:
        """With what faults make it say."""
        said, counters = super().load(next_after_s)
        return said, dataclasses.replace(counters, listens=self._says_it_listens, paused=self._says_it_is_paused)

    def load_in(self, outputs: StepOutputs) -> tuple[InstanceReport, EngineCounters] | None:
        """See Engine.load_in."""
        assert isinstance(outputs, SimulatedOutputs)
        return outputs.load

    def ticket_of(self, delta: TokenDelta) -> SimulatedTicket | None:
        """See Engine.ticket_of."""
        ticket: SimulatedTicket | None = delta.kv_transfer_params
        return ticket

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

    # --- faults ------------------------------------------------------------------------------------------------------

    def refuse_room(self, reason: Refusal) -> None:
        """Refuse the next reservation."""
        self._refusals.append(reason)

    def refuse_connection(self, n: int = 1) -> None:
        """Fail the next `n` handshakes that this side begins."""
        self._refused_connections += n

    def turn_deaf(self) -> None:
        """Fail all further handshakes of peers with this instance."""
        self._deaf = True

    def set_apart(self, peer: "SimulatedEngine", *, apart: bool = True) -> None:
        """Let what this instance reads from a peer hang, and no question reach it; or no more."""
        (self.core.apart_from.add if apart else self.core.apart_from.discard)(peer.core.core_id)

    def close_side_channel(self) -> None:
        """Close its side channel; the instance notices."""
        self._deaf = True
        self._says_it_listens = False

    def pause_by_aborting(self) -> None:
        """Abort everything because it was told to, and say in the next report that it is paused."""
        self._says_it_is_paused = True
        self.end_all("abort")

    def lose_pins(self) -> None:
        """Free what is pinned, so that pulls of it fail."""
        self.core.pins.clear()
        self.core.precopies.pinned.clear()

    def spoil_cut(self) -> None:
        """Let the next cut take effect without KV cache to pull, as when the request was preempted in the same step."""
        self.core.spoiled_cuts += 1

    def end_all(self, finish_reason: str) -> None:
        """End every request without a token: `abort` as an instance does on SIGTERM, `error` as after an internal
        error.
        """
        everyone = self._everyone()
        self.core.abort(everyone)
        self._emit([SimulatedDelta(request_id, [], finish_reason) for request_id in everyone])

    def _everyone(self) -> list[str]:
        return [s.engine_request_id for s in self.core.running + self.core.waiting]

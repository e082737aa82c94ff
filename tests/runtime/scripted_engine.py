"""
An engine that does nothing by itself: the test decides what it answers, what it sends and when it dies.

It computes nothing and keeps no books. For an engine that behaves like an instance, use the simulated engine.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

from cascadeinfer.core.errors import EngineError
from cascadeinfer.core.events import InstanceReport
from cascadeinfer.core.refusals import Refusal
from cascadeinfer.core.types import InstanceCapacity
from cascadeinfer.engines.protocol import (
    Engine,
    EngineCounters,
    EngineDied,
    EngineRequest,
    KvTicket,
    Resume,
    StepOutputs,
    TokenDelta,
)
from cascadeinfer.engines.simulated.instance import SimulatedOutputs
from cascadeinfer.engines.simulated.model import SimulatedDelta

IDLE = InstanceReport((), (), (), (), 0)


class ScriptedEngine:
    """See `Engine`; what has an answer waits until the test gives it."""

    pid = None
    node = ""

    def __init__(self, instance_id: str, capacity: InstanceCapacity) -> None:
        """An engine that starts at once."""
        self.instance_id = instance_id
        self.asked_tokens: int | None = None
        self._capacity = capacity
        self._waiting: dict[str, asyncio.Future[Any]] = {}
        self._outputs: asyncio.Queue[SimulatedOutputs | None] = asyncio.Queue()

    # --- what a test says --------------------------------------------------------------------------------------------

    def answer(self, command: str, result: Any) -> None:
        """Answer a waiting command."""
        self._waiting.pop(command).set_result(result)

    def send(self, delta: SimulatedDelta) -> None:
        """Deliver the outputs of a step."""
        self._outputs.put_nowait(SimulatedOutputs([delta]))

    def die(self) -> None:
        """The process has died, and its death is known."""
        for future in self._waiting.values():
            future.set_exception(EngineError("died", instance_id=self.instance_id))
        self._waiting.clear()
        self._outputs.put_nowait(None)

    # --- the protocol ------------------------------------------------------------------------------------------------

    async def start(self) -> InstanceCapacity:
        """See Engine."""
        return self._capacity

    async def connect(self, peers: Sequence[Engine]) -> None:
        """See Engine."""

    async def listens(self) -> bool:
        """See Engine."""
        return True

    async def reaches(self, peer: Engine) -> bool:  # noqa: ARG002 - the protocol's
        """See Engine."""
        return True

    async def add(
        self, engine_request_id: str, request: EngineRequest, resume: Resume | None = None, *, park: bool = False
    ) -> None:
        """See Engine."""

    async def abort(self, engine_request_ids: list[str]) -> None:
        """See Engine."""

    async def cut(self, engine_request_id: str) -> Refusal | None:  # noqa: ARG002 - the protocol's
        """See Engine."""
        refused: Refusal | None = await self._answer_to("cut")
        return refused

    async def undo_cut(self, engine_request_id: str) -> bool:  # noqa: ARG002 - the protocol's
        """See Engine."""
        return bool(await self._answer_to("undo_cut"))

    async def reserve(
        self,
        reservation_id: str,  # noqa: ARG002 - the protocol's
        n_tokens: int,
        *,
        for_parked: bool = False,  # noqa: ARG002 - the protocol's
    ) -> Refusal | None:
        """See Engine."""
        self.asked_tokens = n_tokens
        refused: Refusal | None = await self._answer_to("reserve")
        return refused

    async def release_reservation(self, reservation_id: str) -> None:
        """See Engine."""

    async def release_pin(self, engine_request_id: str) -> None:
        """See Engine."""

    async def pin_full_blocks(self, engine_request_id: str) -> KvTicket | None:  # noqa: ARG002 - the protocol's
        """See Engine."""
        ticket: KvTicket | None = await self._answer_to("pin_full_blocks")
        return ticket

    async def release_full_blocks(self, engine_request_id: str) -> None:
        """See Engine."""

    async def precopy(self, reservation_id: str, ticket: KvTicket, pull_before_s: float) -> bool:  # noqa: ARG002 - the protocol's
        """See Engine."""
        return bool(await self._answer_to("precopy"))

    async def renew_pin(self, engine_request_id: str) -> bool:  # noqa: ARG002 - the protocol's
        """See Engine."""
        return bool(await self._answer_to("renew_pin"))

    async def report(self, next_after_s: float | None = None) -> tuple[InstanceReport, EngineCounters]:  # noqa: ARG002 - the protocol's
        """See Engine."""
        return IDLE, EngineCounters()

    def load_in(self, outputs: StepOutputs) -> None:
        """See Engine."""

    async def next_outputs(self) -> SimulatedOutputs:
        """See Engine."""
        outputs = await self._outputs.get()
        if outputs is None:
            raise EngineDied(self.instance_id)
        return outputs

    def ticket_of(self, delta: TokenDelta) -> KvTicket | None:
        """See Engine."""
        return delta.kv_transfer_params

    def has_dropped(self, delta: TokenDelta) -> bool:  # noqa: ARG002 - the protocol's
        """See Engine."""
        return False

    def has_failed(self, delta: TokenDelta) -> bool:  # noqa: ARG002 - the protocol's
        """See Engine."""
        return False

    def failure_of(self, request_id: str) -> SimulatedOutputs:
        """See Engine."""
        return SimulatedOutputs([SimulatedDelta(request_id, [], "error")])

    def kill(self) -> None:
        """See Engine."""
        self.die()

    async def stop(self, timeout_s: float) -> None:
        """See Engine."""

    async def _answer_to(self, command: str) -> Any:
        future = self._waiting[command] = asyncio.get_running_loop().create_future()
        return await future

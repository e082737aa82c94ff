"""
The command channel to one EngineCore: requests out, outputs back, commands and their answers.

It works on vLLM's client of that EngineCore and knows nothing of the process at the other end; starting and ending it
and reporting its death belong to `owned.py` or `attached.py`. Commands are vLLM's utility calls
(`connector/commands.py` has the other end); they are carried out in order, between two steps.

A closed channel takes no more commands: calls raise EngineError, and one-way messages are dropped.
"""

import asyncio
import contextlib
import copy
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.engine.exceptions import EngineDeadError

from cascadeinfer.core.clocks import ClockBound
from cascadeinfer.core.cost.identity import EngineIdentity
from cascadeinfer.core.cost.latency import BatchFeatures
from cascadeinfer.core.cost.samples import StepSample
from cascadeinfer.core.errors import EngineError
from cascadeinfer.core.events import InstanceReport
from cascadeinfer.core.refusals import Refusal
from cascadeinfer.core.types import InstanceCapacity, InstanceId
from cascadeinfer.engines.patience import within
from cascadeinfer.engines.protocol import EngineCounters, EngineDied, EngineRequest, InstanceIdentity, Resume
from cascadeinfer.engines.vllm.connector import side_channel
from cascadeinfer.engines.vllm.connector.loads_along import take_load
from cascadeinfer.engines.vllm.connector.ticket import (
    PARK,
    TransferParams,
    VllmTicket,
    reservation_prefix,
    resume_params,
)
from cascadeinfer.engines.vllm.connector.words import with_words
from cascadeinfer.engines.vllm.ending import fail_pending_calls
from cascadeinfer.engines.vllm.messages import EngineHello, EngineLoad

HANDSHAKE_POLL_S = 0.05
HANDSHAKE_TIMEOUT_S = 30.0
REACH_TIMEOUT_S = 10.0
"""Twice as long as the engine's process waits for its peer's answer."""
PRECOPY_FIRST_POLL_S, PRECOPY_POLL_MAX_S = 0.001, 0.016
"""Each wait is twice the last one: few questions go through the engine's thread, and short copies end at once."""


class EngineChannel:
    """
    One client's side of the channel.

    Attributes:
        hello: What the EngineCore reports about itself.
        connector_token: Authenticates front ends' words to its connector.
    """

    def __init__(
        self,
        instance_id: InstanceId,
        index: int,
        client: AsyncMPClient,
        hello: EngineHello,
        connector_token: str,
    ) -> None:
        """
        Args:
            instance_id: The instance's name.
            index: Its number; outputs carry it, for vLLM's metrics.
            client: A client to which the EngineCore answers.
            hello: Its first answer, just heard.
            connector_token: See above.
        """
        self.instance_id = instance_id
        self._index = index
        self._client = client
        self._is_open = True
        self.hello = hello
        self.connector_token = connector_token
        #: The EngineCore's clock, as estimated from its answers.
        self._clock = ClockBound()
        self._clock.answered(hello.clock_s, time.monotonic())
        self._steps_at_report = 0
        self._reported_s = 0.0

    @property
    def client(self) -> AsyncMPClient:
        """VLLM's client. Raises EngineError when the channel is closed."""
        if not self._is_open:
            raise EngineError("is stopped", instance_id=self.instance_id)
        return self._client

    def close(self) -> None:
        """Take no more commands. Pending calls are not woken: see `ending.fail_pending_calls`."""
        self._is_open = False

    # --- the instance ------------------------------------------------------------------------------------------------

    def capacity(self) -> InstanceCapacity:
        """What it can hold."""
        return InstanceCapacity(
            kv_blocks=self.hello.kv_blocks,
            block_size_tokens=self.hello.block_size,
            max_num_seqs=self.hello.max_num_seqs,
            max_batched_tokens=self.hello.max_batched_tokens,
        )

    async def identity(self) -> InstanceIdentity:
        """What runs there, to make a cost profile or to check that one belongs to this engine."""
        told = await self._call("cascade_identity")
        return InstanceIdentity(
            EngineIdentity(**told["identity"]),
            told["kv_bytes_per_token"],
            told["multiprocessors"],
            told["graph_tokens"],
        )

    async def shake_hands(self, peer: EngineHello) -> None:
        """Have it do the KV handshake with a peer. Raises EngineError."""

        async def done() -> None:
            address = (peer.engine_id, peer.host, peer.port, peer.tp_size)
            while not await self._call("cascade_handshake", *address):  # noqa: ASYNC110 - it happens in another process
                await asyncio.sleep(HANDSHAKE_POLL_S)

        try:
            await within(HANDSHAKE_TIMEOUT_S, done())
        except TimeoutError:
            raise EngineError(f"no KV handshake with {peer.engine_id}", instance_id=self.instance_id) from None

    async def listens(self) -> bool:
        """See Engine.listens; the side channel answers without the engine's help, even during a long step."""
        address = self.hello.host, self.hello.port
        if await side_channel.answers(*address):
            return True
        return bool(await self._call("cascade_listens")) and await side_channel.answers(*address)

    async def reaches(self, peer: EngineHello) -> bool:
        """See Engine.reaches; a thread of the engine's process asks the peer's side channel."""

        async def answered() -> bool:
            while (told := await self._call("cascade_reaches", peer.host, peer.port)) is None:  # noqa: ASYNC110 - as above
                await asyncio.sleep(HANDSHAKE_POLL_S)
            return bool(told)

        try:
            return await within(REACH_TIMEOUT_S, answered())
        except TimeoutError:
            return False

    async def limit_migrations(self, max_migrations: int | None) -> None:
        """Limit the migrations it takes part in at once, whoever starts them; None for no limit."""
        await self._call("cascade_limit_migrations", max_migrations)

    async def forget_client(self, client_index: int) -> int:
        """A front-end process died: abort what it has there. Returns how many requests it had."""
        return int(await self._call("cascade_forget_client", client_index))

    # --- requests ----------------------------------------------------------------------------------------------------

    async def add(
        self, engine_request_id: str, request: EngineRequest, resume: Resume | None = None, *, park: bool = False
    ) -> None:
        """Send the request; a resumed one with all its tokens and where its KV cache is."""
        words: TransferParams = {PARK: True} if park else {}
        core_request: EngineCoreRequest = copy.copy(request.payload)
        core_request.request_id = engine_request_id
        if resume is not None:
            core_request.prompt_token_ids = request.prompt_token_ids + resume.output_token_ids
            assert resume.ticket is None or isinstance(resume.ticket, VllmTicket)
            words |= resume_params(
                resume.ticket,
                prompt_tokens=len(request.prompt_token_ids),
                reservation_id=None if resume.reservation_id is None else self._own(resume.reservation_id),
                pull_before_s=self._on_its_clock(resume.pull_before_s),
            )
        if words and core_request.sampling_params is not None:
            core_request.sampling_params = with_words(core_request.sampling_params, words, self.connector_token)
        await self._send(lambda client: client.add_request_async(core_request))

    def _on_its_clock(self, moment_s: float | None) -> float | None:
        return None if moment_s is None else self._clock.at_other(moment_s)

    def _own(self, reservation_id: str) -> str:
        """Qualifies a reservation id: another client may have used the same one."""
        return reservation_prefix(self._client.client_index) + reservation_id

    async def abort(self, engine_request_ids: list[str]) -> None:
        """Stop requests."""
        await self._send(lambda client: client.abort_requests_async(engine_request_ids))

    async def cut(self, engine_request_id: str) -> Refusal | None:
        """See Engine.cut."""
        return Refusal.read(await self._call("cascade_cut", engine_request_id))

    async def undo_cut(self, engine_request_id: str) -> bool:
        """See Engine.undo_cut."""
        return bool(await self._call("cascade_undo_cut", engine_request_id))

    async def reserve(self, reservation_id: str, n_tokens: int, *, for_parked: bool = False) -> Refusal | None:
        """See Engine.reserve."""
        return Refusal.read(await self._call("cascade_reserve", self._own(reservation_id), n_tokens, for_parked))

    async def release_reservation(self, reservation_id: str) -> None:
        """See Engine.release_reservation."""
        await self._call("cascade_release_reservation", self._own(reservation_id))

    async def release_pin(self, engine_request_id: str) -> None:
        """See Engine.release_pin."""
        await self._call("cascade_release_pin", engine_request_id)

    async def renew_pin(self, engine_request_id: str) -> bool:
        """See Engine.renew_pin."""
        return bool(await self._call("cascade_renew_pin", engine_request_id))

    async def pin_full_blocks(self, engine_request_id: str) -> VllmTicket | None:
        """See Engine.pin_full_blocks."""
        params = await self._call("cascade_pin_full_blocks", engine_request_id)
        return None if params is None else VllmTicket(params)

    async def release_full_blocks(self, engine_request_id: str) -> None:
        """See Engine.release_full_blocks."""
        await self._call("cascade_release_full_blocks", engine_request_id)

    async def precopy(self, reservation_id: str, ticket: VllmTicket, pull_before_s: float) -> bool:
        """See Engine.precopy."""
        room, before_s = self._own(reservation_id), self._on_its_clock(pull_before_s)
        if not await self._call("cascade_precopy", room, ticket.params, before_s):
            return False
        wait_s = PRECOPY_FIRST_POLL_S
        while (is_here := await self._call("cascade_precopied", room)) is None:
            if time.monotonic() >= pull_before_s:
                return False
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, PRECOPY_POLL_MAX_S)
        return bool(is_here)

    async def set_step_budget(self, n_tokens: int | None) -> int:
        """See Engine.set_step_budget."""
        told = await self._call("cascade_set_step_budget", n_tokens)
        if isinstance(told, str):
            raise EngineError(told, instance_id=self.instance_id)
        return int(told)

    # --- what comes back ---------------------------------------------------------------------------------------------

    async def report(self, next_after_s: float | None = None) -> tuple[InstanceReport, EngineCounters]:
        """See Engine.report."""
        return self._told(await self._call("cascade_load", self.client.client_index, next_after_s))

    def load_in(self, outputs: EngineCoreOutputs) -> tuple[InstanceReport, EngineCounters] | None:
        """See Engine.load_in."""
        load = take_load(outputs)
        return None if load is None else self._told(load)

    def _told(self, told: Any) -> tuple[InstanceReport, EngineCounters]:
        """Its `step_s` is the mean over wall time since the last report, idle time included."""
        load = EngineLoad.of(told)
        now_s = time.monotonic()
        self._clock.answered(load.clock_s, now_s)
        new_steps = load.steps - self._steps_at_report
        step_s = (now_s - self._reported_s) / new_steps if new_steps and self._reported_s else 0.0
        self._steps_at_report, self._reported_s = load.steps, now_s
        report = InstanceReport(
            running_ids=tuple(r[0] for r in load.running),
            running_tokens=tuple(r[1] for r in load.running),
            waiting_ids=tuple(r[0] for r in load.waiting),
            waiting_tokens=tuple(r[1] for r in load.waiting),
            kv_blocks_used=load.kv_blocks_used,
            step_s=step_s,
            steps=tuple(StepSample(BatchFeatures(*row[:5]), row[5]) for row in load.timed_steps),
            foreign_running_tokens=tuple(load.foreign_running),
            foreign_waiting_tokens=tuple(load.foreign_waiting),
        )
        counters = EngineCounters(
            steps=load.steps,
            scheduled_tokens=load.scheduled_tokens,
            pulls=load.pulls,
            pulled_tokens=load.pulled_tokens,
            precopied_tokens=load.precopied_tokens,
            reserved=load.reserved,
            pinned=len(load.pinned),
            failed_pulls=load.failed_pulls,
            held_blocks=load.held_blocks,
            listens=load.listens,
            paused=load.paused,
            step_budget=load.step_budget,
        )
        return report, counters

    async def next_outputs(self) -> EngineCoreOutputs:
        """See Engine.next_outputs."""
        client = self.client
        try:
            outputs = await client.get_output_async()
        except EngineDeadError as error:
            fail_pending_calls(client)
            raise EngineDied(self.instance_id) from error
        outputs.engine_index = self._index
        return outputs

    async def _call(self, command: str, *args: Any) -> Any:
        try:
            return await self.client.call_utility_async(command, *args)
        except EngineDeadError as error:
            raise EngineError("died", instance_id=self.instance_id) from error

    async def _send(self, send: Callable[[AsyncMPClient], Awaitable[None]]) -> None:
        """Send to an engine that may have died or been stopped: its death is reported once, by `next_outputs`."""
        if not self._is_open:
            return
        with contextlib.suppress(EngineDeadError):
            await send(self._client)


async def connect_both_ways(channel: EngineChannel, peers: Sequence[EngineChannel]) -> None:
    """Have an instance and each peer shake hands, both ways, and wait until all are done. Raises EngineError."""
    both_ways = []
    for peer in peers:
        both_ways += [channel.shake_hands(peer.hello), peer.shake_hands(channel.hello)]
    for outcome in await asyncio.gather(*both_ways, return_exceptions=True):  # none is left behind
        if isinstance(outcome, BaseException):
            raise outcome

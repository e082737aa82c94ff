"""
One vLLM instance: an EngineCore process behind vLLM's own `AsyncMPClient`.

We own one client per instance instead of one data-parallel client for all: a dead EngineCore then ends its own client only, and each
instance has its own `VllmConfig`. The constructor of the client starts the process and blocks until it is ready, so it runs in a thread;
the environment that the process inherits is set for the moment of its start (`cluster/local.py`).
"""

import asyncio
import contextlib
import copy
import os
import shutil
import signal
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vllm.config import VllmConfig
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.engine.exceptions import EngineDeadError

from cascadeinfer.cluster.local import ProcessStart
from cascadeinfer.cluster.runtime_folder import instance_environment, instance_folder
from cascadeinfer.core.clocks import ClockBound
from cascadeinfer.core.cost.identity import EngineIdentity
from cascadeinfer.core.cost.latency import BatchFeatures
from cascadeinfer.core.cost.samples import StepSample
from cascadeinfer.core.errors import EngineError
from cascadeinfer.core.events import InstanceReport
from cascadeinfer.core.refusals import Refusal
from cascadeinfer.core.types import InstanceCapacity, InstanceId, RequestId
from cascadeinfer.engines.patience import within
from cascadeinfer.engines.protocol import (
    Engine,
    EngineCounters,
    EngineDied,
    EngineRequest,
    KvTicket,
    Resume,
    TokenDelta,
)
from cascadeinfer.engines.vllm.connector import side_channel
from cascadeinfer.engines.vllm.connector.ticket import CUT, resume_params
from cascadeinfer.engines.vllm.connector.words import TOKEN_VARIABLE, new_token, with_words
from cascadeinfer.engines.vllm.ending import REAP_TIMEOUT_S, kill, let_go, shut_down
from cascadeinfer.engines.vllm.further_clients import Addresses
from cascadeinfer.engines.vllm.instance_client import InstanceClient
from cascadeinfer.engines.vllm.segments import Segments

HANDSHAKE_POLL_S = 0.05
HANDSHAKE_TIMEOUT_S = 30.0
START_POLL_S = 2.0


class InstanceIdentity(NamedTuple):
    """An engine's identity, bytes of a token's KV (all devices), multiprocessors of a device (None on a processor)."""

    engine: EngineIdentity
    kv_bytes_per_token: int
    multiprocessors: int | None


class VllmInstance:
    """See `cascadeinfer.engines.protocol.Engine`."""

    def __init__(
        self,
        instance_id: InstanceId,
        index: int,
        vllm_config: VllmConfig,
        environment: dict[str, str],
        *,
        log_stats: bool = True,
        n_clients: int = 1,
        max_migrations: int | None = None,
    ) -> None:
        """
        Args:
            instance_id: Its name.
            index: Its number; vLLM's metrics carry it as the label `engine`.
            vllm_config: Its own configuration, with our connector in it.
            environment: Variables its processes get.
            log_stats: Whether its steps carry statistics for vLLM's metrics.
            n_clients: Front-end processes that will use it, this one included.
            max_migrations: It takes part in at once, over all processes; None: the only process keeps to its limit itself.
        """
        self.instance_id = instance_id
        self.index = index
        self.vllm_config = vllm_config
        #: Under which its connector takes words from us.
        self.connector_token = new_token()
        self._environment = {**environment, TOKEN_VARIABLE: self.connector_token}
        self._n_clients = n_clients
        self._log_stats = log_stats
        self._max_migrations = max_migrations
        self._client: AsyncMPClient | None = None
        #: Known once it has begun to start.
        self.further_clients: Addresses = ()
        #: Its sockets and temporary files, while it runs.
        self._folder: Path | None = None
        #: The client whose processes run but are not ready yet.
        self._starting: InstanceClient | None = None
        self._creation: asyncio.Future[None] | None = None
        self._segments = Segments()
        self._stopped = False
        self.hello: dict[str, Any] = {}
        #: The EngineCore's clock, as far as its answers tell.
        self.clock = ClockBound()
        self._steps_at_report = 0
        self._reported_s = 0.0

    @property
    def client(self) -> AsyncMPClient:
        """The client of this instance, for what the runtime does not know (LoRA, sleep, profiling)."""
        if self._client is None:
            raise EngineError("not started", instance_id=self.instance_id)
        return self._client

    @property
    def pid(self) -> int | None:
        """Process id of the EngineCore."""
        manager = self._client.resources.engine_manager if self._client is not None else None
        processes = getattr(manager, "processes", [])
        return processes[0].pid if processes else None

    async def start(self) -> InstanceCapacity:
        """Start the process, wait until it is ready, learn its capacity."""
        self._creation = asyncio.ensure_future(asyncio.to_thread(self._create))
        try:
            await self._until_created(self._creation)
            self.hello = await self.client.call_utility_async("cascade_hello")
            self.clock.answered(self.hello["clock_s"], time.monotonic())
            if self._max_migrations is not None:
                await self.limit_migrations(self._max_migrations)
        except Exception as error:
            raise EngineError(f"did not start: {error}", instance_id=self.instance_id) from error
        return self._capacity()

    def _capacity(self) -> InstanceCapacity:
        return InstanceCapacity(
            kv_blocks=self.hello["kv_blocks"],
            block_size_tokens=self.hello["block_size"],
            max_num_seqs=self.hello["max_num_seqs"],
            max_batched_tokens=self.hello["max_batched_tokens"],
        )

    async def _until_created(self, creation: asyncio.Future[None]) -> None:
        """
        Wait for the thread that starts the process.

        vLLM does not look at the process between its last word of the start and its first of the service: one that dies there would be
        waited for until `VLLM_ENGINE_READY_TIMEOUT_S`, ten minutes. The thread is; we are not.
        """
        was_dead = False
        while not (await asyncio.wait([creation], timeout=START_POLL_S))[0]:
            manager = self._starting.resources.engine_manager if self._starting is not None else None
            await asyncio.to_thread(self._segments.remember, manager)
            is_dead = manager is not None and not all(process.is_alive() for process in manager.processes)
            if is_dead and was_dead:
                raise EngineError("its process died while it started", instance_id=self.instance_id)
            was_dead = is_dead
        creation.result()

    def _create(self) -> None:
        """
        In a thread: start the process and wait for it. Ends early by an error when `stop` is called meanwhile.

        The client is kept here, not by whoever waits: that may have been cancelled, and `stop` must find the process.
        """
        try:
            folder = self._folder = instance_folder()
            self.further_clients = tuple(
                (f"ipc://{folder}/{uuid.uuid4()}", f"ipc://{folder}/{uuid.uuid4()}") for _ in range(self._n_clients - 1)
            )
            self._client = InstanceClient(
                self.vllm_config,
                ProcessStart({**self._environment, **instance_environment(folder)}),
                self._processes_run,
                log_stats=self._log_stats,
                further_clients=self.further_clients,
            )
            self._segments.remember(self._client.resources.engine_manager)
        finally:
            self._starting = None
        if self._stopped:
            self._client.shutdown(0.0)
            raise RuntimeError("stopped while starting")

    def _processes_run(self, client: InstanceClient) -> None:
        if self._stopped:
            raise RuntimeError("stopped while starting")
        self._starting = client

    async def identity(self) -> InstanceIdentity:
        """What runs here, for cost profiles: to make one, or to check that one is of this engine."""
        told = await self._call("cascade_identity")
        return InstanceIdentity(EngineIdentity(**told["identity"]), told["kv_bytes_per_token"], told["multiprocessors"])

    async def connect(self, peers: Sequence[Engine]) -> None:
        """Handshake with each peer, both ways, and wait until all are done."""
        both_ways = []
        for peer in peers:
            assert isinstance(peer, VllmInstance)
            both_ways += [self._handshake(peer.hello), peer._handshake(self.hello)]  # noqa: SLF001
        for outcome in await asyncio.gather(*both_ways, return_exceptions=True):  # none is left behind
            if isinstance(outcome, BaseException):
                raise outcome

    async def _handshake(self, hello: dict[str, Any]) -> None:
        address = (hello["engine_id"], hello["host"], hello["port"], hello["tp_size"])

        async def done() -> None:
            while not await self._call("cascade_handshake", *address):  # noqa: ASYNC110 - it happens in another process
                await asyncio.sleep(HANDSHAKE_POLL_S)

        try:
            await within(HANDSHAKE_TIMEOUT_S, done())
        except TimeoutError:
            raise EngineError(f"no KV handshake with {hello['engine_id']}", instance_id=self.instance_id) from None

    async def listens(self) -> bool:
        """See Engine.listens; the side channel answers without the engine's help, so one in a long step answers too."""
        address = self.hello["host"], self.hello["port"]
        if await side_channel.answers(*address):
            return True
        return bool(await self._call("cascade_listens")) and await side_channel.answers(*address)

    async def add(self, engine_request_id: str, request: EngineRequest, resume: Resume | None = None) -> None:
        """Send the request; a resumed one with all its tokens and where its KV cache is."""
        core_request: EngineCoreRequest = copy.copy(request.payload)
        core_request.request_id = engine_request_id
        if resume is not None:
            core_request.prompt_token_ids = request.prompt_token_ids + resume.output_token_ids
            if core_request.sampling_params is not None:
                words = resume_params(
                    resume.ticket,
                    prompt_tokens=len(request.prompt_token_ids),
                    reservation_id=resume.reservation_id,
                    pull_before_s=self._on_its_clock(resume.pull_before_s),
                )
                core_request.sampling_params = with_words(core_request.sampling_params, words, self.connector_token)
        await self._send(lambda client: client.add_request_async(core_request))

    def _on_its_clock(self, moment_s: float | None) -> float | None:
        return None if moment_s is None else self.clock.at_other(moment_s)

    async def abort(self, engine_request_ids: list[str]) -> None:
        """Stop requests."""
        await self._send(lambda client: client.abort_requests_async(engine_request_ids))

    async def cut(self, engine_request_id: str) -> Refusal | None:
        """See Engine.cut."""
        return Refusal.read(await self._call("cascade_cut", engine_request_id))

    async def undo_cut(self, engine_request_id: str) -> bool:
        """See Engine.undo_cut."""
        return bool(await self._call("cascade_undo_cut", engine_request_id))

    async def reserve(self, reservation_id: str, n_tokens: int) -> Refusal | None:
        """See Engine.reserve."""
        return Refusal.read(await self._call("cascade_reserve", reservation_id, n_tokens))

    async def release_reservation(self, reservation_id: str) -> None:
        """See Engine.release_reservation."""
        await self._call("cascade_release_reservation", reservation_id)

    async def release_pin(self, engine_request_id: str) -> None:
        """See Engine.release_pin."""
        await self._call("cascade_release_pin", engine_request_id)

    async def limit_migrations(self, max_migrations: int | None) -> None:
        """It takes part in at most so many migrations at once, whoever starts them; None: no limit."""
        await self._call("cascade_limit_migrations", max_migrations)

    async def forget_client(self, client_index: int) -> int:
        """A front-end process died: abort what it has here. Returns how many requests it had."""
        return int(await self._call("cascade_forget_client", client_index))

    async def report(self) -> tuple[InstanceReport, EngineCounters]:
        """See Engine.report; `step_s` is the mean over wall time since the last report, idle time included."""
        load = await self._call("cascade_load", self.client.client_index)
        now_s = time.monotonic()
        self.clock.answered(load["clock_s"], now_s)
        new_steps = load["steps"] - self._steps_at_report
        step_s = (now_s - self._reported_s) / new_steps if new_steps and self._reported_s else 0.0
        self._steps_at_report, self._reported_s = load["steps"], now_s
        report = InstanceReport(
            running_ids=tuple(r[0] for r in load["running"]),
            running_tokens=tuple(r[1] for r in load["running"]),
            waiting_ids=tuple(r[0] for r in load["waiting"]),
            waiting_tokens=tuple(r[1] for r in load["waiting"]),
            kv_blocks_used=load["kv_blocks_used"],
            step_s=step_s,
            steps=tuple(StepSample(BatchFeatures(*row[:5]), row[5]) for row in load["timed_steps"]),
            foreign_running_tokens=tuple(load["foreign_running"]),
            foreign_waiting_tokens=tuple(load["foreign_waiting"]),
        )
        counters = EngineCounters(
            steps=load["steps"],
            scheduled_tokens=load["scheduled_tokens"],
            pulls=load["pulls"],
            pulled_tokens=load["pulled_tokens"],
            reserved=load["reserved"],
            pinned=len(load["pinned"]),
            failed_pulls=load["failed_pulls"],
            held_blocks=load["held_blocks"],
            listens=load["listens"],
        )
        return report, counters

    async def next_outputs(self) -> EngineCoreOutputs:
        """See Engine.next_outputs; outputs carry this instance's number for vLLM's metrics."""
        client = self.client
        try:
            outputs = await client.get_output_async()
        except EngineDeadError as error:
            self._fail_pending_calls(client)
            raise EngineDied(self.instance_id) from error
        outputs.engine_index = self.index
        return outputs

    def ticket_of(self, delta: TokenDelta) -> KvTicket | None:
        """See Engine.ticket_of."""
        params = delta.kv_transfer_params
        return params if params is not None and params.get(CUT) else None

    def has_dropped(self, delta: TokenDelta) -> bool:
        """See Engine.has_dropped: an EngineCore that gets SIGTERM aborts its requests before it ends."""
        return bool(delta.finish_reason == FinishReason.ABORT)

    def has_failed(self, delta: TokenDelta) -> bool:
        """See Engine.has_failed."""
        return bool(delta.finish_reason == FinishReason.ERROR)

    def failure_of(self, request_id: RequestId) -> EngineCoreOutputs:
        """See Engine.failure_of; vLLM answers it with HTTP 500."""
        return EngineCoreOutputs(
            engine_index=self.index, outputs=[EngineCoreOutput(request_id, [], finish_reason=FinishReason.ERROR)]
        )

    def kill(self) -> None:
        """See Engine.kill."""
        if (pid := self.pid) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    async def stop(self, timeout_s: float) -> None:
        """Stop the process; vLLM's manager kills it after the timeout. One that is still starting is killed."""
        self._stopped = True
        starting, client = self._starting, self._client
        self._client = None
        some = client or starting
        manager = some.resources.engine_manager if some is not None else None
        if client is not None:
            await asyncio.to_thread(shut_down, client, timeout_s)
            self._fail_pending_calls(client)  # one that hung: nobody hears `next_outputs` any more
            let_go(client)
        elif manager is not None:
            await asyncio.to_thread(self._segments.remember, manager)
            await asyncio.to_thread(kill, manager)
        for process in getattr(manager, "processes", []):
            await asyncio.to_thread(process.join, REAP_TIMEOUT_S)  # vLLM does not wait for what it has killed: a zombie
        if self._creation is not None:
            await asyncio.wait([self._creation], timeout=REAP_TIMEOUT_S)
            # Its error has to be looked at by somebody, and whoever waited for it may have been cancelled.
            self._creation.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        if manager is not None:
            manager.processes.clear()  # each has two pipes open until it is garbage
        await asyncio.to_thread(self._segments.remove)
        if self._folder is not None:
            await asyncio.to_thread(
                shutil.rmtree, self._folder, ignore_errors=True
            )  # its sockets are nobody's any more

    @staticmethod
    def _fail_pending_calls(client: AsyncMPClient) -> None:
        """Wake whoever waits for an answer of a dead engine; vLLM leaves those futures unresolved."""
        for future in client.utility_results.values():
            if isinstance(future, asyncio.Future) and not future.done():
                future.set_exception(EngineDeadError())
                future.exception()  # looked at, also where nobody waits: a call that could not be sent leaves its future there

    async def _call(self, command: str, *args: Any) -> Any:
        try:
            return await self.client.call_utility_async(command, *args)
        except EngineDeadError as error:
            raise EngineError("died", instance_id=self.instance_id) from error

    async def _send(self, send: Callable[[AsyncMPClient], Awaitable[None]]) -> None:
        """Send to an engine that may have died or been stopped: its death is reported once, by `next_outputs`."""
        if self._client is None:
            return
        with contextlib.suppress(EngineDeadError):
            await send(self._client)

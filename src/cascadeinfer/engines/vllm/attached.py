"""
An EngineCore as seen by a further front-end process, which is a client of it: another process started it and keeps it
alive.

vLLM's EngineCore serves several clients: it connects to an input and an output socket of each, and answers the one that
asked. The owner of the instance tells the client where to bind these sockets (`Attachment`), and everything else a
client learns at start. Nothing is started or killed here; the owner connects the instance to its peers and reports its
death.

A successor of a dead front-end process binds the same sockets. An EngineCore's ready message may therefore have gone to
the predecessor (the attachment carries it), answers to the predecessor's calls may arrive (and are dropped), and
whatever the predecessor left running is aborted first.
"""

import asyncio
import contextlib
import weakref
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from typing import Any

import zmq
from vllm.config import VllmConfig
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequestType
from vllm.v1.engine.core_client import AsyncMPClient, BackgroundResources
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from cascadeinfer.core.errors import EngineError
from cascadeinfer.core.types import InstanceId
from cascadeinfer.engines.patience import within
from cascadeinfer.engines.vllm.attachment import AnyAttachment, Attachment
from cascadeinfer.engines.vllm.channel import EngineChannel
from cascadeinfer.engines.vllm.client_sockets import ClientSockets
from cascadeinfer.engines.vllm.ending import fail_pending_calls, let_go
from cascadeinfer.engines.vllm.messages import EngineHello

CONNECT_POLL_S = 0.02
CONNECT_TIMEOUT_S = 30.0


class _Answers(dict[int, Any]):
    """Futures of pending calls; an answer to a call that this process never made is dropped."""

    def pop(self, call_id: int, *_: Any) -> Any:
        """The future of a call."""
        return super().pop(call_id, None) or Future()


class AttachedClient(AsyncMPClient):
    """
    vLLM's client for an already running EngineCore, on its own sockets.

    `MPClient.__init__` cannot be used: it waits for the ready message, which comes only once per socket and EngineCore.
    """

    def __init__(
        self, vllm_config: VllmConfig, sockets: ClientSockets, ready_payload: bytes, client_index: int
    ) -> None:
        """
        Take the sockets over; must be called in the event loop. `connected` waits for the EngineCore.

        Args:
            vllm_config: For what the front end reads from it; what the EngineCore's start has changed comes into it.
            sockets: To which the EngineCore connects.
            ready_payload: Its ready message.
            client_index: This process's number among its clients.
        """
        self.vllm_config = vllm_config
        self._renderer = None
        self._effective_attention_block_sizes: set[int | None] = set()
        self._kv_event_sources: dict[int, Any] = {}
        self.stats_update_address = None
        self.coordinator_input_address = self.coordinator_output_address = None  # read since vLLM 0.33
        self.engines_running = False
        self.ctx = sockets.context
        self.resources = BackgroundResources(ctx=sockets.plain_context)
        self._finalizer = weakref.finalize(self, self.resources)
        self.input_socket = self.resources.input_socket = sockets.input
        self.resources.output_socket = sockets.output
        self.encoder = MsgpackEncoder()
        self.decoder = MsgpackDecoder(EngineCoreOutputs)
        self.engine_ranks_managed = [0]
        self.core_engine = (0).to_bytes(2, "little")
        self.core_engines = [self.core_engine]
        self.utility_results = _Answers()
        self.client_index = client_index
        self.client_count = client_index + 1
        self.outputs_queue: asyncio.Queue[Any] = asyncio.Queue()
        self._engine_status: dict[int, Any] = {}
        self._apply_ready_response(ready_payload)
        self._ensure_output_queue_task()

    async def connected(self) -> EngineHello:
        """
        Wait until the EngineCore has connected; returns what it reports about itself.

        Raises:
            TimeoutError: It did not connect in time.
        """
        return await within(CONNECT_TIMEOUT_S, self._first_answer())

    async def _first_answer(self) -> EngineHello:
        while not self.is_connected():  # noqa: ASYNC110 - it happens in another process
            await asyncio.sleep(CONNECT_POLL_S)
        return EngineHello.of(await self.call_utility_async("cascade_hello"))

    def is_connected(self) -> bool:
        """Whether what is sent now reaches the EngineCore's socket. Sends it that nothing is to be aborted."""
        nothing = (self.core_engine, EngineCoreRequestType.ABORT.value, *self.encoder.encode([]))
        # Only this message fails instead of going nowhere: a death is not for every sender to tell.
        self.input_socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        try:
            zmq.Socket.shadow(self.input_socket).send_multipart(nothing, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return False
        finally:
            self.input_socket.setsockopt(zmq.ROUTER_MANDATORY, 0)
        return True

    def engine_died(self) -> None:
        """The owner reports that the EngineCore is gone."""
        self.resources.engine_dead = True
        self.outputs_queue.put_nowait(EngineDeadError())


class AttachedCore:
    """See the module header, and `cascadeinfer.engines.vllm.instance.EngineCoreLife`."""

    def __init__(
        self,
        instance_id: InstanceId,
        vllm_config: VllmConfig,
        client_index: int,
        attach: Callable[["AttachedCore"], Awaitable[AnyAttachment]],
    ) -> None:
        """
        Args:
            instance_id: Its name.
            vllm_config: The owner's configuration, for what the front end reads from it.
            client_index: This process's number among the clients.
            attach: Waits until the instance is up, and arranges for `died` to be called when it goes down.
        """
        self.instance_id = instance_id
        self.index = -1
        self.vllm_config = vllm_config
        self.stopped = False
        self._client_index = client_index
        self._attach = attach
        self._pid: int | None = None
        self._client: AttachedClient | None = None
        self._channel: EngineChannel | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the EngineCore."""
        return self._pid

    async def begin(self) -> EngineChannel:
        """Wait until the instance is up and has connected to this process; abort what a predecessor left there."""
        attachment = await self._attach(self)
        assert isinstance(attachment, Attachment), attachment
        self.index, self._pid = attachment.index, attachment.pid
        try:
            sockets = ClientSockets.at(attachment.input_address, attachment.output_address)
            client = self._client = AttachedClient(
                self.vllm_config, sockets, attachment.ready_payload, self._client_index
            )
            hello = await client.connected()
            channel = self._channel = EngineChannel(
                self.instance_id, self.index, client, hello, attachment.connector_token
            )
            await channel.forget_client(self._client_index)
        except (EngineDeadError, TimeoutError, zmq.ZMQError) as error:
            raise EngineError(f"cannot be attached: {error}", instance_id=self.instance_id) from error
        return channel

    async def connect(self, channel: EngineChannel, peers: Sequence[EngineChannel]) -> None:
        """Nothing to do: the owner connected it to its peers before reporting it up."""

    async def forget(self, channel: EngineChannel, client: int) -> None:
        """Nothing to do: the owner notices by itself which processes are gone."""

    def died(self) -> None:
        """The owner reports that it is gone."""
        self._pid = None
        if self._client is not None:
            self._client.engine_died()
            fail_pending_calls(self._client)

    def kill(self) -> None:
        """Nothing to do: the owner notices by itself that an instance hangs, and kills it."""

    async def end(self, timeout_s: float) -> None:  # noqa: ARG002 - the protocol's
        """Let go of the instance."""
        self.stopped = True
        if self._channel is not None:
            self._channel.close()
        client, self._client = self._client, None
        if client is not None:
            leave(client)


def leave(client: AttachedClient) -> None:
    """Let go of an EngineCore that goes on without this client."""
    fail_pending_calls(client)
    with contextlib.suppress(EngineError):
        client.shutdown(0.0)
    let_go(client)

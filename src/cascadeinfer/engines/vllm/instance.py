"""
One vLLM instance as the runtime sees it: a command channel to its EngineCore (`channel.py`) and that core's life cycle
(`EngineCoreLife`).

An EngineCore is started and ended by this process (`owned.py`), kept by a keeper (`kept.py`) or by others
(`standing.py`), or it is the concern of process 0, whose follower this process is (`attached.py`, `followed.py`).

We use one client per instance rather than one data-parallel client for all: a dead EngineCore then ends only its own
client, and each instance has its own `VllmConfig`.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from vllm.config import VllmConfig
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

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
from cascadeinfer.engines.vllm.channel import EngineChannel
from cascadeinfer.engines.vllm.connector.ticket import VllmTicket
from cascadeinfer.engines.vllm.messages import EngineHello


class EngineCoreLife(Protocol):
    """
    The life cycle of an EngineCore.

    Attributes:
        instance_id: The instance's name.
        index: The instance's number; vLLM's metrics carry it as the label `engine`.
    """

    instance_id: InstanceId
    index: int

    @property
    def vllm_config(self) -> VllmConfig:
        """Its configuration, completed by its start."""
        ...

    @property
    def pid(self) -> int | None:
        """See Engine.pid."""
        ...

    async def begin(self) -> EngineChannel:
        """Start it, or wait until it is up; afterwards it answers on the channel. Raises EngineError."""
        ...

    async def connect(self, channel: EngineChannel, peers: Sequence[EngineChannel]) -> None:
        """See Engine.connect."""
        ...

    async def forget(self, channel: EngineChannel, client: int) -> int | None:
        """
        The front-end process with this number, which used it, is gone: abort what that has left there.

        Returns:
            How many requests that were; None if it notices by itself which clients are gone, whose numbers are its own.
        """
        ...

    def kill(self) -> None:
        """See Engine.kill."""
        ...

    async def end(self, timeout_s: float) -> None:
        """See Engine.stop. May be called before and during `begin`, and twice."""
        ...


class VllmInstance:
    """See the module header, and `cascadeinfer.engines.protocol.Engine`."""

    def __init__(self, life: EngineCoreLife) -> None:
        """
        Args:
            life: How its EngineCore comes and goes; it has not begun.
        """
        self.life = life
        self.instance_id = life.instance_id
        self._channel: EngineChannel | None = None

    @property
    def index(self) -> int:
        """Its number; vLLM's metrics carry it as the label `engine`."""
        return self.life.index

    @property
    def config(self) -> VllmConfig:
        """Its configuration, completed by its start."""
        return self.life.vllm_config

    @property
    def movable(self) -> bool:
        """See Engine.movable."""
        return self.hello.movable

    @property
    def node(self) -> NodeId:
        """See Engine.node: the address at which its peers reach it."""
        return self.hello.host

    @property
    def channel(self) -> EngineChannel:
        """To its EngineCore. Raises EngineError before the start."""
        if self._channel is None:
            raise EngineError("not started", instance_id=self.instance_id)
        return self._channel

    @property
    def hello(self) -> EngineHello:
        """What it says of itself. Raises EngineError before the start."""
        return self.channel.hello

    # --- its life ----------------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int | None:
        """Process id of the EngineCore."""
        return self.life.pid

    async def start(self) -> InstanceCapacity:
        """See Engine.start."""
        self._channel = await self.life.begin()
        return self._channel.capacity()

    async def connect(self, peers: Sequence[Engine]) -> None:
        """
        See Engine.connect. Skipped for engines whose requests cannot migrate: they need no handshake, and some cannot
        do one.

        Raises:
            EngineError: No handshake, or a peer uses the other model runner.
        """
        channels = []
        for peer in peers:
            assert isinstance(peer, VllmInstance)
            self._check_runner_of(peer)
            if self.movable and peer.movable:
                channels.append(peer.channel)
        await self.life.connect(self.channel, channels)

    def _check_runner_of(self, peer: "VllmInstance") -> None:
        """What a move preserves is known for two instances with the same runner only."""
        ours, theirs = self.hello.model_runner, peer.hello.model_runner
        if ours != theirs:
            raise EngineError(
                f"uses vLLM's model runner {ours}, instance {peer.instance_id} uses {theirs}: "
                "set VLLM_USE_V2_MODEL_RUNNER to the same value for all",
                instance_id=self.instance_id,
            )

    def kill(self) -> None:
        """See Engine.kill."""
        self.life.kill()

    async def stop(self, timeout_s: float) -> None:
        """See Engine.stop."""
        await self.life.end(timeout_s)

    # --- its channel -------------------------------------------------------------------------------------------------

    async def identity(self) -> InstanceIdentity:
        """See Engine.identity."""
        return await self.channel.identity()

    async def listens(self) -> bool:
        """See Engine.listens."""
        return await self.channel.listens()

    async def reaches(self, peer: Engine) -> bool:
        """See Engine.reaches."""
        assert isinstance(peer, VllmInstance)
        return await self.channel.reaches(peer.hello)

    async def add(
        self, engine_request_id: str, request: EngineRequest, resume: Resume | None = None, *, park: bool = False
    ) -> None:
        """See Engine.add."""
        await self.channel.add(engine_request_id, request, resume, park=park)

    async def abort(self, engine_request_ids: list[str]) -> None:
        """See Engine.abort."""
        await self.channel.abort(engine_request_ids)

    async def cut(self, engine_request_id: str) -> Refusal | None:
        """See Engine.cut."""
        return await self.channel.cut(engine_request_id)

    async def undo_cut(self, engine_request_id: str) -> bool:
        """See Engine.undo_cut."""
        return await self.channel.undo_cut(engine_request_id)

    async def reserve(self, reservation_id: str, n_tokens: int, *, for_parked: bool = False) -> Refusal | None:
        """See Engine.reserve."""
        return await self.channel.reserve(reservation_id, n_tokens, for_parked=for_parked)

    async def release_reservation(self, reservation_id: str) -> None:
        """See Engine.release_reservation."""
        await self.channel.release_reservation(reservation_id)

    async def release_pin(self, engine_request_id: str) -> None:
        """See Engine.release_pin."""
        await self.channel.release_pin(engine_request_id)

    async def renew_pin(self, engine_request_id: str) -> bool:
        """See Engine.renew_pin."""
        return await self.channel.renew_pin(engine_request_id)

    async def pin_full_blocks(self, engine_request_id: str) -> VllmTicket | None:
        """See Engine.pin_full_blocks."""
        return await self.channel.pin_full_blocks(engine_request_id)

    async def release_full_blocks(self, engine_request_id: str) -> None:
        """See Engine.release_full_blocks."""
        await self.channel.release_full_blocks(engine_request_id)

    async def precopy(self, reservation_id: str, ticket: KvTicket, pull_before_s: float) -> bool:
        """See Engine.precopy."""
        assert isinstance(ticket, VllmTicket)
        return await self.channel.precopy(reservation_id, ticket, pull_before_s)

    async def set_step_budget(self, n_tokens: int | None) -> int:
        """See Engine.set_step_budget."""
        return await self.channel.set_step_budget(n_tokens)

    async def report(self, next_after_s: float | None = None) -> tuple[InstanceReport, EngineCounters]:
        """See Engine.report."""
        return await self.channel.report(next_after_s)

    def load_in(self, outputs: StepOutputs) -> tuple[InstanceReport, EngineCounters] | None:
        """See Engine.load_in."""
        assert isinstance(outputs, EngineCoreOutputs)
        return self.channel.load_in(outputs)

    async def next_outputs(self) -> EngineCoreOutputs:
        """See Engine.next_outputs; outputs carry this instance's number for vLLM's metrics."""
        return await self.channel.next_outputs()

    async def limit_migrations(self, max_migrations: int | None) -> None:
        """Limit the migrations it takes part in at once, whoever starts them; None for no limit."""
        await self.channel.limit_migrations(max_migrations)

    async def forget_client(self, client_index: int) -> int | None:
        """See Engine.forget_client."""
        return await self.life.forget(self.channel, client_index)

    async def utility(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """See Engine.utility; vLLM's client has these methods."""
        if (call := getattr(self.channel.client, method, None)) is None:
            raise EngineError(f"has no {method}", instance_id=self.instance_id)
        return await call(*args, **kwargs)

    # --- its outputs -------------------------------------------------------------------------------------------------

    def ticket_of(self, delta: TokenDelta) -> VllmTicket | None:
        """See Engine.ticket_of."""
        return VllmTicket.of(delta.kv_transfer_params)

    def has_dropped(self, delta: TokenDelta) -> bool:
        """See Engine.has_dropped: an EngineCore that gets SIGTERM aborts its requests before it ends."""
        return bool(delta.finish_reason == FinishReason.ABORT)

    def has_failed(self, delta: TokenDelta) -> bool:
        """See Engine.has_failed."""
        return bool(delta.finish_reason == FinishReason.ERROR)

    def failure_of(self, request_id: RequestId) -> EngineCoreOutputs:
        """See Engine.failure_of; vLLM answers it with HTTP 500."""
        failed: Any = EngineCoreOutput(request_id, [], finish_reason=FinishReason.ERROR)
        return EngineCoreOutputs(engine_index=self.index, outputs=[failed])

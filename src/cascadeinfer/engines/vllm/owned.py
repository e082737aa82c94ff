"""
An EngineCore that this process starts at a place, and ends.

A launcher (`cluster/protocol.py`) keeps its processes; this module holds the channel to it and what its further clients
must be told.
"""

import contextlib
from collections.abc import Sequence

from vllm.config import VllmConfig

from cascadeinfer.cluster.protocol import Kept, Launcher, Place
from cascadeinfer.core.errors import EngineError
from cascadeinfer.engines.vllm.attachment import Attachment
from cascadeinfer.engines.vllm.channel import EngineChannel, connect_both_ways
from cascadeinfer.engines.vllm.connector.words import TOKEN_VARIABLE, new_token
from cascadeinfer.engines.vllm.messages import EngineHello
from cascadeinfer.engines.vllm.processes import VllmProcesses, WhileStarting


class OwnedCore:
    """See `cascadeinfer.engines.vllm.instance.EngineCoreLife`."""

    def __init__(
        self,
        launcher: Launcher[VllmProcesses, EngineHello],
        place: Place,
        index: int,
        vllm_config: VllmConfig,
        environment: dict[str, str],
        *,
        log_stats: bool = True,
        n_clients: int = 1,
        max_migrations: int | None = None,
        while_starting: WhileStarting = contextlib.nullcontext,
    ) -> None:
        """
        Args:
            launcher: Keeps it.
            place: Where it will run; no other life of the instance is there any more when this one begins.
            index: Its number.
            vllm_config: Its own configuration, with our connector in it.
            environment: Variables its processes get.
            log_stats: Whether its steps carry statistics for vLLM's metrics.
            n_clients: Front-end processes that will use it, this one included.
            max_migrations: It takes part in at once, over all processes; None: the only process keeps to its limit
                itself.
            while_starting: See VllmProcesses.
        """
        self.instance_id = place.instance_id
        self.index = index
        self.vllm_config = vllm_config
        self._launcher = launcher
        self._place = place
        self._token = new_token()
        self._processes = VllmProcesses(
            vllm_config,
            {**environment, TOKEN_VARIABLE: self._token},
            log_stats=log_stats,
            n_clients=n_clients,
            while_starting=while_starting,
        )
        self._max_migrations = max_migrations
        self._kept: Kept[EngineHello] | None = None
        self._channel: EngineChannel | None = None
        self._stopped = False
        #: Fully stopped: whatever runs at its place now is another life.
        self._ended = False

    @property
    def pid(self) -> int | None:
        """Process id of the EngineCore."""
        return None if self._kept is None else self._kept.pid

    async def begin(self) -> EngineChannel:
        """Start it and wait until it answers."""
        if self._stopped:
            raise EngineError("did not start: it was stopped before", instance_id=self.instance_id)
        kept = await self._launcher.start(self._place, self._processes)
        if self._stopped:
            raise EngineError("did not start: stopped while starting", instance_id=self.instance_id)
        channel = EngineChannel(self.instance_id, self.index, self._processes.client, kept.hello, self._token)
        if self._max_migrations is not None:
            await channel.limit_migrations(self._max_migrations)
        self._kept, self._channel = kept, channel
        return channel

    async def connect(self, channel: EngineChannel, peers: Sequence[EngineChannel]) -> None:
        """Handshake with each peer, both ways, and wait until all are done."""
        await connect_both_ways(channel, peers)

    async def attachment(self, client: int) -> Attachment | None:
        """Have it serve a further client; what that one must know, or None while it does not run."""
        kept = self._kept
        if kept is None:
            return None
        addresses = self._launcher.client_addresses(self._place, client)
        await self._launcher.attach(self._place, client, addresses)
        return Attachment(
            self.index,
            kept.pid,
            kept.hello.engine_id,
            kept.ready_payload,
            addresses.input_address,
            addresses.output_address,
            self._token,
        )

    async def forget(self, channel: EngineChannel, client: int) -> int:
        """See EngineCoreLife."""
        n_requests = await channel.forget_client(client)
        await self._launcher.detach(self._place, client)
        return n_requests

    def kill(self) -> None:
        """See Engine.kill."""
        if not self._ended:
            self._launcher.kill(self._place)

    async def end(self, timeout_s: float) -> None:
        """See EngineCoreLife."""
        self._stopped = True
        if self._ended:
            return
        self._kept = None
        if self._channel is not None:
            self._channel.close()
        await self._launcher.stop(self._place, timeout_s)
        self._ended = True

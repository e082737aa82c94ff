"""
An EngineCore whose process this one starts and ends, through vLLM's own `AsyncMPClient`.

The constructor of the client starts the process and blocks until it is ready, so it runs in a thread; the environment that the process
inherits is set for the moment of its start (`cluster/local.py`).
"""

import asyncio
import contextlib
import os
import shutil
import signal
import uuid
from collections.abc import Sequence
from pathlib import Path

from vllm.config import VllmConfig

from cascadeinfer.cluster.local import ProcessStart
from cascadeinfer.cluster.runtime_folder import instance_environment, instance_folder
from cascadeinfer.core.errors import EngineError
from cascadeinfer.core.types import InstanceId
from cascadeinfer.engines.protocol import Engine
from cascadeinfer.engines.vllm.attachment import Attachment
from cascadeinfer.engines.vllm.channel import EngineChannel
from cascadeinfer.engines.vllm.connector.words import TOKEN_VARIABLE, new_token
from cascadeinfer.engines.vllm.ending import REAP_TIMEOUT_S, fail_pending_calls, kill, let_go, shut_down
from cascadeinfer.engines.vllm.further_clients import Addresses
from cascadeinfer.engines.vllm.instance import VllmInstance
from cascadeinfer.engines.vllm.instance_client import InstanceClient
from cascadeinfer.engines.vllm.messages import EngineHello
from cascadeinfer.engines.vllm.segments import Segments

START_POLL_S = 2.0


class OwnedCore:
    """See `cascadeinfer.engines.vllm.instance.EngineCoreLife`."""

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
            index: Its number.
            vllm_config: Its own configuration, with our connector in it.
            environment: Variables its processes get.
            log_stats: Whether its steps carry statistics for vLLM's metrics.
            n_clients: Front-end processes that will use it, this one included.
            max_migrations: It takes part in at once, over all processes; None: the only process keeps to its limit itself.
        """
        self.instance_id = instance_id
        self.index = index
        self.vllm_config = vllm_config
        self._token = new_token()
        self._environment = {**environment, TOKEN_VARIABLE: self._token}
        self._n_clients = n_clients
        self._log_stats = log_stats
        self._max_migrations = max_migrations
        self._client: InstanceClient | None = None
        self._channel: EngineChannel | None = None
        #: Known once it has begun to start.
        self._further_clients: Addresses = ()
        #: Its sockets and temporary files, while it runs.
        self._folder: Path | None = None
        #: The client whose processes run but are not ready yet.
        self._starting: InstanceClient | None = None
        self._creation: asyncio.Future[None] | None = None
        self._segments = Segments()
        self._stopped = False

    @property
    def pid(self) -> int | None:
        """Process id of the EngineCore."""
        manager = self._client.resources.engine_manager if self._client is not None else None
        processes = getattr(manager, "processes", [])
        return processes[0].pid if processes else None

    def attachment(self, client_index: int) -> Attachment | None:
        """What the further client of this number (from 1) must know of it; None while it does not run."""
        if self._client is None or self._channel is None:
            return None
        return Attachment(
            self.index,
            self.pid,
            self._channel.hello.engine_id,
            self._client.ready_payload,
            *self._further_clients[client_index - 1],
            self._token,
        )

    async def begin(self) -> EngineChannel:
        """Start the process, wait until it is ready, ask it who it is."""
        self._creation = asyncio.ensure_future(asyncio.to_thread(self._create))
        try:
            client = await self._until_created(self._creation)
            hello = EngineHello.of(await client.call_utility_async("cascade_hello"))
            self._channel = EngineChannel(self.instance_id, self.index, client, hello, self._token)
            if self._max_migrations is not None:
                await self._channel.limit_migrations(self._max_migrations)
        except Exception as error:
            raise EngineError(f"did not start: {error}", instance_id=self.instance_id) from error
        return self._channel

    async def connect(self, channel: EngineChannel, peers: Sequence[EngineChannel]) -> None:
        """Handshake with each peer, both ways, and wait until all are done."""
        both_ways = []
        for peer in peers:
            both_ways += [channel.shake_hands(peer.hello), peer.shake_hands(channel.hello)]
        for outcome in await asyncio.gather(*both_ways, return_exceptions=True):  # none is left behind
            if isinstance(outcome, BaseException):
                raise outcome

    def kill(self) -> None:
        """See Engine.kill."""
        if (pid := self.pid) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    async def end(self, timeout_s: float) -> None:
        """Stop the process; vLLM's manager kills it after the timeout. One that is still starting is killed."""
        self._stopped = True
        starting, client = self._starting, self._client
        self._client = None
        if self._channel is not None:
            self._channel.close()
        some = client or starting
        manager = some.resources.engine_manager if some is not None else None
        if client is not None:
            await asyncio.to_thread(shut_down, client, timeout_s)
            fail_pending_calls(client)  # one that hung: nobody hears `next_outputs` any more
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
            # Its sockets are nobody's any more.
            await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)

    async def _until_created(self, creation: asyncio.Future[None]) -> InstanceClient:
        """
        Wait for the thread that starts the process; returns its client.

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
        if self._client is None:
            raise EngineError("stopped while starting", instance_id=self.instance_id)
        return self._client

    def _create(self) -> None:
        """
        In a thread: start the process and wait for it. Ends early by an error when `end` is called meanwhile.

        The client is kept here, not by whoever waits: that may have been cancelled, and `end` must find the process.
        """
        try:
            folder = self._folder = instance_folder()
            self._further_clients = tuple(
                (f"ipc://{folder}/{uuid.uuid4()}", f"ipc://{folder}/{uuid.uuid4()}") for _ in range(self._n_clients - 1)
            )
            self._client = InstanceClient(
                self.vllm_config,
                ProcessStart({**self._environment, **instance_environment(folder)}),
                self._processes_run,
                log_stats=self._log_stats,
                further_clients=self._further_clients,
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


def attachment_of(engine: Engine, client_index: int) -> Attachment | None:
    """What the further client of this number must know of an instance that this process owns; None while it does not run."""
    assert isinstance(engine, VllmInstance)
    assert isinstance(engine.life, OwnedCore)
    return engine.life.attachment(client_index)

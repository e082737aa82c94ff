"""
The processes of one EngineCore on this machine, started through vLLM's own client.

The client's constructor starts them and blocks until they are ready, so it runs in a thread (`cluster/local.py`). It is
client number 0 of the EngineCore, and the only one that sends it commands from the start.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from typing import Any, TypeAlias

from vllm.config import VllmConfig

from cascadeinfer.cluster.process_start import ProcessStart
from cascadeinfer.cluster.protocol import ClientAddresses
from cascadeinfer.engines.vllm.ending import deaths_in_words, fail_pending_calls, kill, let_go, shut_down
from cascadeinfer.engines.vllm.instance_client import InstanceClient
from cascadeinfer.engines.vllm.messages import EngineHello

WhileStarting: TypeAlias = Callable[[VllmConfig], contextlib.AbstractContextManager[None]]


class VllmProcesses:
    """See `cascadeinfer.cluster.local.EngineProcesses`."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        environment: Mapping[str, str],
        *,
        log_stats: bool,
        n_clients: int,
        while_starting: WhileStarting = contextlib.nullcontext,
    ) -> None:
        """
        Args:
            vllm_config: Of this start; it is completed by it.
            environment: Variables that the processes get.
            log_stats: Whether steps carry statistics for vLLM's metrics.
            n_clients: Front-end processes that will use the EngineCore, this one included.
            while_starting: A context for the start, which may change the configuration meanwhile.
        """
        self._while_starting = while_starting
        self.environment = environment
        self.n_clients = n_clients
        self.config = vllm_config
        self._log_stats = log_stats
        self._client: InstanceClient | None = None
        #: vLLM's manager of the processes, from their start until they are cleaned up.
        self._manager: Any = None
        self._ended = False

    @property
    def client(self) -> InstanceClient:
        """The first client of the EngineCore, once that is ready."""
        assert self._client is not None, "it does not run"
        return self._client

    @property
    def processes(self) -> Sequence[BaseProcess]:
        """See EngineProcesses."""
        return [] if self._manager is None else list(self._manager.processes)

    @property
    def ready_payload(self) -> bytes:
        """See EngineProcesses."""
        return self.client.ready_payload

    def start(self, environment: ProcessStart, further_clients: Sequence[ClientAddresses]) -> None:
        """See EngineProcesses."""
        with self._while_starting(self.config):
            try:
                self._client = InstanceClient(
                    self.config,
                    environment,
                    self._processes_run,
                    log_stats=self._log_stats,
                    further_clients=further_clients,
                )
            except RuntimeError as error:
                raise RuntimeError(f"{error}{deaths_in_words(self.processes)}") from error
        if self._ended:
            self._client.shutdown(0.0)
            raise RuntimeError("stopped while starting")

    def _processes_run(self, client: InstanceClient) -> None:
        if self._ended:
            raise RuntimeError("stopped while starting")
        self._manager = client.resources.engine_manager

    async def hello(self) -> EngineHello:
        """See EngineProcesses."""
        return EngineHello.of(await self.client.call_utility_async("cascade_hello"))

    def end(self, timeout_s: float) -> None:
        """See EngineProcesses; vLLM's manager kills them after the timeout. Those that are still starting are killed at
        once.
        """
        self._ended = True
        if self._client is not None:
            shut_down(self._client, timeout_s)
        elif self._manager is not None:
            kill(self._manager)

    def put_away(self) -> None:
        """See EngineProcesses."""
        if self._client is not None:
            fail_pending_calls(self._client)  # one that hung: `next_outputs` has no reader any more
            let_go(self._client)
            self._client = None
        if self._manager is not None:
            self._manager.processes.clear()  # each has two pipes open until it is garbage
            self._manager = None

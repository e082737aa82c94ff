"""
vLLM's `AsyncMPClient` for one EngineCore, exposing what it keeps private: whether the process runs, and its ready
message.
"""

import contextlib
from collections.abc import Callable, Sequence

from vllm.config import VllmConfig
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.executor import Executor

from cascadeinfer.cluster.process_start import ProcessStart
from cascadeinfer.cluster.protocol import ClientAddresses
from cascadeinfer.engines.vllm.further_clients import with_further_clients


class InstanceClient(AsyncMPClient):
    """vLLM's client, with a callback once its processes have been started."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        process_start: ProcessStart,
        on_started: Callable[["InstanceClient"], None],
        *,
        log_stats: bool,
        further_clients: Sequence[ClientAddresses] = (),
    ) -> None:
        """Start the EngineCore and block until it is ready; `on_started` is called meanwhile, in this thread."""
        self._on_started = on_started
        self._until_started = contextlib.ExitStack()
        self.ready_payload = b""
        process_start.enter()
        self._until_started.callback(process_start.leave)
        if further_clients:
            self._until_started.enter_context(with_further_clients(further_clients))
        try:
            with self._until_started:
                super().__init__(vllm_config, Executor.get_class(vllm_config), log_stats)
        except BaseException:
            if (resources := getattr(self, "resources", None)) is not None:
                resources.ctx.destroy(linger=0)  # else its threads and sockets live until a garbage collection
            raise

    def _start_mm_warmup(self) -> None:
        """Called by MPClient when the engine processes have been started and before it waits for them."""
        self._until_started.close()
        self._on_started(self)
        super()._start_mm_warmup()

    def _apply_ready_response(self, payload: bytes) -> None:
        """Called with what the EngineCore says when it is ready; further clients need it too."""
        self.ready_payload = payload
        super()._apply_ready_response(payload)

"""Makes a starting EngineCore known to more clients than the one that starts it."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.engine import core_client
from vllm.v1.executor import Executor

from cascadeinfer.cluster.protocol import ClientAddresses


@contextlib.contextmanager
def with_further_clients(further_clients: Sequence[ClientAddresses]) -> Iterator[None]:
    """Within this context, EngineCores also learn of these clients; `AsyncMPClient` offers no parameter for it."""
    original = core_client.launch_core_engines

    def launch(vllm_config: VllmConfig, executor_class: type[Executor], log_stats: bool, addresses: Any) -> Any:
        addresses.inputs += [client.input_address for client in further_clients]
        addresses.outputs += [client.output_address for client in further_clients]
        return original(vllm_config, executor_class, log_stats, addresses)

    core_client.launch_core_engines = launch
    try:
        yield
    finally:
        core_client.launch_core_engines = original

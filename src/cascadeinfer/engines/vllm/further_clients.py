"""Tells an EngineCore that starts of more clients than the one that starts it."""

import contextlib
from collections.abc import Iterator
from typing import Any, TypeAlias

from vllm.config import VllmConfig
from vllm.v1.engine import core_client
from vllm.v1.executor import Executor

Addresses: TypeAlias = tuple[tuple[str, str], ...]
"""Per further front-end process: where it binds its sockets for an instance's input and output."""


@contextlib.contextmanager
def with_further_clients(further_clients: Addresses) -> Iterator[None]:
    """Meanwhile, EngineCores are told of these clients too; `AsyncMPClient` names only itself and offers no parameter."""
    original = core_client.launch_core_engines

    def launch(vllm_config: VllmConfig, executor_class: type[Executor], log_stats: bool, addresses: Any) -> Any:
        addresses.inputs += [own[0] for own in further_clients]
        addresses.outputs += [own[1] for own in further_clients]
        return original(vllm_config, executor_class, log_stats, addresses)

    core_client.launch_core_engines = launch
    try:
        yield
    finally:
        core_client.launch_core_engines = original

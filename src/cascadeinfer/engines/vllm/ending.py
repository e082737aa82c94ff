"""Ending an EngineCore's processes and its client, whatever they are doing."""

import contextlib
import time
from typing import Any

import psutil
from vllm.utils.system_utils import kill_process_tree
from vllm.v1.engine.core_client import MPClient

REAP_TIMEOUT_S = 5.0
KILL_POLL_S = 0.1


def shut_down(client: MPClient, timeout_s: float) -> None:
    """
    The client's shutdown, to its end.

    vLLM lists the processes below an EngineCore and asks each one's name before it kills it: one that ends in between (a worker of an engine
    that is dying anyway) makes it raise, before the EngineCore is killed and the client's sockets are closed.
    """
    try:
        client.shutdown(timeout_s)
    except psutil.NoSuchProcess:
        kill(client.resources.engine_manager)
        client.resources()


def kill(manager: Any) -> None:
    """Kill the processes of an EngineCore, whatever ends by itself meanwhile."""
    for process in getattr(manager, "processes", []):
        end_s = time.monotonic() + REAP_TIMEOUT_S
        while process.is_alive() and time.monotonic() < end_s:
            with contextlib.suppress(psutil.NoSuchProcess):
                kill_process_tree(process.pid)
            process.join(KILL_POLL_S)
    if manager is not None:
        manager.shutdown(0.0)

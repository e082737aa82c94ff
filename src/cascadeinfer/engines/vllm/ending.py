"""Ending an EngineCore's processes and its client, whatever they are doing."""

import asyncio
import contextlib
import signal
import time
from collections.abc import Iterable
from multiprocessing.process import BaseProcess
from typing import Any

import psutil
from vllm.utils.network_utils import close_sockets
from vllm.utils.system_utils import kill_process_tree
from vllm.v1.engine.core_client import MPClient
from vllm.v1.engine.exceptions import EngineDeadError

REAP_TIMEOUT_S = 5.0
KILL_POLL_S = 0.1


def shut_down(client: MPClient, timeout_s: float) -> None:
    """
    Run the client's shutdown to its end.

    vLLM lists the processes below an EngineCore and asks for each one's name before killing it. If one exits in between
    (a worker of an engine that is dying anyway), this raises before the EngineCore is killed and the client's sockets
    are closed.
    """
    try:
        client.shutdown(timeout_s)
    except psutil.NoSuchProcess:
        kill(client.resources.engine_manager)
        client.resources()


def fail_pending_calls(client: MPClient) -> None:
    """Wake all callers waiting for an answer of a dead engine; vLLM leaves their futures unresolved."""
    for future in client.utility_results.values():
        if isinstance(future, asyncio.Future) and not future.done():
            future.set_exception(EngineDeadError())
            future.exception()  # retrieved even if nobody waits: a call that could not be sent leaves its future there


def let_go(client: MPClient) -> None:
    """
    Close the sockets, files and threads of a client that has been shut down. Call it in the event loop's thread.

    vLLM leaves the three threads and their files to Python's garbage collector, which may not run for a long time in a
    process of this size: a client is part of reference cycles with its tasks and their errors.
    """
    close_sockets([s for s in (client.resources.output_socket, client.resources.input_socket) if s is not None])
    client.resources.ctx.destroy(linger=0)


def kill(manager: Any) -> None:
    """Kill the processes of an EngineCore, even if some exit by themselves meanwhile."""
    for process in getattr(manager, "processes", []):
        end_s = time.monotonic() + REAP_TIMEOUT_S
        while process.is_alive() and time.monotonic() < end_s:
            with contextlib.suppress(psutil.NoSuchProcess):
                kill_process_tree(process.pid)
            process.join(KILL_POLL_S)
    if manager is not None:
        manager.shutdown(0.0)


def deaths_in_words(processes: Iterable[BaseProcess]) -> str:
    """
    A sentence for each process that a signal has ended, other than the one by which vLLM ends those of a failed start.

    vLLM says only that a process has ended, and not always with its exit code, because it does not wait for it. What a
    process writes before it ends by itself is in the log; a signal leaves nothing there.
    """
    told = ""
    for process in processes:
        process.join(REAP_TIMEOUT_S)
        number = -(process.exitcode or 0)
        if number > 0 and number != signal.SIGTERM:
            why = " (the kernel's, if memory ran out)" if number == signal.SIGKILL else ""
            told += f" Its process {process.pid} was ended by {signal.Signals(number).name}{why}."
    return told

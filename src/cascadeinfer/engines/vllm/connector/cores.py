"""
Leaves CPU cores to the model where it shares them with everything else. Has no effect on devices.

All of this changes only how vLLM's and NIXL's processes wait.
"""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm.distributed.device_communicators import shm_broadcast
from vllm.platforms import current_platform

logger = logging.getLogger(__name__)

PROGRESS_POLL_US = 1000
"""How long NIXL's progress thread sleeps when UCX has no event for it, in microseconds."""
NAP_S = 250e-6
"""Polling interval of an EngineCore that waits for its worker's answer, and of a worker that waits for work."""


def nap_instead_of_spinning() -> None:
    """
    Make this process sleep between two polls of the queue that joins EngineCore and worker, instead of calling
    `sched_yield`.

    vLLM polls for up to a second after the last message, in both processes. With one core per instance that takes half
    a core from the model. Worse, Linux (6.18, fair class) moves a thread's turn back with each yield, and with it the
    time by which waking threads are queued: the front end then waits a second and more behind a computing engine,
    however nice it is.
    """
    if current_platform.is_cpu():
        shm_broadcast.sched_yield = lambda: time.sleep(NAP_S)


def wake_up_politely() -> None:
    """
    Make the threads of this process, and those that they start, wait for their turn when they wake up (`SCHED_BATCH`).

    Threads that sleep a lot, as these do once they nap, otherwise preempt whatever computes on their core the moment
    they wake up: the front end was interrupted seven times as often as by engines that spin. Their share of the core
    stays the same.
    """
    if not current_platform.is_cpu() or sys.platform != "linux":
        return
    for thread in (int(entry.name) for entry in Path("/proc/self/task").iterdir()):
        try:
            if os.sched_getscheduler(thread) == os.SCHED_OTHER:  # otherwise it was set deliberately
                os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))
        except ProcessLookupError:
            continue  # the thread has ended meanwhile
        except PermissionError as error:
            logger.warning(
                "streams may falter where engines and front end share cores: SCHED_BATCH is not allowed here (%s)",
                error,
            )
            return


@contextlib.contextmanager
def sleeping_progress_thread() -> Iterator[None]:
    """
    Make the progress thread of agents created in this context sleep until there is an event.

    NIXL's Python agent asks for a delay of 0 and has no parameter for it: the thread then polls without a pause and
    takes a whole core from the model, for each instance, idle or not. UCX's events still wake it at once. On machines
    with devices the core is not missed.
    """
    if not current_platform.is_cpu():
        yield
        return
    from nixl import _api  # noqa: PLC0415 - only where an agent is about to be made

    original: Any = _api.nixlBind.nixlAgentConfig
    delay: Any = original.pthrDelay
    patient = property(delay.__get__, lambda config, _: delay.__set__(config, PROGRESS_POLL_US))
    _api.nixlBind.nixlAgentConfig = type("SleepingConfig", (original,), {"pthrDelay": patient})
    try:
        yield
    finally:
        _api.nixlBind.nixlAgentConfig = original


@contextlib.contextmanager
def kept_on_its_cores() -> Iterator[None]:
    """
    Restore this thread's CPU affinity on exit.

    vLLM's NIXL worker moves the thread that creates it to the last core of each NUMA node, meant as a core reserved for
    transfers. That thread is the one that computes the model, and the core is the same for all instances of the
    machine: they would all compute on it in turn. Threads that NIXL starts meanwhile stay on that core.
    """
    if not current_platform.is_cpu():
        yield
        return
    cores = os.sched_getaffinity(0)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)

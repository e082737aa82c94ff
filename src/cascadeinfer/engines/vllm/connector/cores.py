"""
On a CPU the model computes on the cores that everything else needs as well: what leaves them to it. On devices nothing here has an effect.

All of it changes how vLLM's and NIXL's processes wait, none of it what they do.
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
"""How long an EngineCore sleeps before it looks again whether its worker has an answer, and the worker whether there is work."""


def nap_instead_of_spinning() -> None:
    """
    Let this process sleep between two looks into the queue that joins EngineCore and worker, instead of calling `sched_yield`.

    vLLM looks again and again for up to a second after the last message, in both processes. With one core per instance that takes half of a
    core from the model. Worse, Linux (6.18, fair class) moves a thread's turn back with each yield and with it the time by which waking
    threads are queued: the front end then waits behind a computing engine for a second and more, however nice it is.
    """
    if current_platform.is_cpu():
        shm_broadcast.sched_yield = lambda: time.sleep(NAP_S)


def wake_up_politely() -> None:
    """
    Let the threads of this process, and those that they start, wait for their turn when they wake up (`SCHED_BATCH`).

    Threads that sleep a lot, as these do once they nap, otherwise interrupt whoever computes on their core the moment they wake up: the front
    end was interrupted seven times as often as by engines that spin. They get as much of the core as before.
    """
    if not current_platform.is_cpu() or sys.platform != "linux":
        return
    for thread in (int(entry.name) for entry in Path("/proc/self/task").iterdir()):
        try:
            if os.sched_getscheduler(thread) == os.SCHED_OTHER:  # else somebody has chosen
                os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))
        except ProcessLookupError:
            continue  # it has ended meanwhile
        except PermissionError as error:
            logger.warning(
                "streams may falter where engines and front end share cores: SCHED_BATCH is not allowed here (%s)",
                error,
            )
            return


@contextlib.contextmanager
def sleeping_progress_thread() -> Iterator[None]:
    """
    Let the progress thread of agents made meanwhile sleep until there is an event.

    NIXL's Python agent asks for a delay of 0 and offers no parameter for it: the thread then polls without a pause and takes a whole core
    from the model, for each instance, idle or not. UCX's events still wake it at once. On machines with devices the core is not missed.
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
    Give this thread back the cores that it had before.

    vLLM's NIXL worker moves the thread that makes it to the last core of each NUMA node, meaning a core kept for transfers. That thread is
    the one that computes the model, and the core is the same for all instances of the machine: they would all compute on it, in turn.
    Threads that NIXL starts meanwhile stay on that core.
    """
    if not current_platform.is_cpu():
        yield
        return
    cores = os.sched_getaffinity(0)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)

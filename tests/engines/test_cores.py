"""On a CPU: which cores the model computes on, and how the processes beside it wait."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm.distributed.device_communicators import shm_broadcast
from vllm.platforms import current_platform

from cascadeinfer.engines.vllm.connector.cores import (
    NAP_S,
    kept_on_its_cores,
    nap_instead_of_spinning,
    wake_up_politely,
)

on_cpu = pytest.mark.skipif(not current_platform.is_cpu(), reason="devices are not shared in this way")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has this way of scheduling")
several_cores = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="with one core there is nowhere to be moved to"
)


@pytest.mark.parametrize("fails", [False, True])
@on_cpu
@several_cores
def test_a_thread_gets_its_cores_back(fails: bool) -> None:
    """Whatever changes the thread's cores meanwhile, and even if that fails."""
    before = os.sched_getaffinity(0)
    with contextlib.suppress(OSError), kept_on_its_cores():
        os.sched_setaffinity(0, {max(before)})
        assert os.sched_getaffinity(0) == {max(before)}
        if fails:
            raise OSError
    assert os.sched_getaffinity(0) == before


@on_cpu
def test_waiting_readers_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue between EngineCore and worker no longer spins; vLLM looks its function up by this name."""
    monkeypatch.setattr(shm_broadcast, "sched_yield", shm_broadcast.sched_yield)
    naps: list[float] = []
    monkeypatch.setattr(time, "sleep", naps.append)
    nap_instead_of_spinning()
    assert "sched_yield" in shm_broadcast.SpinCondition.wait.__code__.co_names
    shm_broadcast.sched_yield()
    assert naps == [NAP_S]


@pytest.fixture
def scheduling_restored() -> Iterator[None]:
    """Restore the scheduling of all threads of this process."""
    yield
    for thread in threads():
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))


def threads() -> list[int]:
    """The threads of this process."""
    return [int(entry.name) for entry in Path("/proc/self/task").iterdir()]


def scheduling_of(some: list[int]) -> set[int]:
    """The scheduling policies of those threads that have not ended meanwhile."""
    found: set[int] = set()
    for thread in some:
        with contextlib.suppress(ProcessLookupError):
            found.add(os.sched_getscheduler(thread))
    return found


@on_cpu
@on_linux
@pytest.mark.usefixtures("scheduling_restored")
def test_no_thread_interrupts_when_it_wakes_up() -> None:
    """Neither existing threads nor those they start interrupt others; a policy that somebody has chosen is kept."""
    ends, started = threading.Event(), threading.Event()
    chosen: list[int] = []

    def idle() -> None:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        chosen.append(threading.get_native_id())
        started.set()
        ends.wait()

    thread = threading.Thread(target=idle)
    thread.start()
    try:
        started.wait()
        wake_up_politely()
        later: list[int] = []
        other = threading.Thread(target=lambda: later.append(os.sched_getscheduler(0)))
        other.start()
        other.join()
        assert later == [os.SCHED_BATCH]
        assert scheduling_of([t for t in threads() if t not in chosen]) == {os.SCHED_BATCH}
        assert os.sched_getscheduler(chosen[0]) == os.SCHED_IDLE
    finally:
        ends.set()
        thread.join()


@on_cpu
@on_linux
def test_where_it_is_not_allowed_that_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In a sandbox that forbids it, the engine starts all the same."""

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    wake_up_politely()
    assert "SCHED_BATCH is not allowed here" in caplog.text

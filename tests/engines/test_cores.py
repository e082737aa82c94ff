"""On a CPU: whose cores the model computes on, and how processes wait beside it."""

import contextlib
import os
import time

import pytest
from vllm.distributed.device_communicators import shm_broadcast
from vllm.platforms import current_platform

from cascadeinfer.engines.vllm.connector.cores import NAP_S, kept_on_its_cores, nap_instead_of_spinning

on_cpu = pytest.mark.skipif(not current_platform.is_cpu(), reason="devices are not shared in this way")
several_cores = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="with one core there is nowhere to be moved to"
)


@pytest.mark.parametrize("fails", [False, True])
@on_cpu
@several_cores
def test_a_thread_gets_its_cores_back(fails: bool) -> None:
    """Whatever moves it meanwhile, and if what moves it fails."""
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

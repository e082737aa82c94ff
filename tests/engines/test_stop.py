"""Stopping a vLLM instance whose processes end by themselves at the same moment."""

import multiprocessing
import time
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from cascadeinfer.engines.vllm import ending

SPAWN = multiprocessing.get_context("spawn")


class Client:
    """A client whose engine is a sleeping process; its shutdown fails as vLLM's does if a worker ends meanwhile."""

    def __init__(self) -> None:
        """Start the process."""
        process = SPAWN.Process(target=time.sleep, args=(600,), daemon=True)
        process.start()
        self.process = process
        self.n_manager_shutdowns = 0
        self.is_cleaned = False
        self.resources: Any = self

    def __call__(self) -> None:
        """The resources' cleanup: closes the sockets."""
        self.is_cleaned = True

    @property
    def engine_manager(self) -> Any:
        """The resources' engine manager."""
        return SimpleNamespace(processes=[self.process], shutdown=self._manager_shutdown)

    def shutdown(self, timeout_s: float) -> None:
        """Fail half-way."""
        assert timeout_s == 0.0
        raise psutil.NoSuchProcess(1)

    def _manager_shutdown(self, timeout_s: float) -> None:
        assert timeout_s == 0.0
        self.n_manager_shutdowns += 1


def test_shutdown_is_brought_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is dead even if a second attempt to kill it fails like the first; the client's sockets are closed."""
    client = Client()
    kill = ending.kill_process_tree
    tries: list[int] = []

    def kill_later(pid: int) -> None:
        tries.append(pid)
        if len(tries) == 1:
            raise psutil.NoSuchProcess(pid)
        kill(pid)

    monkeypatch.setattr(ending, "kill_process_tree", kill_later)
    ending.shut_down(client, 0.0)  # type: ignore[arg-type]
    assert tries == [client.process.pid] * 2
    assert not client.process.is_alive()
    assert client.n_manager_shutdowns == 1
    assert client.is_cleaned


def test_a_signal_that_ended_a_start_is_named() -> None:
    """What a process wrote before it ended by itself is in the log; a signal leaves nothing there."""
    killed, ended = SPAWN.Process(target=time.sleep, args=(600,)), SPAWN.Process(target=int)
    for process in (killed, ended):
        process.start()
    killed.kill()
    pid = killed.pid
    said = ending.deaths_in_words([killed, ended])
    assert said == f" Its process {pid} was ended by SIGKILL (the kernel's, if memory ran out)."
    terminated = SPAWN.Process(target=time.sleep, args=(600,))
    terminated.start()
    terminated.terminate()
    assert ending.deaths_in_words([terminated]) == ""

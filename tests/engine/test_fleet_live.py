"""
A fleet: engines that outlive their servers. Real engines, started as an operator starts them, on this machine.

The tests build on each other's fleet, in this order.
"""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Any

import psutil
import pytest
from server_process import ServerProcess
from test_api_servers import N_REQUESTS, N_TOKENS, complete, many, wait_until_all_serve
from test_standing_live import completion, n_there, requests_through, streamed, text_that_moved

from cascadeinfer.cluster.runtime_folder import SOCKETS_VARIABLE

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

FLEET = f"test-{secrets.token_hex(3)}"
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""An engine without a worker of its own: one import of vLLM less in each start."""
STOP_DEADLINE_S = 240.0
READY_DEADLINE_S = 600.0
"""A server and its two engines import vLLM, each for itself."""


class Fleet:
    """The fleet of this module, and its servers, one after another."""

    def __init__(self, model: Path, folder: Path) -> None:
        """Nothing is started yet."""
        self.model = model
        self.folder = folder
        self.environment = {**ONE_PROCESS, SOCKETS_VARIABLE: str(folder), "VLLM_LOGGING_LEVEL": "INFO"}
        self.logs: list[Path] = []
        self.engines: list[psutil.Process] = []

    def server(self, *words: str) -> ServerProcess:
        """A server of it, not started yet."""
        log = self.folder / f"server-{len(self.logs)}.log"
        self.logs.append(log)
        return ServerProcess(self.model, log, "--fleet", FLEET, *words, environment=self.environment)

    def stop(self) -> "subprocess.CompletedProcess[str]":
        """`cascadeinfer stop`."""
        return subprocess.run(
            [str(Path(sys.executable).parent / "cascadeinfer"), "stop", FLEET],
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=STOP_DEADLINE_S,
            check=False,
        )


@pytest.fixture(scope="module")
def fleet(tiny_model: Path) -> Iterator[Fleet]:
    """None of its engines is left at the end."""
    with tempfile.TemporaryDirectory(prefix="cf") as folder:
        fleet = Fleet(tiny_model, Path(folder))
        yield fleet
        fleet.stop()


@pytest.fixture(scope="module")
def first(fleet: Fleet) -> Iterator[ServerProcess]:
    """The server that starts the engines; killed by one of the tests."""
    with fleet.server() as server:
        wait_until_ready(server)
        yield server


def wait_until_ready(server: ServerProcess) -> None:
    """Both instances take requests."""
    server.poll(lambda: len(server.get("/health/ready").json()["instances"]) == 2, "ready", READY_DEADLINE_S)


def pids(server: ServerProcess) -> list[int]:
    """Of the engines, by instance."""
    return [instance["pid"] for instance in sorted(server.admin()["instances"], key=lambda each: each["id"])]


def is_running(process: psutil.Process | None) -> bool:
    """Whether it has not ended; one whose parent has not asked for its end yet has."""
    assert process is not None
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def text_of(server: ServerProcess, n_tokens: int) -> str:
    """What it answers."""
    answer = server.post("/v1/completions", completion(n_tokens))
    assert answer.status_code == HTTPStatus.OK, answer.text
    return str(answer.json()["choices"][0]["text"])


def test_a_second_server_is_refused(fleet: Fleet, first: ServerProcess) -> None:
    """One line, exit code 2."""
    with fleet.server() as second:
        assert second.wait_ended(READY_DEADLINE_S) == 2
        assert f"the server with process id {first.pid} uses {FLEET} already" in second.log_tail(1)


def test_a_killed_server_costs_no_engine(fleet: Fleet, first: ServerProcess) -> None:
    """
    `kill -9` in the middle of requests: the engines abort them and go on, and one that stood by serves in its place,
    with the same engines, the same text and moves as before. It has started none, so other options are refused.
    """
    text, engines = text_that_moved(first, 120), pids(first)
    with fleet.server("--standby") as standby:
        standby.wait_until(lambda: "waits for the end" in standby.log_tail(), "waiting", READY_DEADLINE_S)

        with requests_through(first, 3, seen_by=first):
            first.send_signal(signal.SIGKILL)
            first.wait_ended(STOP_DEADLINE_S)

        wait_until_ready(standby)
        assert pids(standby) == engines
        standby.poll(lambda: n_there(standby) == 0, "nothing runs")
        assert text_that_moved(standby, 120) == text
        standby.poll(standby.idle, "nothing held")
    assert standby.exit_code == 0
    assert all(psutil.pid_exists(pid) for pid in engines)

    with fleet.server("--max-model-len", "512") as other:
        assert other.wait_ended(READY_DEADLINE_S) == 2
        assert "2 engines of" in other.log_tail(1)
        assert "--max-model-len is 1024, not 512" in other.log_tail(1)
    assert all(psutil.pid_exists(pid) for pid in engines)


def test_a_server_killed_in_the_middle_of_an_update(fleet: Fleet) -> None:
    """
    `kill -9` while a rolling update starts an engine: the next server, started as before, here with two front-end
    processes, goes on with engines of both kinds, and with the update, here back to the options before. One that asks
    for others yet is refused.
    """
    with fleet.server() as server:
        wait_until_ready(server)
        text = text_of(server, 120)
        assert server.post("/admin/roll", {"options": list(OTHER_OPTIONS)}).status_code == HTTPStatus.ACCEPTED
        server.poll(lambda: "starts for instance" in rolled(server)["lines"][-1]["line"], "started", READY_DEADLINE_S)
        server.send_signal(signal.SIGKILL)
        server.wait_ended(STOP_DEADLINE_S)

    with fleet.server("--max-num-seqs", "9") as other:
        assert other.wait_ended(READY_DEADLINE_S) == 2
        assert "was not finished (the options before and --max-num-seqs 8)" in other.log_tail(1)

    with fleet.server("--api-servers", "2") as server:
        wait_until_ready(server)
        wait_until_all_serve(server)
        assert "2 engines found alive" in server.log.read_text()
        assert "an update was not finished: instance 2 has --max-num-seqs 8" in server.log.read_text()
        assert [(each["id"], each["build"]) for each in server.admin()["instances"]] == [("1", 0), ("2", 1)]
        assert text_of(server, 120) == text_of(server, 120) == text
        alone = complete(server)
        with ThreadPoolExecutor(N_REQUESTS) as executor:
            texts = many(server, executor, N_TOKENS)
            assert server.post("/admin/roll", {"options": []}).status_code == HTTPStatus.ACCEPTED
            assert {each.result() for each in texts} == {alone}
        server.poll(lambda: rolled(server)["state"] == "done", "back", READY_DEADLINE_S)
        assert {each["build"] for each in server.admin()["instances"]} == {0}
        assert text_of(server, 120) == text
        server.send_signal(signal.SIGKILL)  # at the end of this block, what it has started would be ended with it
        server.wait_ended(STOP_DEADLINE_S)


OTHER_OPTIONS = ("--max-num-seqs", "8")


def rolled(server: ServerProcess) -> Any:
    """How far the rolling update is."""
    return server.get("/admin/roll").json()


def test_a_dead_engine_is_started_again_and_stop_ends_all(fleet: Fleet) -> None:
    """
    The next server finds them alive; one that dies under a request is started anew, and the client gets the whole text.
    `cascadeinfer stop` drains the server and leaves nothing running.
    """
    with fleet.server() as server:
        wait_until_ready(server)
        assert "2 engines found alive" in server.log.read_text()
        before = pids(server)
        expected = text_of(server, 600)
        assert streamed(server, 600, in_the_middle=lambda: os.kill(before[1], signal.SIGKILL)) == expected
        server.poll(lambda: len(server.get("/health/ready").json()["instances"]) == 2, "both again", READY_DEADLINE_S)
        after = pids(server)
        assert after[0] == before[0]
        assert after[1] != before[1]
        assert text_of(server, 120) == text_of(server, 120)

        engines = [psutil.Process(pid) for pid in after]
        processes = [*engines, *(engine.parent() for engine in engines)]
        ended = fleet.stop()
        assert ended.returncode == 0, ended.stderr
        assert "2 engines stopped" in ended.stdout
        assert server.wait_ended(STOP_DEADLINE_S) == 0
    left = [process for process in processes if is_running(process)]
    assert left == [], f"{[process.status() for process in left]}"
    again = fleet.stop()
    assert again.returncode == 2
    assert f"there is no fleet {FLEET}" in again.stderr

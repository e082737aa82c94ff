"""
Several front-end processes over the same instances: a real `cascadeinfer serve --api-servers 2`.

The server is started once. The last test ends it.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from server_process import API_KEY, MODEL, QUICK_SERVER, ServerProcess

pytestmark = pytest.mark.engine

N_PROCESSES = 2
N_REQUESTS = 8
"""Requests sent at once, each on its own connection: the processes share them."""
N_TRIES = 5
HANG_TIMEOUT_S = 15
PROMPT = [17, 42, 99, 7] * 5
N_TOKENS = 600
"""From a prompt of 20 this crosses the stage edge at 64 tokens, and runs long enough to be seen in every process."""


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The server with all its processes up."""
    log = tmp_path_factory.mktemp("server") / "log"
    arguments = ("--api-servers", str(N_PROCESSES), "--hang-timeout-s", str(HANG_TIMEOUT_S))
    with ServerProcess(tiny_model, log, *arguments, program=QUICK_SERVER) as server:
        server.wait_until_ready()
        wait_until_all_serve(server)
        yield server


def wait_until_all_serve(server: ServerProcess, restarts: int = 0) -> None:
    """Wait until every process serves, the second after this many restarts."""

    def serve() -> bool:
        front_ends = server.admin()["front_ends"]
        return all(one["up"] for one in front_ends) and front_ends[1]["restarts"] == restarts

    server.poll(serve, "all processes", 240)


def complete(server: ServerProcess, n_tokens: int = N_TOKENS) -> str | None:
    """A greedy completion on its own connection; None if the connection was lost."""
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": n_tokens, "temperature": 0, "ignore_eos": True}
    try:
        response = server.post("/v1/completions", body)
    except httpx.TransportError:
        return None
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def many(server: ServerProcess, executor: ThreadPoolExecutor, n_tokens: int) -> list[Any]:
    """
    Send requests until both processes have served some; returns all that were sent.

    A process that has never had a request is slow to accept its first connection, so the other one may take them all;
    then the batch is sent again.
    """
    futures: list[Any] = []
    for _ in range(N_TRIES):
        futures += [executor.submit(complete, server, n_tokens) for _ in range(N_REQUESTS)]
        while not all(future.done() for future in futures):
            if all(one["requests"] >= 1 for one in server.admin()["front_ends"]):
                return futures
            time.sleep(0.05)
    pytest.fail("one process has all requests each time")


def test_processes_share_requests_and_instances(server: ServerProcess) -> None:
    """Requests of both processes move between the same instances, unchanged; every view adds up over the processes."""
    alone = complete(server)
    moved, requests = (
        server.metric("cascadeinfer_migrations_total", outcome="moved"),
        server.metric("cascadeinfer_requests_total"),
    )
    assert moved >= 1
    with ThreadPoolExecutor(N_REQUESTS) as executor:
        texts = [future.result() for future in many(server, executor, N_TOKENS)]
    assert set(texts) == {alone}
    server.poll(server.idle, "idle")
    assert server.metric("cascadeinfer_requests_total") == requests + len(texts)
    after = server.metric("cascadeinfer_migrations_total", outcome="moved")
    assert after >= moved + N_REQUESTS // 2
    server.poll(lambda: server.admin()["migrations"]["ended"]["moved"] == after, "the summary of the second process")
    for _ in range(4):  # whichever process answers
        assert server.metric("cascadeinfer_instance_up") == 2
        assert server.metric("vllm:generation_tokens_total") >= (N_REQUESTS + 1) * N_TOKENS


def test_a_pause_of_process_0_is_nobodys_death(server: ServerProcess) -> None:
    """Process 0 is paused for longer than the hang limit: no instance or process is restarted, and requests go on."""
    alone = complete(server)
    with ThreadPoolExecutor(N_REQUESTS) as executor:
        futures = many(server, executor, N_TOKENS)
        before = server.admin()
        server.send_signal(signal.SIGSTOP)
        try:
            time.sleep(HANG_TIMEOUT_S + 2.0)
        finally:
            server.send_signal(signal.SIGCONT)
        assert {future.result() for future in futures} == {alone}
    server.poll(server.idle, "idle")
    after = server.admin()
    for kind in ("instances", "front_ends"):
        assert [(one["pid"], one["restarts"]) for one in after[kind]] == [
            (one["pid"], one["restarts"]) for one in before[kind]
        ]


def test_an_instance_dies_under_both_processes(server: ServerProcess) -> None:
    """Requests of both processes complete elsewhere unchanged; both use the restarted instance."""
    alone = complete(server, 300)
    with ThreadPoolExecutor(N_REQUESTS) as executor:
        futures = many(server, executor, 300)
        os.kill(server.admin()["instances"][0]["pid"], signal.SIGKILL)
        assert {future.result() for future in futures} == {alone}
    server.poll(server.idle, "idle", 240)
    assert server.admin()["instances"][0]["restarts"] == 1
    with ThreadPoolExecutor(N_REQUESTS) as executor:
        assert {future.result() for future in many(server, executor, 300)} == {alone}


def test_a_process_dies(server: ServerProcess) -> None:
    """Its clients are disconnected and its requests aborted; others go on, and a new process takes its place."""
    alone = complete(server)
    with ThreadPoolExecutor(N_REQUESTS) as executor:
        futures = many(server, executor, N_TOKENS)
        os.kill(server.admin()["front_ends"][1]["pid"], signal.SIGKILL)
        texts = [future.result() for future in futures]
    assert set(texts) == {None, alone}
    wait_until_all_serve(server, restarts=1)
    server.poll(server.idle, "idle")
    with ThreadPoolExecutor(N_REQUESTS) as executor:
        assert {future.result() for future in many(server, executor, N_TOKENS)} == {alone}


def first_picture(server: ServerProcess) -> dict[str, Any]:
    """Of a viewer on its own connection."""
    with server.viewer() as pictures:
        return next(pictures)


def test_admin_on_any_process(server: ServerProcess) -> None:
    """Whichever process is asked, answers and refusals are process 0's; every process requires the key."""
    with ThreadPoolExecutor(N_REQUESTS) as executor:
        answers = list(executor.map(lambda _: server.delete("/admin/instances/99"), range(N_REQUESTS)))
        assert {answer.status_code for answer in answers} == {404}
        assert len({answer.text for answer in answers}) == 1
        seen = list(executor.map(lambda _: server.admin(), range(N_REQUESTS)))
        assert {json.dumps([one["pid"] for one in answer["front_ends"]]) for answer in seen} == {
            json.dumps([one["pid"] for one in seen[0]["front_ends"]])
        }
        for picture in executor.map(lambda _: first_picture(server), range(N_REQUESTS)):
            assert [one["pid"] for one in picture["front_ends"]] == [one["pid"] for one in seen[0]["front_ends"]]
        refused = executor.map(lambda _: server.get("/admin/instances", key=None).status_code, range(N_REQUESTS))
        assert set(refused) == {401}


def test_sigterm_drains_all_processes(server: ServerProcess) -> None:
    """Requests of both processes finish, no new one is accepted, every process exits, and the exit code is 0."""
    everyone = server.family()
    alone = complete(server)
    with ThreadPoolExecutor(N_REQUESTS) as executor:
        futures = many(server, executor, N_TOKENS)
        server.send_signal(signal.SIGTERM)
        assert {future.result() for future in futures} == {alone}
    assert server.wait_ended(60) == 0
    _, alive = psutil.wait_procs(everyone, timeout=20)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    assert "Traceback" not in server.log_tail(n_lines=10_000), server.log_tail()
    assert API_KEY not in server.log.read_text()

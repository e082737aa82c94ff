"""
`--cluster static`: a front end over two ordinary vLLM servers, which others have started and which survive it.

Real engines, real moves, all processes on this machine.
"""

import contextlib
import json
import os
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_process import API_KEY, MODEL, NO_TLS, QUICK_SERVER, START_DEADLINE_S, ServerProcess

from cascadeinfer.cluster.local import LOOPBACK, free_port
from cascadeinfer.loadgen.served_process import ServedProcess
from conftest import FORK, QUICK_ENVIRONMENT

pytestmark = pytest.mark.engine

PROMPT = list(range(3, 40))
TRIES = 20
PROGRAM = Path(__file__).parent / "standing_engines.py"
ENVIRONMENT = {
    **QUICK_ENVIRONMENT,
    **FORK,
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_NIXL_SIDE_CHANNEL_HOST": LOOPBACK,
    "UCX_TLS": "tcp,shm,self,cma,sysv,posix",
    "UCX_NET_DEVICES": "lo",
    "GLOO_SOCKET_IFNAME": "lo",
}


class Engines(ServedProcess):
    """Two vLLM servers; `port` is the first one's."""

    def __init__(self, model: Path, key_file: Path, log: Path) -> None:
        """Nothing is started yet."""
        self.http_ports = [free_port(), free_port()]
        self.door_ports = [free_port(), free_port()]
        ports = [str(port) for pair in zip(self.http_ports, self.door_ports, strict=True) for port in pair]
        command = [sys.executable, str(PROGRAM), str(model), str(key_file), *ports]
        super().__init__(command, port=self.http_ports[0], log=log, name="the engines", environment=ENVIRONMENT)

    def text(self, n_tokens: int) -> str:
        """What the first engine's own HTTP server answers."""
        body = completion(n_tokens)
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=120, **NO_TLS)
        assert answer.status_code == HTTPStatus.OK, answer.text
        return str(answer.json()["choices"][0]["text"])


def n_there(server: ServerProcess) -> int:
    """Requests that run or wait at the engines, whoever has sent them, as a front end hears it from them."""
    return sum(instance["running"] + instance["waiting"] for instance in server.admin()["instances"])


def completion(n_tokens: int, *, stream: bool = False) -> dict[str, Any]:
    """A request whose answer is the same wherever it is computed."""
    return {
        "model": MODEL,
        "prompt": PROMPT,
        "max_tokens": n_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": stream,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For logs and the key."""
    folder = tmp_path_factory.mktemp("standing")
    (folder / "key").write_text(secrets.token_hex(32))
    (folder / "key").chmod(0o600)
    return folder


@pytest.fixture(scope="module")
def engines(tiny_model: Path, folder: Path) -> Iterator[Engines]:
    """Both are starting."""
    with Engines(tiny_model, folder / "key", folder / "engines.log") as engines:
        yield engines


def front_end(engines: Engines, model: Path, folder: Path, name: str) -> ServerProcess:
    """A server on these engines, not started yet: short requests on one of them, longer ones on the other."""
    addresses = ",".join(f"{LOOPBACK}:{port}" for port in engines.door_ports)
    words = ("--cluster", "static", "--engines", addresses, "--cluster-key", str(folder / "key"))
    return ServerProcess(model, folder / f"{name}.log", *words, program=QUICK_SERVER)


@pytest.fixture(scope="module")
def server(engines: Engines, tiny_model: Path, folder: Path) -> Iterator[ServerProcess]:
    """A front end that has attached to both."""
    with front_end(engines, tiny_model, folder, "first") as server:
        server.wait_until_ready(2)
        yield server


def moved(server: ServerProcess) -> float:
    """Requests that this front end has handed over with their KV cache."""
    return server.metric("cascadeinfer_migrations_total", outcome="moved")


def text_that_moved(server: ServerProcess, n_tokens: int) -> str:
    """
    The text of a request that has moved.

    It is sent again, and must have the same text, until one has: on a busy machine a request may outgrow the room that
    was asked for, or end, before it is cut.
    """
    before, texts = moved(server), set()
    for _ in range(TRIES):
        answer = server.post("/v1/completions", completion(n_tokens))
        assert answer.status_code == HTTPStatus.OK, answer.text
        texts.add(str(answer.json()["choices"][0]["text"]))
        if moved(server) > before:
            [text] = texts
            return text
    pytest.fail(f"none of {TRIES} requests has moved")


@contextlib.contextmanager
def requests_through(dying: ServerProcess, n: int, *, seen_by: ServerProcess) -> Iterator[None]:
    """
    In this context, requests run at the engines, sent through a server that does not live to its end.

    Args:
        dying: That server.
        n: How many requests.
        seen_by: A server, perhaps the same, that tells how many there are.
    """

    def ask() -> None:
        try:
            dying.post("/v1/completions", completion(900))
        except httpx.TransportError:
            return  # its server is killed

    asking = [threading.Thread(target=ask, daemon=True) for _ in range(n)]
    for thread in asking:
        thread.start()
    seen_by.poll(lambda: n_there(seen_by) == n, f"{n} requests")
    yield
    for thread in asking:
        thread.join()


def streamed(server: ServerProcess, n_tokens: int, *, in_the_middle: Callable[[], object]) -> str:
    """The text of a stream during which something happens."""
    text, headers = "", {"Authorization": f"Bearer {API_KEY}"}
    url, body = f"{server.url}/v1/completions", completion(n_tokens, stream=True)
    with httpx.stream("POST", url, json=body, headers=headers, timeout=300, **NO_TLS) as answer:
        for number, line in enumerate(line for line in answer.iter_lines() if line.startswith("data: {")):
            text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
            if number == 100:
                in_the_middle()
    return text


@pytest.mark.timeout(600)
def test_requests_move_between_engines_of_others(server: ServerProcess, engines: Engines) -> None:
    """The text is that of an engine's own server, which goes on working beside ours."""
    assert text_that_moved(server, 120) == engines.text(120)
    server.poll(lambda: n_there(server) == 0, "nothing runs")
    refused = server.post("/admin/instances", {"count": 1})
    assert refused.status_code == HTTPStatus.CONFLICT, refused.text


@pytest.mark.timeout(600)
def test_engines_survive_their_front_end(
    server: ServerProcess, engines: Engines, tiny_model: Path, folder: Path
) -> None:
    """
    A front end is killed in the middle of requests: the engines abort them and go on, and another front end that has
    been there all the time, or comes later, moves requests as ever.
    """
    with front_end(engines, tiny_model, folder, "second") as second:
        second.wait_until_ready(2)
        with requests_through(second, 4, seen_by=server):
            second.kill()
    server.poll(lambda: n_there(server) == 0, "nothing runs")
    assert text_that_moved(server, 120) == engines.text(120)
    server.poll(server.idle, "nothing held")


@pytest.mark.timeout(600)
def test_an_engine_dies_under_a_request(server: ServerProcess, engines: Engines) -> None:
    """The client gets the whole text; the engine counts as down, and the server stays ready with the other."""
    expected = engines.text(600)
    pid = {instance["id"]: instance["pid"] for instance in server.admin()["instances"]}["1"]
    assert streamed(server, 600, in_the_middle=lambda: os.kill(pid, signal.SIGKILL)) == expected
    server.poll(lambda: server.get("/health/ready").json()["instances"] == ["0"], "one instance")
    assert server.post("/v1/completions", completion(5)).status_code == HTTPStatus.OK


def test_another_key_is_told_at_the_start(engines: Engines, tiny_model: Path, folder: Path) -> None:
    """One line, exit code 2, and nothing is left running."""
    (folder / "other").write_text(secrets.token_hex(32))
    addresses = f"{LOOPBACK}:{engines.door_ports[0]}"
    words = ("--cluster", "static", "--engines", addresses, "--cluster-key", str(folder / "other"))
    with ServerProcess(tiny_model, folder / "other.log", *words, "--stages", "0-:1", program=QUICK_SERVER) as server:
        assert server.wait_ended(START_DEADLINE_S) == 2
        assert "is no engine with this key" in server.log.read_text().splitlines()[-1]

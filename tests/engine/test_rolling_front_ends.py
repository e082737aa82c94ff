"""
The rolling update of a real server with two front-end processes, while both serve.

The tests build on each other's server, in this order. Its instances start quickly, and share the machine's cores, so an
old one goes before its new one comes.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import psutil
import pytest
from server_process import QUICK_SERVER, ServerProcess
from test_api_servers import N_REQUESTS, wait_until_all_serve
from test_rolling_live import N_TOKENS, ROLL_DEADLINE_S, builds, next_version, roll, stream, told  # noqa: F401 - the fixture
from test_standing_live import PROMPT, completion

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

PROMPTS = (PROMPT, PROMPT * 2)
"""One of each stage."""
N_STREAMS = 4


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Three instances in two stages, both processes up."""
    log = tmp_path_factory.mktemp("rolling") / "log"
    words = ("--instances", "3", "--stages", "0-64:1,64-:2", "--api-servers", "2", "--max-num-seqs", "16")
    words += ("--distributed-executor-backend", "uni")
    with ServerProcess(tiny_model, log, *words, program=QUICK_SERVER) as server:
        server.wait_until_ready(3)
        wait_until_all_serve(server)
        yield server


def text_of(server: ServerProcess, prompt: int) -> str:
    """What is streamed as the answer to one of the prompts; raises if it ends with an error."""
    body = {**completion(N_TOKENS, stream=True), "prompt": PROMPTS[prompt]}
    with stream(server, body) as events:
        return "".join(event["choices"][0]["text"] for event in events)


def texts_of(server: ServerProcess) -> set[tuple[int, str]]:
    """Each prompt with its answer."""
    return {(prompt, text_of(server, prompt)) for prompt in range(len(PROMPTS))}


class Streams:
    """Texts that stream from the server while in this context, several at a time, each on a connection of its own."""

    def __init__(self, server: ServerProcess) -> None:
        """Of this server."""
        self._server = server
        self._is_over = threading.Event()
        self._clients = ThreadPoolExecutor(N_STREAMS)
        self._asking: list[Future[None]] = []
        self.texts: list[tuple[int, str]] = []

    def _ask(self, prompt: int) -> None:
        while not self._is_over.is_set():
            self.texts.append((prompt, text_of(self._server, prompt)))

    def processes(self) -> set[int]:
        """Those that have requests now."""
        return {one["process"] for one in self._server.admin()["front_ends"] if one["requests"]}

    def __enter__(self) -> Self:
        """Begin."""
        self._asking = [self._clients.submit(self._ask, number % len(PROMPTS)) for number in range(N_STREAMS)]
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for the last ones; raises what one of them has met."""
        self._is_over.set()
        self._clients.shutdown()
        for asking in self._asking:
            asking.result()


def builds_as_seen(server: ServerProcess) -> list[dict[str, float]]:
    """The builds of all instances, as whichever process answers on each of several connections knows them."""

    def look(_: int) -> dict[str, float]:
        ids = [instance["id"] for instance in server.admin()["instances"]]
        return {each: server.metric("cascadeinfer_instance_build", instance=each) for each in ids}

    with ThreadPoolExecutor(N_REQUESTS) as executor:
        return list(executor.map(look, range(N_REQUESTS)))


def test_other_options_while_both_serve(server: ServerProcess) -> None:
    """All texts of both processes are the same as before, requests move live, and both know the new instances."""
    alone = texts_of(server)
    busy: set[int] = set()
    with Streams(server) as streams:
        server.poll(lambda: streams.processes() == {0, 1}, "requests of both processes")
        rolling = roll(server, "--max-num-seqs", "24")
        server.poll(lambda: busy.update(streams.processes()) or rolling.poll() is not None, "the end", ROLL_DEADLINE_S)
        code, out, err = told(rolling)
    assert (code, err) == (0, ""), (out, err)
    assert set(streams.texts) == alone
    assert busy == {0, 1}
    assert builds(server) == [1, 1, 1]
    expected = dict.fromkeys(("3", "4", "5"), 1.0)
    server.poll(lambda: all(seen == expected for seen in builds_as_seen(server)), "both know")
    assert server.metric("cascadeinfer_migrations_total", outcome="moved", reason="drain") > 0
    assert server.metric("cascadeinfer_recovered_requests_total") == 0
    assert [one["restarts"] for one in server.admin()["front_ends"]] == [0, 0]


def pids_up(server: ServerProcess) -> dict[str, int]:
    """Of the engines of instances that serve."""
    return {each["id"]: each["pid"] for each in server.admin()["instances"] if each["phase"] == "up"}


def new_process(server: ServerProcess, before: set[int]) -> Callable[[], Any]:
    """What finds a child of the server that was not there before."""
    return lambda: next((one for one in psutil.Process(server.pid).children() if one.pid not in before), None)


def test_a_front_end_that_dies_and_one_that_starts_in_the_middle(
    server: ServerProcess,
    next_version: Path,  # noqa: F811 - the fixture
) -> None:
    """
    While instances of both versions of the model serve, a new process takes the place of a killed one. It knows both,
    and no text of any process is of both.
    """
    old = texts_of(server)
    before = {one.pid for one in psutil.Process(server.pid).children()}
    rolling = roll(server, "--model", str(next_version), "--timeout-s", str(ROLL_DEADLINE_S))
    server.poll(lambda: "6" in pids_up(server), "the first of the new version")
    find = new_process(server, before | {pids_up(server)["6"]})
    server.poll(find, "the second one is being started")
    starting = find()
    starting.send_signal(signal.SIGSTOP)  # both versions serve until it goes on
    try:
        os.kill(server.admin()["front_ends"][1]["pid"], signal.SIGKILL)
        wait_until_all_serve(server, restarts=1)
        both = {"5": 1.0, "6": 2.0}
        server.poll(lambda: all(both.items() <= seen.items() for seen in builds_as_seen(server)), "both know both")
        with Streams(server) as streams:
            server.poll(lambda: streams.processes() == {0, 1}, "requests of both processes")
            starting.send_signal(signal.SIGCONT)
            code, out, err = told(rolling)
    finally:
        starting.send_signal(signal.SIGCONT)
    assert (code, err) == (0, ""), (out, err)
    new = texts_of(server)
    assert not new & old
    assert set(streams.texts) <= old | new, "a text of both"
    assert set(streams.texts) & old, "none was begun by the old version, which had the stage of the long prompt"
    assert set(streams.texts) & new
    assert builds(server) == [2, 2, 2]
    server.poll(lambda: all(set(seen.values()) == {2.0} for seen in builds_as_seen(server)), "both know the new ones")
    assert "Traceback" not in server.log_tail(n_lines=10_000), server.log_tail()

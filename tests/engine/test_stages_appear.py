"""
A server without configuration, on real engines, learns step costs, plans stages and moves requests, text unchanged.

It also refuses requests far beyond its capacity in good order. The model is tiny, and so is the gain from stages:
planning is made hasty (see quick_server.py), and the workload is one that gains much, short answers beside documents
whose prompts take a hundred times as long as a step.
"""

import random
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_process import API_KEY, MODEL, NO_TLS, QUICK_SERVER, ServerProcess

pytestmark = pytest.mark.engine

N_CLIENTS = 4
PAUSE_S = 0.1
"""
Minimum pause between two requests of a client. Clients with short requests and documents pause at least as long as
their last request took, however slow the machine: near the instances' capacity one stage is best, as no share of it is
left over.
"""
DEADLINE_S = 150.0
HAND_OVERS = 1
MAX_SEQS, MAX_QUEUED = 16, 24
N_BURST = 120


@dataclass(frozen=True)
class Kind:
    """Requests with one prompt and a fixed number of tokens."""

    name: str
    n_prompt: int
    n_tokens: int

    def body(self, *, stream: bool = False) -> dict[str, Any]:
        """What is sent, the same every time."""
        rng = random.Random(self.name)
        return {
            "model": MODEL,
            "prompt": [rng.randrange(3, 500) for _ in range(self.n_prompt)],
            "max_tokens": self.n_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": stream,
        }


SHORT = tuple(Kind(f"short {n}", n, 20) for n in (12, 25, 38, 50))
DOCUMENT = Kind("document", 6000, 16)
GROWING = Kind("growing", 30, 1100)
"""Grows longer than any boundary that the planner may choose between the others."""
DOCUMENT_SHARE = 0.05


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Two instances in one stage."""
    words = ("--policy", "cascade", "--instances", "2", "--stages", "0-:2", "--distributed-executor-backend", "uni")
    words += ("--max-model-len", "8192", "--num-gpu-blocks-override", "1024", "--no-enable-prefix-caching")
    words += ("--max-num-seqs", str(MAX_SEQS), "--max-queued-requests", str(MAX_QUEUED))
    log = tmp_path_factory.mktemp("appear") / "log"
    with ServerProcess(tiny_model, log, *words, program=QUICK_SERVER, environment={"HURRY": "1"}) as server:
        server.wait_until_ready(2)
        yield server


class Clients:
    """One client grows one request at a time; others send short ones and documents with pauses until stopped."""

    def __init__(self, server: ServerProcess) -> None:
        """Nothing is sent yet."""
        self.answers: dict[str, set[str]] = defaultdict(set)
        self.stop = threading.Event()
        self._url = server.url
        self._lock = threading.Lock()

    def run(self, number: int) -> None:
        """One client."""
        rng = random.Random(number)
        with httpx.Client(
            base_url=self._url, headers={"Authorization": f"Bearer {API_KEY}"}, timeout=120, **NO_TLS
        ) as http:
            while not self.stop.is_set():
                kind = DOCUMENT if rng.random() < DOCUMENT_SHARE else rng.choice(SHORT)
                began_s = time.monotonic()
                self._ask(http, GROWING if number == 0 else kind)
                self.stop.wait(PAUSE_S if number == 0 else max(PAUSE_S, time.monotonic() - began_s))

    def _ask(self, http: httpx.Client, kind: Kind) -> None:
        answer = http.post("/v1/completions", json=kind.body())
        assert answer.status_code == HTTPStatus.OK, answer.text
        told = answer.json()
        assert told["usage"]["completion_tokens"] == kind.n_tokens
        with self._lock:
            self.answers[kind.name].add(told["choices"][0]["text"])


def migrations(server: ServerProcess) -> list[str]:
    """How all requests ended."""
    lines = server.get("/metrics").text.splitlines()
    return [line for line in lines if line.startswith("cascadeinfer_migrations_total")]


@pytest.mark.timeout(420)
def test_stages_come_by_themselves(server: ServerProcess) -> None:
    """One stage becomes several, live; every answer to the same prompt is the same, wherever it was computed."""
    assert len(server.admin()["stages"]) == 1
    clients = Clients(server)
    with ThreadPoolExecutor(N_CLIENTS) as executor:
        running = [executor.submit(clients.run, number) for number in range(N_CLIENTS)]
        try:
            server.poll(lambda: len(server.admin()["stages"]) > 1, "several stages", DEADLINE_S)
            server.poll(
                lambda: (
                    server.metric("cascadeinfer_migrations_total", outcome="moved", reason="outgrew_stage")
                    >= HAND_OVERS
                ),
                "hand-overs",
                DEADLINE_S,
            )
        except AssertionError as error:
            error.add_note(f"{server.admin()['stages']}; {migrations(server)}")
            raise
        finally:
            clients.stop.set()
        for client in running:
            client.result()
    names = {kind.name for kind in (*SHORT, DOCUMENT, GROWING)}
    assert {name: len(texts) for name, texts in clients.answers.items()} == dict.fromkeys(names, 1)
    server.poll(server.idle, "nothing held")


def test_far_too_many_are_refused_in_good_order(server: ServerProcess) -> None:
    """
    Twice as many requests at once as can run and wait: the surplus gets HTTP 429 with a retry time, streams too. The
    others are answered as ever, and afterwards everything is as before.

    Their outputs take much longer than it takes this process to send all of them.
    """
    asked = [Kind("burst", 20, 500).body(stream=bool(number % 2)) for number in range(N_BURST)]
    with ThreadPoolExecutor(N_BURST) as executor:
        answers = list(executor.map(lambda body: server.post("/v1/completions", body), asked))
    refused = [answer for answer in answers if answer.status_code == HTTPStatus.TOO_MANY_REQUESTS]
    assert {answer.status_code for answer in answers} == {HTTPStatus.OK, HTTPStatus.TOO_MANY_REQUESTS}
    assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)
    assert all(answer.json()["error"]["code"] == HTTPStatus.TOO_MANY_REQUESTS for answer in refused)
    assert len(answers) - len(refused) >= 2 * MAX_SEQS + MAX_QUEUED
    assert {body["stream"] for body, answer in zip(asked, answers, strict=True) if answer in refused} == {True, False}
    whole = {answer.json()["choices"][0]["text"] for answer in answers[::2] if answer.status_code == HTTPStatus.OK}
    assert len(whole) == 1
    streamed = [answer.text for answer in answers[1::2] if answer.status_code == HTTPStatus.OK]
    assert all(text.rstrip().endswith("data: [DONE]") for text in streamed)
    assert server.metric("cascadeinfer_requests_total", outcome="rejected") == len(refused)
    server.poll(server.idle, "nothing held")
    assert server.post("/v1/completions", SHORT[0].body()).status_code == HTTPStatus.OK

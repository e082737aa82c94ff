"""
Roles that change while a real `cascadeinfer serve --policy roles` serves, with two front ends.

Every plan of this server is another one (see quick_server.py): one instance computes prompts, then none does, with
other token budgets each time. What a request is to yield is the answer to the same request pinned to one instance.
"""

import itertools
import threading
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_process import API_KEY, MODEL, NO_TLS, QUICK_SERVER, ServerProcess

pytestmark = pytest.mark.engine

N_INSTANCES = 3
N_PROCESSES = 2
N_CLIENTS = 4
SEQS = 16
MOST = 2048
CHANGES = 4
DEADLINE_S = 240.0
LENGTHS = (20, 63, 64, 65, 96, 300)


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Three instances in one stage, to begin with."""
    arguments = ["--instances", str(N_INSTANCES), "--policy", "roles", "--stages", f"0-:{N_INSTANCES}"]
    arguments += ["--api-servers", str(N_PROCESSES)]
    arguments += ["--max-num-seqs", str(SEQS), "--max-num-batched-tokens", str(MOST), "--suspect-after-s", "60"]
    log = tmp_path_factory.mktemp("changes") / "log"
    environment = {"ROLES_IN_TURN": "1"}
    with ServerProcess(tiny_model, log, *arguments, program=QUICK_SERVER, environment=environment) as server:
        server.wait_until_ready(N_INSTANCES)
        server.poll(lambda: all(one["up"] for one in server.admin()["front_ends"]), "both front ends", 240)
        yield server


def body_of(n_prompt: int, **more: Any) -> dict[str, Any]:
    """A greedy completion."""
    prompt = [3 + (17 * i * i + 5 * i + 13 * n_prompt) % 500 for i in range(n_prompt)]
    return {"model": MODEL, "prompt": prompt, "max_tokens": 80, "temperature": 0, "ignore_eos": True, **more}


class Clients:
    """Clients that ask the same few questions again and again."""

    def __init__(self, url: str) -> None:
        """Nothing is sent yet."""
        self.answers: dict[int, set[str]] = defaultdict(set)
        self.stop = threading.Event()
        self._url = url

    def run(self, number: int) -> None:
        """One client; a connection for each question, so that both front ends get some."""
        for length in itertools.islice(itertools.cycle(LENGTHS), number, None):
            if self.stop.is_set():
                return
            key = {"Authorization": f"Bearer {API_KEY}"}
            answer = httpx.post(f"{self._url}/v1/completions", json=body_of(length), headers=key, timeout=240, **NO_TLS)
            assert answer.status_code == HTTPStatus.OK, answer.text
            self.answers[length].add(answer.json()["choices"][0]["text"])


def roles_of(server: ServerProcess) -> list[str]:
    """The role of each instance."""
    return [one["role"] for one in server.admin()["instances"]]


@pytest.mark.timeout(600)
def test_roles_change_under_running_requests(server: ServerProcess) -> None:
    """Prefill instances come and go, budgets change, requests are pushed, and no answer is another one than ever."""
    expected = {}
    for length in LENGTHS:
        answer = server.post("/v1/completions", body_of(length, prompt_logprobs=0))
        assert answer.status_code == HTTPStatus.OK, answer.text
        expected[length] = answer.json()["choices"][0]["text"]
    clients = Clients(server.url)
    budgets: set[int] = set()
    with ThreadPoolExecutor(N_CLIENTS) as executor:
        running = [executor.submit(clients.run, number) for number in range(N_CLIENTS)]
        try:
            for turn in range(CHANGES):
                wanted = 1 - turn % 2
                server.poll(lambda n=wanted: roles_of(server).count("prefill") == n, f"turn {turn}", DEADLINE_S)
                budgets |= {one["step_budget"] for one in server.admin()["instances"] if one["step_budget"]}
            server.poll(
                lambda: server.metric("cascadeinfer_migrations_total", outcome="moved", reason="prefilled") > 0,
                "pushes",
                DEADLINE_S,
            )
        finally:
            clients.stop.set()
        for client in running:
            client.result()
    assert clients.answers == {length: {text} for length, text in expected.items() if length in clients.answers}
    assert len(budgets) > 1
    assert all(SEQS <= budget <= MOST for budget in budgets)
    server.poll(server.idle, "nothing held")

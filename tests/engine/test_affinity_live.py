"""The second turn of a conversation on real engines goes to its KV cache, past an instance that ranks first."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from server_process import MODEL, QUICK_SERVER, ServerProcess
from zoo import random_prompt

pytestmark = pytest.mark.engine

N_PROMPT = 1800
HITS = "vllm:prefix_cache_hits_total"


@pytest.fixture
def server(tiny_model: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    """Two instances in one stage."""
    words = ("--policy", "cascade", "--stages", "0-:2", "--max-model-len", "4096")
    with ServerProcess(tiny_model, tmp_path / "log", *words, program=QUICK_SERVER) as server:
        server.wait_until_ready()
        yield server


def turn(server: ServerProcess, prompt: list[int], n_tokens: int) -> None:
    """Run a request with this prompt to its end."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": n_tokens, "temperature": 0, "ignore_eos": True}
    answer = server.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text


def test_second_turn(server: ServerProcess) -> None:
    """A conversation starts on instance 1 while 0 is busy; with both idle, its next turn returns to 1's cache."""
    other, first = random_prompt(N_PROMPT, 1), random_prompt(N_PROMPT, 2)
    with ThreadPoolExecutor(1) as executor:
        busy = executor.submit(turn, server, other, 600)
        server.poll(lambda: server.admin()["instances"][0]["requests"] == 1, "instance 0 is busy")
        turn(server, first, 8)
        busy.result()
    server.poll(server.idle, "idle")
    generated = [server.metric("vllm:generation_tokens_total", engine=name) for name in "01"]
    assert generated == [600, 8]
    hits = server.metric(HITS, engine="1")
    turn(server, first + random_prompt(40, 3), 16)
    assert server.metric("vllm:generation_tokens_total", engine="1") == 24
    assert server.metric(HITS, engine="1") - hits >= N_PROMPT - 64

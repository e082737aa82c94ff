"""
Instances of two workers each, with half of every layer and of every KV block (tensor parallelism), on a real server.

A move pulls each rank's part from the same rank of the source. The server is started once; the last test drains an
instance. All tests run on both model runners.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from server_process import MODEL, QUICK_SERVER, ServerProcess
from zoo import ON_V2, PATIENCE, random_prompt

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900 * PATIENCE)]

N_RANKS = 2
N_TOKENS = 120 if ON_V2 else 400
"""Many, so that a move that is refused on a busy machine is tried again before the end."""
PROMPT = random_prompt(20, 3)
"""Dispatched to instance 0; outgrows its stage after 44 tokens."""
LONG_PROMPT = random_prompt(70, 4)
"""Dispatched to instance 1."""
DEADLINE_S = 240.0 * PATIENCE
MOVES, PINNED = "cascadeinfer_migrations_total", "cascadeinfer_pinned_requests_total"


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Two instances in two stages, four workers in all, with asynchronous scheduling."""
    log = tmp_path_factory.mktemp("tensor-parallel") / "log"
    words = ("--tensor-parallel-size", str(N_RANKS), "--kv-lease-s", str(30 * PATIENCE))
    environment = {"ASYNCHRONOUS": "1"}
    with ServerProcess(tiny_model, log, *words, program=QUICK_SERVER, environment=environment) as server:
        server.wait_until_ready()
        yield server


@pytest.fixture(autouse=True)
def nothing_left(server: ServerProcess) -> Iterator[None]:
    """After every test all instances are up, and none holds anything."""
    yield
    server.poll(server.idle, "idle", DEADLINE_S)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """For a request that runs while something happens."""
    with ThreadPoolExecutor(1) as pool:
        yield pool


def text_of(server: ServerProcess, prompt: list[int], **options: Any) -> str:
    """The greedy text."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": N_TOKENS, "temperature": 0, "ignore_eos": True}
    answer = server.post("/v1/completions", {**body, **options}, timeout_s=DEADLINE_S)
    assert answer.is_success, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


def own_text(server: ServerProcess, prompt: list[int]) -> str:
    """The text of the instance to which the prompt is dispatched: prompt log-probabilities pin a request."""
    pinned = server.metric(PINNED, reason="prompt_logprobs")
    text = text_of(server, prompt, prompt_logprobs=0)
    assert server.metric(PINNED, reason="prompt_logprobs") == pinned + 1
    return text


def instance(server: ServerProcess, name: str) -> dict[str, Any]:
    """What the server says of it."""
    told: dict[str, Any] = server.get(f"/admin/instances/{name}").json()
    return told


def ranks(server: ServerProcess, name: str) -> list[psutil.Process]:
    """The workers of an instance, in the order of their ranks."""
    children = psutil.Process(instance(server, name)["pid"]).children()
    titles = {" ".join(child.cmdline()): child for child in children}
    return [titles[title] for title in sorted(titles) if "Worker_TP" in title]


def wait_for_a_token(server: ServerProcess, name: str) -> None:
    """Wait until a request that runs on this instance has sent one."""

    def sent() -> bool:
        requests = server.admin()["requests"]["oldest"]
        return any(r["instance"] == name and r["tokens"] > len(LONG_PROMPT) for r in requests)

    server.poll(sent, "a token", DEADLINE_S)


def moved(server: ServerProcess, reason: str) -> float:
    """Moves with a pulled KV cache so far."""
    return server.metric(MOVES, outcome="moved", reason=reason)


@pytest.mark.quick_v2
def test_a_request_moves_up(server: ServerProcess) -> None:
    """Copied ahead and pulled from both ranks of its source, a request has the text of one instance."""
    assert [len(ranks(server, name)) for name in "01"] == [N_RANKS, N_RANKS]
    expected = own_text(server, PROMPT)
    assert text_of(server, PROMPT) == expected
    assert moved(server, "outgrew_stage") == 1
    server.poll(lambda: instance(server, "1")["kv_pulls"] == 1, "the pull is reported", DEADLINE_S)
    assert instance(server, "1")["failed_pulls"] == 0
    assert instance(server, "1")["precopied_tokens"] > 0


def test_a_killed_rank_ends_its_instance_only(server: ServerProcess, pool: ThreadPoolExecutor) -> None:
    """The whole instance ends and is replaced, its request continues elsewhere; the new one takes part in moves."""
    expected = own_text(server, LONG_PROMPT)
    former = [psutil.Process(instance(server, "1")["pid"]), *ranks(server, "1")]
    others = ranks(server, "0")
    running = pool.submit(text_of, server, LONG_PROMPT)
    wait_for_a_token(server, "1")
    former[-1].kill()
    assert running.result(DEADLINE_S) == expected
    assert not psutil.wait_procs(former, timeout=DEADLINE_S)[1]
    server.poll(lambda: instance(server, "1")["restarts"] == 1, "restarted", DEADLINE_S)
    server.poll(lambda: instance(server, "1")["phase"] == "up", "up again", DEADLINE_S)
    assert (ranks(server, "0"), instance(server, "0")["restarts"]) == (others, 0)
    assert len(ranks(server, "1")) == N_RANKS
    expected = own_text(server, PROMPT)
    before = moved(server, "outgrew_stage")
    assert text_of(server, PROMPT) == expected
    assert moved(server, "outgrew_stage") == before + 1


@pytest.mark.quick_v2
def test_a_drain_moves_a_request_down(server: ServerProcess, pool: ThreadPoolExecutor) -> None:
    """The other way: a draining instance hands its request over with its KV cache, then ends with its workers."""
    expected = own_text(server, LONG_PROMPT)
    former = ranks(server, "1")
    running = pool.submit(text_of, server, LONG_PROMPT)
    wait_for_a_token(server, "1")
    assert server.delete("/admin/instances/1").json() == {"draining": "1"}
    assert running.result(DEADLINE_S) == expected
    assert moved(server, "drain") == 1
    server.poll(lambda: instance(server, "1").get("how") == "drained", "drained", DEADLINE_S)
    assert not psutil.wait_procs(former, timeout=DEADLINE_S)[1]

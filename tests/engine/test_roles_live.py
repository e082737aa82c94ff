"""
Prefill stages and chunk budgets on a real `cascadeinfer serve --policy roles`: instance 0 computes prompts, 1 and 2
decode. Two front-end processes share them.

What a request is to yield is the answer to the same request pinned to where it decodes (`prompt_logprobs` pins it). The
server is started once. The last test kills its prefill instance.
"""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from server_process import MODEL, QUICK_SERVER, ServerProcess

pytestmark = pytest.mark.engine

THRESHOLD = 40
BUDGET = 48
FEW = 128
"""KV blocks of the prefill instance, by engine options of its own."""
STAGES = f"prefill@{THRESHOLD}-/{BUDGET}:1,0-256:1,256-:1"
PREFILL = "0"
N_REQUESTS = 6
N_PROCESSES = 2
TRIES = 10
"""On a busy machine nobody may have answered in time for a push; the request then goes on where it is parked."""


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Three instances with roles."""
    log = tmp_path_factory.mktemp("server") / "log"
    arguments = ["--instances", "3", "--policy", "roles", "--stages", STAGES, "--max-num-seqs", "16"]
    arguments += ["--instance-args", f"{PREFILL}: --max-num-seqs 6 --num-gpu-blocks-override {FEW}"]
    arguments += ["--no-enable-prefix-caching", "--placement-headers", "--api-servers", str(N_PROCESSES)]
    arguments += ["--suspect-after-s", "60"]  # else a slow step sends its requests elsewhere
    environment = {"KEEP_PLAN": "1"}
    with ServerProcess(tiny_model, log, *arguments, program=QUICK_SERVER, environment=environment) as server:
        server.wait_until_ready(3)
        server.poll(lambda: all(one["up"] for one in server.admin()["front_ends"]), "both front ends", 240)
        yield server


def body_of(n_prompt: int, salt: int, **more: Any) -> dict[str, Any]:
    """A greedy completion."""
    prompt = [3 + (17 * i * i + 5 * i + 13 * salt) % 500 for i in range(n_prompt)]
    return {"model": MODEL, "prompt": prompt, "max_tokens": 60, "temperature": 0, "ignore_eos": True, **more}


def choice_of(server: ServerProcess, body: dict[str, Any]) -> tuple[str, list[Any]]:
    """The text and, where asked for, the log-probabilities of its tokens."""
    answer = server.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    [choice] = answer.json()["choices"]
    return choice["text"], (choice["logprobs"] or {}).get("tokens", [])


def pushes(server: ServerProcess, outcome: str = "moved") -> float:
    """Parked requests that have been moved."""
    return server.metric("cascadeinfer_migrations_total", outcome=outcome, reason="prefilled")


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"logprobs": 2},
        {"max_tokens": 300, "logprobs": 1},  # outgrows its first stage
        {"structured_outputs": {"regex": "[ab]{40}"}, "ignore_eos": False},
        {"min_tokens": 5, "stop_token_ids": [7, 9, 11]},
    ],
    ids=["plain", "logprobs", "long", "grammar", "stop"],
)
def test_prompts_are_computed_apart(server: ServerProcess, more: dict[str, Any]) -> None:
    """Several at once, with prompts around the edges of blocks: each was pushed, and has the text of one instance."""
    bodies = [body_of(n, n, **more) for n in (63, 64, 65, 96, 97, 200)]
    expected = [choice_of(server, {**body, "prompt_logprobs": 0})[0] for body in bodies]
    failed = server.metric("cascadeinfer_failed_pulls_total")
    for _ in range(TRIES):
        before = pushes(server)
        with ThreadPoolExecutor(N_REQUESTS) as executor:
            answers = list(executor.map(lambda body: choice_of(server, body), bodies))
        assert [text for text, _ in answers] == expected
        if pushes(server) - before == len(bodies):
            break
    else:
        pytest.fail(f"in none of {TRIES} rounds was each of them pushed")
    assert server.metric("cascadeinfer_failed_pulls_total") == failed


def test_short_prompts_are_not(server: ServerProcess) -> None:
    """Below the threshold, and pinned, a request is computed where it decodes."""
    before = pushes(server)
    for body in (body_of(THRESHOLD - 1, 1), body_of(100, 1, seed=5, temperature=0.5)):
        answer = server.post("/v1/completions", body)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-cascade-instance"] != PREFILL
    assert pushes(server) == before


def test_budgets_are_in_force(server: ServerProcess) -> None:
    """The prefill instance has engine options and a budget of its own; a long prompt takes several steps there."""
    shown = {one["id"]: (one["kv_blocks"], one["build"]) for one in server.admin()["instances"]}
    assert shown == {PREFILL: (FEW - 1, 1), "1": (255, 0), "2": (255, 0)}, "one block of each is vLLM's null block"
    budgets = {one["id"]: one["step_budget"] for one in server.admin()["instances"]}
    assert budgets[PREFILL] == BUDGET
    assert budgets["1"] == budgets["2"] > BUDGET
    steps = {one["id"]: one["steps"] for one in server.admin()["instances"]}
    text, _ = choice_of(server, body_of(600, 3))
    assert text == choice_of(server, body_of(600, 3, prompt_logprobs=0))[0]
    server.poll(lambda: steps_of_prefill(server) - steps[PREFILL] >= 600 // BUDGET, "the steps are counted")


def steps_of_prefill(server: ServerProcess) -> int:
    """Steps that the prefill instance has made."""
    return next(one["steps"] for one in server.admin()["instances"] if one["id"] == PREFILL)


@pytest.mark.timeout(600)
def test_the_prefill_instance_dies(server: ServerProcess) -> None:
    """Requests there go on elsewhere with the same text; once it is back, prompts go there again, in its budget."""
    bodies = [body_of(300, salt, max_tokens=200) for salt in range(N_REQUESTS)]
    expected = [choice_of(server, {**body, "prompt_logprobs": 0})[0] for body in bodies]
    [pid] = [one["pid"] for one in server.admin()["instances"] if one["id"] == PREFILL]
    with ThreadPoolExecutor(N_REQUESTS) as executor:
        futures = [executor.submit(choice_of, server, body) for body in bodies]
        server.poll(lambda: server.admin()["requests"], "requests are there")
        os.kill(pid, signal.SIGKILL)
        assert [future.result()[0] for future in futures] == expected
    server.poll(lambda: len(server.get("/health/ready").json()["instances"]) == 3, "back", 240)
    before = pushes(server)
    for _ in range(TRIES):
        assert choice_of(server, bodies[0])[0] == expected[0]
        if pushes(server) > before:
            break
    else:
        pytest.fail(f"none of {TRIES} requests was pushed")
    assert {one["id"]: one["step_budget"] for one in server.admin()["instances"]}[PREFILL] == BUDGET

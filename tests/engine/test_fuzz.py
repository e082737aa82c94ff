"""
Request bodies generated from the server's own OpenAPI schema, against a real server: none may kill an instance.

A wholly random body is nearly always refused at once. So most are a good body with a few fields set to values that the
schema allows or forbids; the rest are the generator's own. A client that waits too long leaves, which is part of the
test. `make fuzz` sends many more bodies than CI does.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode
from server_process import API_KEY, MODEL, NO_TLS, QUICK_SERVER, ServerProcess

pytestmark = [pytest.mark.engine, pytest.mark.timeout(3600)]

PROMPT: Any = {"prompt": "the quick brown fox", "max_tokens": 8}
CHAT: Any = {"messages": [{"role": "user", "content": "tell me a story"}], "max_tokens": 8}
GOOD_BODIES: dict[str, Any] = {
    "/v1/completions": PROMPT,
    "/v1/chat/completions": CHAT,
    "/v1/chat/completions/batch": {**CHAT, "messages": [CHAT["messages"], CHAT["messages"]]},
    "/v1/responses": {"input": "tell me a story", "max_output_tokens": 8},
    "/v1/messages": CHAT,
    "/v1/messages/count_tokens": {"messages": CHAT["messages"]},
    "/inference/v1/generate": {"token_ids": [300, 301, 302], "sampling_params": {"max_tokens": 8}},
    "/generative_scoring": {"query": "is it red?", "items": ["fox", "dog"], "label_token_ids": [300, 301]},
    "/invocations": PROMPT,
    "/tokenize": {"prompt": "the quick brown fox"},
    "/detokenize": {"tokens": [300, 301]},
}
"""Good bodies by surface, for those that reach an engine or the tokeniser; surfaces that a server lacks are skipped."""
SCHEMA_OF = {"/invocations": "/v1/completions", "/inference/v1/generate": "/v1/completions"}
"""Surfaces whose own schema says nothing, or nothing satisfiable, and the surface whose fields they are given."""
MAX_CHANGES = 3
FEW_EXAMPLES = 12
PATIENCE_S = 3.0
"""The client leaves after this: a body may ask for thousands of tokens."""
MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server whose instances start quickly, with two stages so that requests move."""
    log = tmp_path_factory.mktemp("fuzz") / "log"
    with ServerProcess(tiny_model, log, "--distributed-executor-backend", "uni", program=QUICK_SERVER) as server:
        server.wait_until_ready()
        yield server


@pytest.fixture(scope="module")
def answers(request: pytest.FixtureRequest) -> Iterator[Counter[str]]:
    """Answers by surface and status; written to a file if one is asked for."""
    counted: Counter[str] = Counter()
    yield counted
    path: str | None = request.config.getoption("--fuzz-report")
    if path is not None:
        Path(path).write_text(
            json.dumps({"bodies": counted.total(), "answers": dict(sorted(counted.items()))}, indent=2) + "\n"
        )


def changed(path: str, fields: dict[str, Any]) -> dict[str, Any]:
    """A good body with some fields changed."""
    good = {"model": MODEL, **GOOD_BODIES[path]}
    if "sampling_params" in good:
        return {**good, "sampling_params": {**good["sampling_params"], **fields}}
    return {**good, **fields}


def restarts(server: ServerProcess) -> int:
    """The number of instance restarts."""
    return sum(instance["restarts"] for instance in server.admin()["instances"])


@pytest.mark.parametrize("mode", MODES, ids=[mode.value for mode in MODES])
@pytest.mark.parametrize("path", GOOD_BODIES)
def test_no_body_ends_an_instance(
    server: ServerProcess, answers: Counter[str], path: str, mode: GenerationMode, request: pytest.FixtureRequest
) -> None:
    """After all bodies to a surface, no instance has restarted, and nothing is held for any of them."""
    document = server.get("/openapi.json").json()
    if path not in document["paths"]:
        pytest.skip(f"this server has no {path}")
    schema = schemathesis.openapi.from_dict(document)
    body_of = schema[SCHEMA_OF.get(path, path)]["POST"].as_strategy(generation_mode=mode)
    n_examples = request.config.getoption("--fuzz-examples") or FEW_EXAMPLES
    before = restarts(server)

    @settings(
        max_examples=n_examples,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
        deadline=None,
    )
    @given(case=body_of, data=st.data())
    def send(case: Any, data: st.DataObject) -> None:
        body = case.body
        if isinstance(body, dict) and data.draw(st.integers(0, 4)):
            fields = data.draw(st.lists(st.sampled_from([*sorted(body), "model"]), max_size=MAX_CHANGES))
            body = changed(path, {field: body[field] for field in fields if field in body})
        answers[f"{path} {_send(server, path, body)}"] += 1

    send()
    assert restarts(server) == before, server.log_tail()
    server.poll(server.idle, "nothing held")


def _send(server: ServerProcess, path: str, body: Any) -> str:
    """The status of the answer, or that the client left."""
    content = body if isinstance(body, bytes) else json.dumps(body, default=str).encode(errors="surrogatepass")
    headers = {"Authorization": f"Bearer {API_KEY}", "Content-Type": "application/json"}
    try:
        with httpx.stream(
            "POST", server.url + path, content=content, headers=headers, timeout=PATIENCE_S, **NO_TLS
        ) as answer:
            for _ in answer.iter_bytes():
                pass
            return str(answer.status_code)
    except httpx.TimeoutException:
        return "left"
    except httpx.RemoteProtocolError:
        return "broken off"

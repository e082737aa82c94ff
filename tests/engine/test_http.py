"""
The server as its users see it: a real `cascadeinfer serve`, asked with the official `openai` client and plain HTTP.

The server is started once. The last test ends it.
"""

import contextlib
import json
import os
import signal
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import vllm
from server_process import API_KEY, MODEL, NO_TLS, PIPES, ServerProcess

import cascadeinfer
from cascadeinfer.cluster.local import LOOPBACK
from support.browser import Page, chromium

pytestmark = pytest.mark.engine

SHORT = "the quick brown fox"
MESSAGES: Any = [{"role": "user", "content": "tell me a story"}]
N_TOKENS = 120
"""With a short prompt this crosses the stage edge at 64 tokens."""
LONG = 400
"""Far enough past the edge that the server checks it again before its end, even on a busy machine."""
FOREVER = {"ignore_eos": True}
BEARER = {"Authorization": f"Bearer {API_KEY}"}
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look a word up.",
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string", "enum": ["fox", "dog"]}},
            "required": ["word"],
        },
    },
}


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The server, ready; its log must hold no traceback at the end."""
    log = tmp_path_factory.mktemp("server") / "log"
    # A test here kills two instances under one request.
    words = ("--poison-deaths", "3", "--placement-headers")
    with ServerProcess(tiny_model, log, *words) as server:
        server.wait_until_ready()
        yield server


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test no request lives in the server, and no instance holds anything."""
    yield
    if "server" in request.fixturenames:
        server: ServerProcess = request.getfixturevalue("server")
        if server.exit_code is None:
            server.poll(server.idle, "idle")


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    """The official client, with the key."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=API_KEY, max_retries=0, timeout=120) as client:
        yield client


def complete(client: openai.OpenAI, prompt: str = SHORT, n_tokens: int = N_TOKENS, **options: Any) -> Any:
    """A greedy completion that does not end by itself."""
    return client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=n_tokens, temperature=0, extra_body=FOREVER, **options
    )


def streamed(client: openai.OpenAI, prompt: str = SHORT, n_tokens: int = N_TOKENS, **options: Any) -> str:
    """The same, as a stream."""
    return "".join(chunk.choices[0].text for chunk in complete(client, prompt, n_tokens, stream=True, **options))


# --- the OpenAI API --------------------------------------------------------------------------------------------------


def test_models(client: openai.OpenAI) -> None:
    """The model is listed under its served name with its maximum length."""
    [model] = client.models.list().data
    assert model.id == MODEL
    assert model.model_dump()["max_model_len"] == 1024


def test_completion_moves_and_stream_agrees(client: openai.OpenAI, server: ServerProcess) -> None:
    """A completion moves between the stages as it grows, and its stream has the same text."""
    moved = server.metric("cascadeinfer_migrations_total", outcome="moved", reason="outgrew_stage")
    completion = complete(client, n_tokens=LONG)
    assert server.metric("cascadeinfer_migrations_total", outcome="moved") > moved
    assert completion.usage.completion_tokens == LONG
    assert completion.choices[0].finish_reason == "length"
    assert streamed(client, n_tokens=LONG) == completion.choices[0].text


def test_chat_moves_and_stream_agrees(client: openai.OpenAI) -> None:
    """The same for chat, with usage in the last chunk of the stream."""
    options: Any = {
        "model": MODEL,
        "messages": MESSAGES,
        "max_tokens": N_TOKENS,
        "temperature": 0,
        "extra_body": FOREVER,
    }
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == N_TOKENS


def test_chat_logprobs(client: openai.OpenAI) -> None:
    """Every token has its log-probabilities, including those after a move, and two runs agree."""
    runs = [
        client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=N_TOKENS, temperature=0, logprobs=True, top_logprobs=2,
            extra_body=FOREVER,
        )
        for _ in range(2)
    ]  # fmt: skip
    first, second = ([(t.token, t.logprob) for t in run.choices[0].logprobs.content] for run in runs)
    assert len(first) == N_TOKENS
    assert [token for token, _ in first] == [token for token, _ in second]
    assert [value for _, value in first] == pytest.approx([value for _, value in second], abs=1e-3)


def test_json_schema(client: openai.OpenAI) -> None:
    """`response_format` with a JSON schema is obeyed, across a move."""
    items = {"type": "string", "enum": ["red", "green", "blue"]}
    schema = {
        "type": "object",
        "properties": {"colours": {"type": "array", "items": items, "minItems": 25, "maxItems": 30}},
        "required": ["colours"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=600, temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "colours", "schema": schema, "strict": True}},
    )  # fmt: skip
    assert 25 <= len(json.loads(answer.choices[0].message.content)["colours"]) <= 30


def test_tokens_behind_a_grammar(client: openai.OpenAI, server: ServerProcess) -> None:
    """With `ignore_eos` a text continues past its grammar's end, moves there, and kills no instance."""
    moved = server.metric("cascadeinfer_migrations_total", outcome="moved", reason="outgrew_stage")
    schema = {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100}
    chunks = list(
        client.completions.create(
            model=MODEL, prompt="give me a number", max_tokens=300, temperature=0, stream=True,
            extra_body={**FOREVER, "structured_outputs": {"json": schema}},
        )
    )  # fmt: skip
    assert chunks[-1].choices[0].finish_reason == "length"
    assert server.metric("cascadeinfer_migrations_total", outcome="moved", reason="outgrew_stage") > moved
    assert [instance["restarts"] for instance in server.admin()["instances"]] == [0, 0]


def test_named_tool(client: openai.OpenAI) -> None:
    """A tool that must be called is called, once, with JSON arguments."""
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=60, temperature=0, tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "look_up"}},
    )  # fmt: skip
    [call] = answer.choices[0].message.tool_calls
    assert call.function.name == "look_up"
    json.loads(call.function.arguments)


def test_automatic_tool(client: openai.OpenAI) -> None:
    """Tools on offer are accepted; a random model writes text instead."""
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=10, temperature=0, tools=[TOOL], tool_choice="auto"
    )
    assert answer.choices[0].message.content


def test_stop_string_and_n(client: openai.OpenAI) -> None:
    """A stop string ends the text where it occurs; `n` gives that many choices."""
    text = complete(client).choices[0].text
    stop = text[-15:-5]
    stopped = complete(client, stop=[stop]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (text[: text.index(stop)], "stop")
    several = client.completions.create(model=MODEL, prompt=SHORT, max_tokens=80, n=3, extra_body=FOREVER)
    assert several.usage.completion_tokens == 3 * 80


def test_tokenize(server: ServerProcess) -> None:
    """Text and tokens convert both ways."""
    tokens = server.post("/tokenize", {"model": MODEL, "prompt": SHORT}).json()
    assert tokens["count"] == len(tokens["tokens"])
    back = server.post("/detokenize", {"model": MODEL, "tokens": tokens["tokens"]}).json()
    assert back["prompt"] == SHORT


def test_many_streams_at_once(client: openai.OpenAI) -> None:
    """A dozen concurrent streams of different lengths, each as if it were alone."""
    prompts = [SHORT + " and the dog" * number for number in range(12)]
    alone = [complete(client, prompt).choices[0].text for prompt in prompts]
    together = [""] * len(prompts)

    def run(number: int) -> None:
        together[number] = streamed(client, prompts[number])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


# --- what operators see ----------------------------------------------------------------------------------------------


def test_metrics(client: openai.OpenAI, server: ServerProcess) -> None:
    """Our metrics and vLLM's, the latter with each instance as `engine`; transfers as NIXL counts them."""
    before = server.metric("cascadeinfer_requests_total", outcome="finished")
    transfers = server.metric("vllm:nixl_xfer_time_seconds_count")
    moved = server.metric("cascadeinfer_migrations_total", outcome="moved")
    migrations = server.metric("cascadeinfer_migrations_total")
    complete(client)
    assert server.metric("cascadeinfer_requests_total", outcome="finished") == before + 1
    assert server.metric("cascadeinfer_instance_up") == 2
    assert server.metric("cascadeinfer_migration_pause_seconds_count", outcome="moved") > 0
    text = server.get("/metrics").text
    for name in ("running", "waiting", "kv_usage", "kv_pulls", "failed_pulls", "pinned", "restarts"):
        for instance in ("0", "1"):
            assert f'cascadeinfer_instance_{name}{{instance="{instance}",stage="{instance}"}}' in text
    for name in ("running", "waiting", "kv_usage"):
        assert f'cascadeinfer_stage_{name}{{stage="1"}}' in text
    for engine in ("0", "1"):
        assert server.metric("vllm:generation_tokens_total", engine=engine) > 0
    new_moves = server.metric("cascadeinfer_migrations_total", outcome="moved") - moved
    assert new_moves >= 1
    n_copies_max = server.metric("cascadeinfer_migrations_total") - migrations
    n_reads = server.metric("vllm:nixl_xfer_time_seconds_count") - transfers
    assert new_moves <= n_reads <= new_moves + n_copies_max, "one for what goes ahead, one for the rest"
    assert server.metric("cascadeinfer_instance_failed_pulls") == 0


def test_pinned_request_is_counted(client: openai.OpenAI, server: ServerProcess) -> None:
    """A request that may not move is counted in a metric."""
    before = server.metric("cascadeinfer_pinned_requests_total", reason="seeded_sampling")
    client.completions.create(model=MODEL, prompt=SHORT, max_tokens=5, temperature=1.0, seed=1)
    assert server.metric("cascadeinfer_pinned_requests_total", reason="seeded_sampling") == before + 1


def test_answers_say_where_they_come_from(server: ServerProcess) -> None:
    """A whole answer names its last instance and its moves, a stream the instance of its first token."""
    body = {"model": MODEL, "prompt": SHORT, "max_tokens": LONG, "temperature": 0, **FOREVER}
    whole = server.post("/v1/completions", body)
    assert whole.headers["x-cascade-instance"] == "1"
    assert int(whole.headers["x-cascade-moves"]) >= 1
    assert whole.headers["x-request-id"].startswith(whole.json()["id"])
    stream = server.post("/v1/completions", {**body, "stream": True})
    assert stream.headers["x-cascade-instance"] == "0"
    assert "x-cascade-moves" not in stream.headers
    assert "x-cascade-instance" not in server.get("/v1/models").headers


def test_versions(server: ServerProcess) -> None:
    """The version of vLLM, as its own server says it, and ours."""
    assert server.get("/version").json() == {"version": vllm.__version__, "cascadeinfer": cascadeinfer.__version__}


def test_health(server: ServerProcess) -> None:
    """The three health routes need no key."""
    for path in ("/health", "/health/live", "/health/ready"):
        assert server.get(path, key=None).status_code == 200
    assert server.get("/health/ready", key=None).json() == {"status": "ready", "instances": ["0", "1"]}


def test_admin_instances(client: openai.OpenAI, server: ServerProcess) -> None:
    """Stages, instances with their load, requests and migrations, as JSON."""
    stream = complete(client, n_tokens=500, stream=True)
    for _ in range(100):
        next(stream)
    server.poll(lambda: any(instance["running"] for instance in server.admin()["instances"]), "running")
    seen = server.admin()
    assert seen["stages"] == [{"range": "0-64", "instances": ["0"]}, {"range": "64-", "instances": ["1"]}]
    assert [instance["id"] for instance in seen["instances"]] == ["0", "1"]
    assert all(psutil.pid_exists(instance["pid"]) for instance in seen["instances"])
    [request] = seen["requests"]["oldest"]
    assert request["tokens"] >= 64
    assert sum(instance["requests"] for instance in seen["instances"]) == seen["requests"]["live"] == 1
    assert any(instance["kv_blocks_used"] > 0 and instance["lengths"] for instance in seen["instances"])
    stream.close()


def test_operators_page(client: openai.OpenAI, server: ServerProcess) -> None:
    """The page is open and without data; a viewer with the key sees a request in its lane, its move and its story."""
    assert server.get("/admin", key=None).headers["content-security-policy"].startswith("default-src 'none'")
    assert server.get("/admin/events", key=None).status_code == 401
    with server.viewer() as pictures:
        before = next(pictures)
        assert (before["service"]["model"], before["service"]["max_tokens"]) == (MODEL, 1024)
        assert [(stage["lo"], stage["hi"], stage["instances"]) for stage in before["stages"]] == [
            (0, 64, ["0"]), (64, None, ["1"]),
        ]  # fmt: skip
        n_moved = sum(move["count"] for move in before["moves"]["ended"] if move["outcome"] == "moved")
        stream = complete(client, n_tokens=900, stream=True)
        for _ in range(N_TOKENS):
            next(stream)
        running = next(picture for picture in pictures if any(i["lengths"] for i in picture["instances"]))
        [request] = running["requests"]["oldest"]
        story = server.get(f"/admin/requests/{request['id']}").json()
        assert story["chapters"][0]["text"].startswith("arrived")
        for _ in stream:
            pass
        after = next(picture for picture in pictures if not picture["requests"]["live"])
    moved = [move for move in after["moves"]["ended"] if move["outcome"] == "moved"]
    assert sum(move["count"] for move in moved) > n_moved
    assert all(move["pause_s"]["p50"] > 0.0 for move in moved)
    assert server.get(f"/admin/requests/{request['id']}").status_code == 404


def test_operators_page_in_a_browser(server: ServerProcess) -> None:
    """The served page shows both instances of this server, with nothing to complain of in the browser."""
    with chromium() as browser:
        page = Page(browser, server.url)
        page.watch(API_KEY)
        assert page.js("[...document.querySelectorAll('#names .id')].map((id) => id.textContent)") == ["0", "1"]
        assert "2 of 2" in page.text("#strip")
        assert page.errors() == []


def test_everything_listens_on_the_loopback(server: ServerProcess) -> None:
    """No port of server, engines or workers is reachable from outside; named sockets are in the private folder."""
    folder = server.folder()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    listening, named = [], []
    for process in server.family():
        with contextlib.suppress(psutil.NoSuchProcess):
            inet = process.net_connections(kind="inet")
            listening += [(process.name(), c.laddr) for c in inet if c.status == psutil.CONN_LISTEN or not c.raddr]
            named += [c.laddr for c in process.net_connections(kind="unix") if c.laddr]
    assert len(listening) >= 5  # HTTP, two side channels, two of UCX
    assert {address.ip for _, address in listening} <= {LOOPBACK, "::1"}, listening
    paths = {Path(name) for name in named if not name.startswith(("@", "\0"))}
    assert len(paths) >= 6
    assert all(folder in path.parents for path in paths), paths


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_each_instance_computes_on_its_own_cores(server: ServerProcess) -> None:
    """The thread that computes the model stays on its cores, though NIXL's connector moves it when it loads."""
    workers = [process for process in server.family() if process.name() == "VLLM::Worker"]
    first, second = (set(worker.cpu_affinity()) for worker in workers)
    assert first.isdisjoint(second) or len(os.sched_getaffinity(0)) < 2


@pytest.mark.parametrize("key", [None, "wrong"])
def test_api_key_is_needed(server: ServerProcess, key: str | None) -> None:
    """Without the key, or with another: 401, on the OpenAI and on the admin routes."""
    assert server.get("/v1/models", key=key).status_code == 401
    assert server.get("/admin/instances", key=key).status_code == 401
    assert server.post("/v1/completions", {"model": MODEL, "prompt": SHORT}, key=key).status_code == 401


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/invocations"), ("POST", "/generative_scoring"), ("POST", "/tokenize"), ("POST", "/detokenize"),
        ("POST", "/scale_elastic_ep"), ("GET", "/load"), ("GET", "/version"), ("GET", "/kv_event_sources"),
        ("GET", "/docs"), ("GET", "/openapi.json"), ("DELETE", "/admin/instances/0"), ("GET", "/nothing"),
    ],
)  # fmt: skip
def test_everything_asks_for_the_key(server: ServerProcess, method: str, path: str) -> None:
    """Each of these once answered without a key."""
    answer = httpx.request(method, server.url + path, json={"model": MODEL, "prompt": SHORT}, timeout=60, **NO_TLS)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"


def test_what_cannot_work_says_so(server: ServerProcess) -> None:
    """The answer is one sentence that names what to use instead."""
    answer = server.post("/scale_elastic_ep", {"new_data_parallel_size": 3})
    assert answer.status_code == 501
    assert "/admin/instances" in answer.json()["error"]["message"]


@pytest.mark.parametrize("priority", [10**6 + 1, -(10**6) - 1, 2**63, 10**30])
def test_priorities_beyond_all_bounds(server: ServerProcess, priority: int) -> None:
    """They are refused and leave nothing behind: some would not fit into a message to an engine."""
    answer = server.post("/v1/completions", {"model": MODEL, "prompt": SHORT, "priority": priority})
    assert answer.status_code == 400
    server.poll(server.idle, "idle")


FORGED: Any = {"do_remote_prefill": True}
CHAT: Any = {"model": MODEL, "messages": MESSAGES, "max_tokens": 4}
COMPLETION: Any = {"model": MODEL, "prompt": SHORT, "max_tokens": 4}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {**COMPLETION, "kv_transfer_params": FORGED}),
        ("/v1/completions", {**COMPLETION, "kv_transfer_params": {"cascade_prompt_tokens": "x"}}),
        ("/v1/completions", {**COMPLETION, "kv_transfer_params": {"do_remote_decode": True}}),
        ("/v1/completions", {**COMPLETION, "vllm_xargs": {"kv_transfer_params": FORGED}}),
        ("/v1/chat/completions", {**CHAT, "kv_transfer_params": FORGED}),
        ("/v1/responses", {"model": MODEL, "input": SHORT, "kv_transfer_params": FORGED}),
        ("/v1/messages", {**CHAT, "kv_transfer_params": FORGED}),
        ("/invocations", {**COMPLETION, "kv_transfer_params": FORGED}),
    ],
)
def test_forged_tickets_are_refused(server: ServerProcess, path: str, body: Any, *, stream: bool) -> None:
    """All APIs refuse them, streams too; one such request once killed all instances."""
    answer = server.post(path, {**body, "stream": stream})
    assert answer.status_code == 400
    assert "kv_transfer_params" in answer.json()["error"]["message"]
    assert [instance["restarts"] for instance in server.admin()["instances"]] == [0, 0]


ENUM: Any = {"type": "string", "enum": [f"value {i}" for i in range(6000)]}
BIG_TOOL: Any = {
    "type": "function",
    "function": {"name": "f", "strict": True, "parameters": {"type": "object", "properties": {"a": ENUM}}},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {**COMPLETION, "structured_outputs": {"json": ENUM}}),
        ("/v1/completions", {**COMPLETION, "structured_outputs": {"regex": "((a{1,200}){1,200}){1,200}"}}),
        ("/v1/completions", {**COMPLETION, "structured_outputs": {"choice": ENUM["enum"]}}),
        (
            "/v1/chat/completions",
            {**CHAT, "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": ENUM}}},
        ),
        (
            "/v1/chat/completions",
            {**CHAT, "tools": [BIG_TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
        ),
    ],
    ids=["schema", "regex", "choice", "response_format", "tool"],
)
def test_grammars_that_are_too_large_are_refused(server: ServerProcess, path: str, body: Any, *, stream: bool) -> None:
    """Every form is refused with one sentence, and with its own status if nothing has been sent yet."""
    answer = server.post(path, {**body, "stream": stream})
    assert answer.status_code == 400
    assert "the structured output" in answer.json()["error"]["message"]
    server.poll(server.idle, "idle")


def test_prompt_too_long(client: openai.OpenAI) -> None:
    """A prompt above the model's maximum is a 400 that names the maximum."""
    with pytest.raises(openai.BadRequestError, match="1024"):
        complete(client, prompt="fox " * 3000)
    with pytest.raises(openai.BadRequestError, match="1024"):
        complete(client, n_tokens=5000)


def test_unknown_model(client: openai.OpenAI) -> None:
    """Another model's name is a 404 that repeats it."""
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        client.completions.create(model="gpt-9", prompt=SHORT)


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"",
        b"[]",
        {"model": MODEL},
        {"model": MODEL, "prompt": SHORT, "max_tokens": -1},
        {"model": MODEL, "prompt": SHORT, "temperature": "hot"},
        {"model": MODEL, "prompt": SHORT, "temperature": -1},
        {"model": MODEL, "prompt": SHORT, "n": 0},
        {"model": MODEL, "prompt": SHORT, "logprobs": 1000},
        {"model": MODEL, "prompt": SHORT, "structured_outputs": {"regex": "(["}},
        {"model": MODEL, "prompt": [999999]},
    ],
    ids=str,
)
def test_malformed_request(server: ServerProcess, body: Any) -> None:
    """A body that is not a request is a 4xx with a message, and the server goes on."""
    answer = server.post("/v1/completions", body)
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.json()["error"]["message"]


def test_unknown_route(server: ServerProcess) -> None:
    """An unknown route is a 404."""
    assert server.get("/v1/nothing").status_code == 404


def test_requests_that_end_before_their_first_token(server: ServerProcess) -> None:
    """Requests abandoned early, or refused by vLLM, even among siblings, do not live on (`nothing_left`)."""
    abandoned = {**COMPLETION, "prompt": [300] * 200, "max_tokens": 400, **FOREVER}
    several = {"prompt": [[300] * 200, [301] * 200]}
    beams = {"use_beam_search": True, "n": 2, "max_tokens": 40}
    kinds: tuple[dict[str, Any], ...] = (
        {},
        {"n": 3},
        {"stream": True},
        several,
        {**several, "n": 2, "stream": True},
        beams,
    )
    for body in ({**abandoned, **kind} for kind in kinds):
        for _ in range(20):
            with contextlib.suppress(httpx.TimeoutException):
                httpx.post(server.url + "/v1/completions", json=body, headers=BEARER, timeout=0.02, **NO_TLS)
    for wrong in (
        {"prompt": [5] * 5000},
        {"max_tokens": -1},
        {"prompt": [10**9]},
        {"logit_bias": {"9999999": 1}},
        {"structured_outputs": {"regex": "("}},
        {"n": 3, "structured_outputs": {"json": {"type": "nothing"}}},
        {"prompt": [SHORT, [5] * 5000]},
        {"stop_token_ids": [2**70]},
        {"n": 3, "stop": ["\ud800"]},
        {"request_id": "\ud800"},
    ):
        for _ in range(20):
            answer = server.post("/v1/completions", json.dumps({**COMPLETION, **wrong}).encode())
            assert answer.status_code == 400, answer.text


def test_client_disconnects(client: openai.OpenAI, server: ServerProcess) -> None:
    """Clients that hang up in mid-stream free their requests (the fixture `client` waits for that)."""
    before = server.metric("cascadeinfer_requests_total", outcome="aborted")
    for n_chunks in (0, 1, 30, 45, 60):
        stream = complete(client, n_tokens=900, stream=True)
        for _ in range(n_chunks):
            next(stream)
        stream.close()
    server.poll(server.idle, "idle")
    assert server.metric("cascadeinfer_requests_total", outcome="aborted") == before + 5


def test_both_instances_are_killed(client: openai.OpenAI, server: ServerProcess) -> None:
    """
    `kill -9` of the instance that has the request, then of the other's worker process, both in mid-stream.

    The client sees a pause, no error, and the same text; both instances come back and serve again.
    """
    expected = complete(client, n_tokens=900).choices[0].text
    before = {instance["id"]: instance for instance in server.admin()["instances"]}
    stream = complete(client, n_tokens=900, stream=True)
    text = "".join(next(stream).choices[0].text for _ in range(100))
    [first] = [instance for instance in server.admin()["instances"] if instance["requests"]]
    os.kill(first["pid"], signal.SIGKILL)
    text += "".join(next(stream).choices[0].text for _ in range(100))
    [second] = [instance for instance in server.admin()["instances"] if instance["requests"]]
    assert second["id"] != first["id"]
    [worker] = [c for c in psutil.Process(second["pid"]).children() if "Worker" in " ".join(c.cmdline())]
    worker.kill()
    text += "".join(chunk.choices[0].text for chunk in stream)
    assert text == expected

    def restarted() -> bool:
        now = server.admin()["instances"]
        return all(i["up"] and i["restarts"] == before[i["id"]]["restarts"] + 1 for i in now)

    server.poll(restarted, "restarted", 240)
    # Nothing of the killed ones is left; there is one folder per live instance.
    server.poll(lambda: len(list(server.folder().glob("i*"))) == 2, "two folders")
    assert not [path for path in server.folder().iterdir() if path.is_socket()]
    moved = server.metric("cascadeinfer_migrations_total", outcome="moved")
    assert streamed(client) == complete(client).choices[0].text
    assert server.metric("cascadeinfer_migrations_total", outcome="moved") >= moved + 2


@pytest.mark.parametrize(
    ("body", "status"),
    [({"count": 0}, 400), ({"count": 65}, 400), ({"count": "many"}, 400), ({"number": 1}, 400), (b"{", 400)],
)
def test_bad_bodies_of_adding(server: ServerProcess, body: Any, status: int) -> None:
    """They are refused with a reason, and nothing is added."""
    answer = server.post("/admin/instances", body)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]
    assert [instance["id"] for instance in server.admin()["instances"]] == ["0", "1"]


def test_an_instance_is_replaced(client: openai.OpenAI, server: ServerProcess) -> None:
    """Adding and draining during streams leaves them unchanged; metrics and layout follow, no pipe leaks."""
    pipes = server.open_files()[PIPES]
    expected = complete(client, n_tokens=900).choices[0].text
    assert server.post("/admin/instances", {}, key=None).status_code == 401
    assert server.delete("/admin/instances/1", key=None).status_code == 401
    assert server.delete("/admin/instances/7").status_code == 404
    assert server.delete("/admin/instances/1?timeout_s=-1").status_code == 400
    assert server.post("/admin/instances", {}).json() == {"added": ["2"]}
    assert streamed(client, n_tokens=900) == expected
    server.poll(lambda: server.get("/admin/instances/2").json()["phase"] == "up", "up", 240)
    assert server.admin()["stages"][1]["instances"] == ["1", "2"]

    stream = complete(client, n_tokens=900, stream=True)
    text = "".join(next(stream).choices[0].text for _ in range(150))
    place = server.admin()["requests"]["oldest"][0]["instance"]
    assert place in {"1", "2"}
    other = {"1": "2", "2": "1"}[place]
    moved = server.metric("cascadeinfer_migrations_total", outcome="moved", reason="drain")
    assert server.delete(f"/admin/instances/{place}").json() == {"draining": place}
    refused = server.delete(f"/admin/instances/{place}")
    assert (refused.status_code, "drains already" in refused.text) in {(409, True), (404, False)}
    for chunk in stream:
        text += chunk.choices[0].text
    assert text == expected
    assert server.metric("cascadeinfer_migrations_total", outcome="moved", reason="drain") == moved + 1
    server.poll(lambda: server.get(f"/admin/instances/{place}").json().get("how") == "drained", "drained")
    assert server.get("/health/ready", key=None).json()["instances"] == ["0", other]
    assert server.admin()["stages"][1]["instances"] == [other]
    shown = server.get("/metrics").text
    assert f'engine="{other}"' in shown
    assert f'engine="{place}"' not in shown
    assert f'instance="{place}"' not in shown
    assert server.metric("vllm:generation_tokens_total", engine=other) > 0
    server.poll(lambda: server.open_files()[PIPES] <= pipes, "as many pipes as before", 20)


def test_sigterm_drains(client: openai.OpenAI, server: ServerProcess) -> None:
    """After SIGTERM, even during an add, the running stream completes, new connections are refused, all exit."""
    expected = complete(client, n_tokens=900).choices[0].text
    assert server.post("/admin/instances", {}).status_code == 202
    everyone, folder = server.family(), server.folder()
    assert len(everyone) >= 5  # the server, two engines, two workers
    stream = complete(client, n_tokens=900, stream=True)
    text = next(stream).choices[0].text
    refused_while_running = False
    with server.viewer() as pictures:  # who never leaves
        next(pictures)
        server.send_signal(signal.SIGTERM)
        for chunk in stream:
            text += chunk.choices[0].text
            if not refused_while_running:
                try:
                    server.get("/health/live")
                except httpx.TransportError:
                    refused_while_running = True
        assert [picture for picture in pictures if not picture] == [{}]  # the end of its stream
    assert text == expected
    assert refused_while_running
    assert server.wait_ended(60) == 0
    assert not psutil.wait_procs(everyone, timeout=20)[1]
    assert not folder.exists()
    # A killed worker's engine may log what happened; the front end logs no error.
    assert "Traceback" not in server.log_tail(n_lines=10_000), server.log_tail()

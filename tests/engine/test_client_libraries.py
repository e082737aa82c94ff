"""
Other projects' clients on one real server whose requests move: each answer has the text of a run that stayed.

The reference is the same request sent with plain HTTP and pinned to its instance. The programs that docs/clients.md
shows run here as they stand, apart from address, key and model. `make clients` installs the clients; without them the
tests are skipped, except in continuous integration.
"""

import asyncio
import contextlib
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from server_process import API_KEY, MODEL, QUICK_SERVER, ServerProcess

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
SHOWN = {
    title: (language, program)
    for title, language, program in re.findall(
        r"^## (.+?)\n\n```(\w+)\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE
    )
}
"""The programs of the page, by their heading."""
PACKAGES = {"litellm": "litellm", "langchain": "langchain_openai"}
"""Of the clients that vLLM does not bring."""
JAVASCRIPT = Path(sys.prefix) / "javascript" / "node_modules"
NODE = Path(sys.executable).parent / "node"
STORY: Any = [{"role": "user", "content": "Tell me a story."}]
N_TOKENS = 300
"""Far enough past the stage edge at 64 tokens that the server checks it again, even on a busy machine."""
INSTALLED = Path(sys.prefix) / ".clients-installed"
"""Made by `make clients` when it has succeeded."""
TOOL_TOKENS = 120
"""Enough for the call, byte by byte."""
WORDS = ("one", "two", "three")
SCHEMA: Any = {
    "type": "object",
    "properties": {"word": {"type": "string", "enum": ["fox", "dog"]}},
    "required": ["word"],
}
TOOL: Any = {
    "type": "function",
    "function": {"name": "look_up", "description": "Look it up.", "parameters": SCHEMA, "strict": True},
}
CHOICE: Any = {"type": "function", "function": {"name": "look_up"}}


def needs(is_installed: bool, what: str) -> None:
    """Skip the test unless a client is installed, or fail it if `make clients` says that it has installed them all."""
    if not is_installed:
        (pytest.fail if INSTALLED.exists() else pytest.skip)(f"{what} is not installed: make clients")


def client_of(title: str) -> Any:
    """The client's module."""
    name = PACKAGES[title]
    needs(importlib.util.find_spec(name) is not None, name)
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The server, ready."""
    log = tmp_path_factory.mktemp("clients") / "log"
    with ServerProcess(tiny_model, log, "--placement-headers", program=QUICK_SERVER) as server:
        server.wait_until_ready()
        yield server


@pytest.fixture(autouse=True)
def keeps_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """No client asks a server but ours, nor takes a key from the environment."""
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)


class Expected:
    """Texts of requests that stayed where they were."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server

    def text(self, path: str, body: dict[str, Any]) -> Any:
        """The first choice of a whole answer; pinned, because no runner moves prompt log-probabilities."""
        pinned = {"model": MODEL, "max_tokens": N_TOKENS, "temperature": 0, "prompt_logprobs": 0, **body}
        reason = {"reason": "prompt_logprobs"}
        before = self._server.metric("cascadeinfer_pinned_requests_total", **reason)
        moved = moves(self._server)
        answer = self._server.post(path, pinned)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == N_TOKENS
        assert self._server.metric("cascadeinfer_pinned_requests_total", **reason) == before + 1
        assert moves(self._server) == moved
        return answer.json()["choices"][0]

    def chat(self, *messages: Any) -> str:
        """Of a chat."""
        return str(self.text("/v1/chat/completions", {"messages": messages})["message"]["content"])

    def completion(self, prompt: str) -> str:
        """Of a completion."""
        return str(self.text("/v1/completions", {"prompt": prompt})["text"])


def moves(server: ServerProcess) -> float:
    """How many moves have succeeded because requests outgrew their stage."""
    return server.metric("cascadeinfer_migrations_total", outcome="moved", reason="outgrew_stage")


@contextlib.contextmanager
def moving(server: ServerProcess, n_requests: int) -> Iterator[None]:
    """Each of this many requests moves at least once, and nothing is left of them."""
    before = moves(server)
    yield
    assert moves(server) >= before + n_requests
    server.poll(server.idle, "idle")


@pytest.fixture(scope="module")
def expected(server: ServerProcess) -> Expected:
    """Texts of requests that stayed."""
    return Expected(server)


@pytest.fixture(scope="module")
def story(expected: Expected) -> str:
    """What the shown programs must print."""
    return expected.chat(*STORY)


@pytest.fixture(scope="module")
def continuations(expected: Expected) -> list[str]:
    """What several completions at once must give."""
    return [expected.completion(f"{word} brown fox") for word in WORDS]


def pointed_at(server: ServerProcess, program: str) -> str:
    """A shown program with this server's address, key and model."""
    for shown, here in (("http://127.0.0.1:8000", server.url), ("none", API_KEY), ("smollm2-135m-instruct", MODEL)):
        assert shown in program
        program = program.replace(shown, here)
    return program


def run_node(folder: Path, program: str, *arguments: str) -> str:
    """What a program in JavaScript prints."""
    needs(NODE.exists() and JAVASCRIPT.exists(), "the openai package for Node.js")
    (folder / "node_modules").symlink_to(JAVASCRIPT)
    (folder / "program.mjs").write_text(program, encoding="utf-8")
    command = [NODE, folder / "program.mjs", *arguments]
    ran = subprocess.run(command, check=False, capture_output=True, text=True, timeout=250)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_page_shows_every_client() -> None:
    """Each row of its table has its program."""
    rows = re.findall(r"^\| \[[\w-]+\]\(#([\w-]+)\)", PAGE, flags=re.MULTILINE)
    assert len(rows) == 5
    assert rows == [title.replace(" ", "-").lower() for title in SHOWN]


@pytest.mark.parametrize("title", SHOWN)
def test_shown_programs(
    title: str, server: ServerProcess, story: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each prints the text of the request that stayed, while its own moves."""
    language, program = SHOWN[title]
    if title in PACKAGES:
        client_of(title)
    with moving(server, 1):
        if language == "javascript":
            printed = run_node(tmp_path, pointed_at(server, program))
        else:
            capsys.readouterr()
            exec(compile(pointed_at(server, program), f"docs/clients.md, {title}", "exec"), {})  # noqa: S102 - our page
            printed = capsys.readouterr().out
    assert printed == story


async def test_openai_streams_at_once(server: ServerProcess, story: str, continuations: list[str]) -> None:
    """Completions and a response of the newer API, as concurrent streams."""
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=API_KEY, max_retries=0) as client:

        async def completion(word: str) -> str:
            stream = await client.completions.create(
                model=MODEL, prompt=f"{word} brown fox", max_tokens=N_TOKENS, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        async def response() -> str:
            stream = await client.responses.create(
                model=MODEL, input="Tell me a story.", max_output_tokens=N_TOKENS, temperature=0, stream=True
            )
            return "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])

        before = await asyncio.to_thread(moves, server)
        texts = await asyncio.gather(response(), *map(completion, WORDS))
        assert await asyncio.to_thread(moves, server) >= before + len(texts)
    assert texts == [story, *continuations]


def test_openai_answers_and_tools(server: ServerProcess, story: str) -> None:
    """A whole answer has the headers of its moves; a named tool is called in a stream, with arguments of its schema."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=API_KEY, max_retries=0) as client, moving(server, 1):
        raw = client.chat.completions.with_raw_response.create(
            model=MODEL, messages=STORY, max_tokens=N_TOKENS, temperature=0
        )
        assert raw.parse().choices[0].message.content == story
        assert int(raw.headers["x-cascade-moves"]) >= 1
        stream = client.chat.completions.create(
            model=MODEL,
            messages=STORY,
            max_tokens=TOOL_TOKENS,
            temperature=0,
            tools=[TOOL],
            tool_choice=CHOICE,
            stream=True,
        )
        calls = [call for chunk in stream for choice in chunk.choices for call in choice.delta.tool_calls or ()]
    assert calls[0].function.name == "look_up"
    assert json.loads("".join(call.function.arguments or "" for call in calls))["word"] in {"fox", "dog"}


def test_openai_in_javascript(server: ServerProcess, story: str, continuations: list[str], tmp_path: Path) -> None:
    """The same with the JavaScript package, and a refusal as its own error."""
    program = (ROOT / "tests/engine/javascript/openai_client.mjs").read_text(encoding="utf-8")
    with moving(server, 4):
        got = json.loads(
            run_node(tmp_path, program, f"{server.url}/v1", API_KEY, MODEL, str(N_TOKENS), json.dumps(TOOL))
        )
    assert json.loads(got.pop("arguments"))["word"] in {"fox", "dog"}
    assert got.pop("moves") >= 1
    assert got == {
        "models": [MODEL],
        "whole": story,
        "tokens": N_TOKENS,
        "together": continuations,
        "refusal": "BadRequestError 400",
    }


def test_anthropic(server: ServerProcess, expected: Expected) -> None:
    """A message with a system prompt moves; usage, stop sequences, a named tool and the count of tokens agree."""
    system = "You are a fox."
    text = expected.chat({"role": "system", "content": system}, *STORY)
    with anthropic.Anthropic(base_url=server.url, api_key=API_KEY, max_retries=0) as client:
        common: Any = {"model": MODEL, "messages": STORY, "extra_body": {"temperature": 0}}
        with moving(server, 1):
            message = client.messages.create(**common, system=system, max_tokens=N_TOKENS)
        assert message.content[0].text == text
        assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", N_TOKENS)
        counted = client.messages.count_tokens(model=MODEL, messages=STORY, system=system)
        assert counted.input_tokens == message.usage.input_tokens
        stop = text[40:50]
        stopped = client.messages.create(**common, system=system, max_tokens=N_TOKENS, stop_sequences=[stop])
        assert (stopped.content[0].text, stopped.stop_reason) == (text[: text.index(stop)], "stop_sequence")
        tool: Any = {"name": "look_up", "description": "Look it up.", "input_schema": SCHEMA, "strict": True}
        named: Any = {"type": "tool", "name": "look_up"}
        called = client.messages.create(**common, max_tokens=TOOL_TOKENS, tools=[tool], tool_choice=named)
        [use] = [part for part in called.content if part.type == "tool_use"]
        assert (use.name, use.input["word"] in {"fox", "dog"}) == ("look_up", True)


def at_once(function: Callable[[str], str], arguments: tuple[str, ...]) -> list[str]:
    """The function's values, from as many threads."""
    with ThreadPoolExecutor(len(arguments)) as threads:
        return list(threads.map(function, arguments))


def test_litellm(server: ServerProcess, story: str) -> None:
    """Three of its providers stream the same story at once, one of them with Anthropic's header; a tool is called."""
    litellm = client_of("litellm")
    common: Any = {"messages": STORY, "api_key": API_KEY, "temperature": 0, "num_retries": 0}

    def streamed(provider: str) -> str:
        base = server.url if provider == "anthropic" else f"{server.url}/v1"
        chunks = litellm.completion(f"{provider}/{MODEL}", api_base=base, max_tokens=N_TOKENS, stream=True, **common)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    providers = ("hosted_vllm", "openai", "anthropic")
    with moving(server, len(providers)):
        assert at_once(streamed, providers) == [story] * len(providers)
    here: Any = {"model": f"hosted_vllm/{MODEL}", "api_base": f"{server.url}/v1", **common}
    with moving(server, 1):
        whole = litellm.completion(max_tokens=N_TOKENS, **here)
    assert (whole.choices[0].message.content, whole.usage.completion_tokens) == (story, N_TOKENS)
    here["model"] = f"openai/{MODEL}"  # hosted_vllm leaves `strict` out
    called = litellm.completion(max_tokens=TOOL_TOKENS, tools=[TOOL], tool_choice=CHOICE, **here)
    assert json.loads(called.choices[0].message.tool_calls[0].function.arguments)["word"] in {"fox", "dog"}


def test_langchain(server: ServerProcess, story: str, expected: Expected) -> None:
    """A batch moves with its texts and usage; a bound tool is called."""
    model = client_of("langchain").ChatOpenAI(
        base_url=f"{server.url}/v1", api_key=API_KEY, model=MODEL, max_tokens=N_TOKENS, temperature=0, max_retries=0
    )
    other = "Tell me of a fox."
    texts = [story, expected.chat({"role": "user", "content": other})]
    with moving(server, 2):
        answers = model.batch(["Tell me a story.", other])
    assert [answer.content for answer in answers] == texts
    assert [answer.usage_metadata["output_tokens"] for answer in answers] == [N_TOKENS] * 2
    called = model.bind_tools([TOOL], tool_choice="look_up", strict=True).invoke(
        "Tell me a story.", max_tokens=TOOL_TOKENS
    )
    [call] = called.tool_calls
    assert (call["name"], call["args"]["word"] in {"fox", "dog"}) == ("look_up", True)

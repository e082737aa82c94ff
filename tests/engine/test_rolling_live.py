"""
The rolling update of a real server, by its command: other options, then another version of the model, while it serves.

The tests build on each other's server, in this order. Its instances start quickly, and share the machine's cores, so an
old one goes before its new one comes.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
from server_process import API_KEY, NO_TLS, QUICK_SERVER, ServerProcess
from test_standing_live import completion

from cascadeinfer.cli.admin_calls import KEY_VARIABLE
from cascadeinfer.engines.models.tiny import make_tiny_llama
from cascadeinfer.runtime.versions import SENTENCE

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

N_TOKENS = 900
N_CLIENTS = 4
ROLL_DEADLINE_S = 480.0


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Two instances in two stages."""
    log = tmp_path_factory.mktemp("rolling") / "log"
    words = ("--distributed-executor-backend", "uni", "--max-num-seqs", "16")
    with ServerProcess(tiny_model, log, *words, program=QUICK_SERVER) as server:
        server.wait_until_ready()
        yield server


@pytest.fixture(scope="module")
def next_version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with other weights."""
    return make_tiny_llama(tmp_path_factory.mktemp("next") / "tiny", seed=1)


def roll(server: ServerProcess, *words: str) -> "subprocess.Popen[str]":
    """`cascadeinfer roll`, started."""
    return subprocess.Popen(
        [str(Path(sys.executable).parent / "cascadeinfer"), "roll", "--url", server.url, *words],
        env={**os.environ, KEY_VARIABLE: API_KEY},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def told(rolling: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """Its exit code and what it has said."""
    out, err = rolling.communicate(timeout=ROLL_DEADLINE_S)
    return rolling.returncode, out, err


class Ready:
    """How few instances were ready while in this context."""

    def __init__(self, server: ServerProcess) -> None:
        """Of this server."""
        self._server = server
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.fewest = 1 << 10

    def _watch(self) -> None:
        while not self._is_over.is_set():
            up = [instance for instance in self._server.admin()["instances"] if instance["phase"] == "up"]
            self.fewest = min(self.fewest, len(up))
            self._is_over.wait(0.02)

    def __enter__(self) -> Self:
        """Begin to look."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Look no longer."""
        self._is_over.set()
        self._thread.join()


def text_of(server: ServerProcess, n_tokens: int = N_TOKENS) -> str:
    """What it answers."""
    answer = server.post("/v1/completions", completion(n_tokens), timeout_s=ROLL_DEADLINE_S)
    assert answer.status_code == HTTPStatus.OK, answer.text
    return str(answer.json()["choices"][0]["text"])


@contextlib.contextmanager
def stream(server: ServerProcess, body: dict[str, Any] | None = None) -> Iterator[Iterator[dict[str, Any]]]:
    """The events of a long answer, to this request if one is given."""
    headers = {"Authorization": f"Bearer {API_KEY}"}
    url, body = server.url + "/v1/completions", body or completion(N_TOKENS, stream=True)
    with httpx.stream("POST", url, json=body, headers=headers, timeout=ROLL_DEADLINE_S, **NO_TLS) as answer:
        lines = (line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: "))
        yield (json.loads(line) for line in lines if line != "[DONE]")


def builds(server: ServerProcess) -> list[int]:
    """The builds of all instances."""
    return [instance["build"] for instance in server.admin()["instances"]]


def answers_meanwhile(server: ServerProcess, rolling: "subprocess.Popen[str]") -> list[httpx.Response]:
    """Long answers, several at a time, from now until the command ends."""

    def asked() -> Iterator[httpx.Response]:
        while rolling.poll() is None:
            yield server.post("/v1/completions", completion(N_TOKENS), timeout_s=ROLL_DEADLINE_S)

    with ThreadPoolExecutor(N_CLIENTS) as clients:
        asking = [clients.submit(lambda: list(asked())) for _ in range(N_CLIENTS)]
        return [answer for each in asking for answer in each.result()]


def test_other_options_while_texts_go_on(server: ServerProcess) -> None:
    """All texts are the same as before, requests move live, and at least one of two instances is always ready."""
    expected = text_of(server)
    with Ready(server) as ready:
        rolling = roll(server, "--max-num-seqs", "24")
        answers = answers_meanwhile(server, rolling)
        code, out, err = told(rolling)
    assert (code, err) == (0, ""), (out, err)
    assert out.splitlines()[-1] == "from now on, start this server with: --max-num-seqs 24"
    assert {answer.status_code for answer in answers} == {HTTPStatus.OK}
    assert {answer.json()["choices"][0]["text"] for answer in answers} == {expected}
    assert ready.fewest == 1
    assert builds(server) == [1, 1]
    assert server.metric("cascadeinfer_migrations_total", outcome="moved", reason="drain") > 0
    assert server.metric("cascadeinfer_recovered_requests_total") == 0


def test_bad_options_touch_nothing(server: ServerProcess) -> None:
    """One line, exit code 2."""
    for words, line in (
        (("--max-model-len", "128"), "--max-model-len: is read by the front end"),
        (("--max-num-seqs", "few"), "argument --max-num-seqs: invalid int value: 'few'"),
        (("--max-num-seqs", "0"), "vLLM refuses the engine arguments"),
        (("--model", "/nowhere"), "/nowhere"),
        ((), "all instances have these options already"),
    ):
        code, out, err = told(roll(server, *words))
        assert (code, out) == (2, ""), (out, err)
        assert line in err
        assert len(err.splitlines()) == 1
    assert builds(server) == [1, 1]


def test_a_new_instance_that_does_not_start(server: ServerProcess, next_version: Path, tmp_path: Path) -> None:
    """The update ends with exit code 1 and says what to do; there are two instances with the old options."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in next_version.iterdir():
        content = file.read_bytes()
        (broken / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".safetensors" else content)
    code, out, _ = told(roll(server, "--model", str(broken)))
    assert code == 1, out
    assert "did not start" in out
    assert "to go on, roll again with options that work" in out
    server.poll(lambda: builds(server) == [1, 1] and server.idle(), "two with the old options")


def test_another_version_of_the_model(server: ServerProcess, next_version: Path) -> None:
    """A text that has begun is finished by the version that has begun it, also across the drain of its instance."""
    expected = text_of(server)
    with Ready(server) as ready, stream(server) as events:
        first = next(events)
        rolling = roll(server, "--model", str(next_version))
        rest = list(events)
        code, out, err = told(rolling)
    assert (code, err) == (0, ""), (out, err)
    assert "".join(event["choices"][0]["text"] for event in [first, *rest]) == expected
    assert ready.fewest == 1
    assert builds(server) == [3, 3]
    new = text_of(server)
    assert new != expected
    assert new == text_of(server), "both instances have the new one"


def test_no_text_goes_on_with_another_version(server: ServerProcess, tiny_model: Path) -> None:
    """When the time of the old instances is up, texts that have begun end with an error that says why."""
    old = text_of(server)
    rolling = roll(server, "--model", str(tiny_model), "--timeout-s", "0")
    answers = answers_meanwhile(server, rolling)
    code, out, err = told(rolling)
    assert (code, err) == (0, ""), (out, err)
    new = text_of(server)
    texts = {answer.json()["choices"][0]["text"] for answer in answers if answer.status_code == HTTPStatus.OK}
    errors = [answer for answer in answers if answer.status_code != HTTPStatus.OK]
    assert texts <= {old, new}, "a text of both"
    assert errors, "nothing was left when the time was up"
    assert {answer.status_code for answer in errors} == {HTTPStatus.INTERNAL_SERVER_ERROR}
    assert {answer.json()["error"]["message"] for answer in errors} == {SENTENCE}

"""
Chaos on a real server: clients of all kinds while instances are killed, drained and added.

The right answer to each request is learned first, one request at a time, each kept on a single instance
(`prompt_logprobs` pins it and does not change its text). Then `n_clients` clients send requests at random: short and
long, streamed and not, read slowly, abandoned midway, with stop strings, grammars, penalties or seeds. Meanwhile
instances are killed (SIGKILL), drained and added at random. The seed decides what is done; the machine decides when it
takes effect.

Some clients are hostile (`hostile.py`): they forge tickets, send bombs, and flood the server with requests that they
abandon or that cannot be served. They must get their refusals, and no other client may notice.

Every request that its client has not abandoned must end once, with the learned answer. A request pinned by its sampling
state may continue with other tokens after its instance has died, as documented; for those only the length is checked.
"""

import asyncio
import contextlib
import json
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from hostile import Hostile
from server_process import MODEL, ServerProcess

from cascadeinfer.cluster.local import LOOPBACK
from cascadeinfer.core.quarantine import DEATHS

N_CLIENTS = 6
N_HOSTILE = 2
HOSTILE_PAUSE_S = 0.5
"""Mean time between two acts of a hostile client."""
POISON = "poison_request"
"""Prefix of the error that ends a request because instances died under it; instances are killed here, so it occurs."""
LEAVE_SHARE = 0.15
SLOW_SHARE = 0.15
SLOW_S = 0.03
ALL_DOWN_SHARE = 0.2
"""Probability that the last instance that is up is killed too when its turn comes."""
MIN_INSTANCES, MAX_INSTANCES = 2, 4
DRAIN_TIMEOUT_S = 20.0
ACTIONS = ("kill", "drain", "add", "kill", "drain", "add", "kill any")
PACE_S = 4.0
"""Mean time between two actions."""
TEXT = "the quick brown fox jumps over a lazy dog and then some more words of no great meaning follow "


@dataclass(frozen=True)
class Kind:
    """
    A kind of request.

    Attributes:
        options: Beyond prompt and length.
        movable: Whether it may move, so that its answer is the same whatever happens.
    """

    name: str
    prompt_words: int
    n_tokens: int
    options: dict[str, Any] = field(default_factory=dict)
    movable: bool = True

    def body(self, *, stream: bool) -> dict[str, Any]:
        """What is sent."""
        body = {
            "model": MODEL,
            "prompt": " ".join((TEXT * 40).split()[len(self.name) % 7 :][: self.prompt_words]),
            "max_tokens": self.n_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": stream,
            **self.options,
        }
        return body | {"stream_options": {"include_usage": True}} if stream else body


KINDS = (
    Kind("short", 4, 30),
    Kind("chat", 12, 150),
    Kind("story", 20, 600),
    Kind("document", 180, 60),
    Kind("long document", 220, 400),
    Kind("logprobs", 8, 120, {"logprobs": 2}),
    Kind("repetition penalty", 10, 160, {"repetition_penalty": 1.2}),
    Kind("regex", 6, 120, {"structured_outputs": {"regex": "[a-d ]{200,220}"}}),
    Kind("minimum", 16, 200, {"min_tokens": 180}),
    Kind("two answers", 10, 90, {"n": 2, "temperature": 0.8, "seed": 3}, movable=False),
    Kind("seed", 8, 120, {"temperature": 0.9, "seed": 7}, movable=False),
    Kind("presence penalty", 14, 140, {"presence_penalty": 0.5}, movable=False),
)


@dataclass
class Answer:
    """What came back: the text and finish reason of each choice, and the number of tokens."""

    texts: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    n_tokens: int = 0

    def take(self, part: dict[str, Any]) -> None:
        """Add a chunk of a stream, or the whole answer."""
        for choice in part["choices"]:
            index = choice["index"]
            assert index not in self.reasons, f"words after the last word of choice {index}"
            self.texts[index] = self.texts.get(index, "") + choice["text"]
            if choice["finish_reason"] is not None:
                self.reasons[index] = choice["finish_reason"]
        if part.get("usage"):
            self.n_tokens = part["usage"]["completion_tokens"]


@dataclass
class Report:
    """The figures of a run."""

    seconds: float
    seed: int
    requests: Counter[str] = field(default_factory=Counter)
    actions: Counter[str] = field(default_factory=Counter)
    hostile: Counter[str] = field(default_factory=Counter)
    gaps_s: list[float] = field(default_factory=list)
    moves: dict[str, int] = field(default_factory=dict)
    recovered: dict[str, int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """As JSON."""
        gaps = sorted(self.gaps_s) or [0.0]
        return {
            "seconds": self.seconds,
            "seed": self.seed,
            "requests": dict(sorted(self.requests.items())),
            "actions": dict(sorted(self.actions.items())),
            "hostile": dict(sorted(self.hostile.items())),
            "moves": self.moves,
            "recovered": self.recovered,
            "longest_gap_of_a_stream_s": {
                "p50": round(gaps[len(gaps) // 2], 3),
                "p99": round(gaps[int(len(gaps) * 0.99)], 3),
                "max": round(gaps[-1], 3),
            },
            "errors": self.errors,
        }


class Chaos:
    """
    See the module header.

    Attributes:
        actions: What is done to instances.
        n_hostile: How many clients are hostile.
    """

    actions: tuple[str, ...] = ACTIONS
    n_hostile = N_HOSTILE

    def __init__(self, server: ServerProcess, seconds: float, seed: int) -> None:
        """
        Args:
            server: A ready, idle server.
            seconds: How long to go on; then everything may end and settle.
            seed: Of all choices.
        """
        self.server = server
        self.report = Report(seconds, seed)
        self._rng = random.Random(seed)
        self._kinds: dict[str, Kind] = {}
        self._expected: dict[str, Answer] = {}
        self._end_s = 0.0
        self._killed_s: list[float] = []

    async def run(self) -> Report:
        """Learn the answers, run the chaos, and wait for the last request."""
        before = self._counted()
        async with self.server.client(timeout_s=300.0) as http:
            await self._learn(http)
            self._end_s = time.monotonic() + self.report.seconds
            async with asyncio.TaskGroup() as group:
                for number in range(N_CLIENTS):
                    group.create_task(self._client(http, random.Random(self._rng.random() + number)))
                for number in range(self.n_hostile):
                    group.create_task(self._hostile(http, random.Random(self._rng.random() - number)))
                group.create_task(self._torment(http))
        after = self._counted()
        for name, count in (after - before).items():
            metric, _, label = name.partition(" ")
            (self.report.moves if metric == "moves" else self.report.recovered)[label] = count
        return self.report

    def _counted(self) -> Counter[str]:
        shown = Counter[str]()
        for outcome in ("moved", "recomputed", "stayed", "ended", "lost"):
            shown[f"moves {outcome}"] = int(self.server.metric("cascadeinfer_migrations_total", outcome=outcome))
        for exact in ("yes", "no"):
            shown[f"recovered {exact}"] = int(self.server.metric("cascadeinfer_recovered_requests_total", exact=exact))
        return shown

    # --- requests ----------------------------------------------------------------------------------------------------

    async def _learn(self, http: httpx.AsyncClient) -> None:
        for kind in KINDS:
            body = kind.body(stream=False)
            if kind.movable:
                body["prompt_logprobs"] = 0
            self._keep(kind, await self._whole(http, body))
        story = next(kind for kind in KINDS if kind.name == "story")
        text = self._expected["story"].texts[0]
        stop = text[len(text) // 2 :][:8]
        stopped = Kind("stop string", story.prompt_words, story.n_tokens, {"stop": [stop]})
        body = stopped.body(stream=False) | {"prompt": story.body(stream=False)["prompt"]}
        self._keep(
            Kind(stopped.name, story.prompt_words, story.n_tokens, {"stop": [stop], "prompt": body["prompt"]}),
            await self._whole(http, body | {"prompt_logprobs": 0}),
        )
        assert self._expected["stop string"].texts[0] == text[: text.index(stop)]

    def _keep(self, kind: Kind, answer: Answer) -> None:
        self._kinds[kind.name] = kind
        self._expected[kind.name] = answer

    async def _client(self, http: httpx.AsyncClient, rng: random.Random) -> None:
        while time.monotonic() < self._end_s:
            kind = self._kinds[rng.choice(list(self._kinds))]
            leaves_after = rng.randrange(1, kind.n_tokens) if rng.random() < LEAVE_SHARE else None
            slow_s = SLOW_S if rng.random() < SLOW_SHARE else 0.0
            started_s = time.monotonic()
            try:
                if leaves_after is not None or rng.random() < 0.7:
                    answer = await self._streamed(http, kind.body(stream=True), leaves_after, slow_s)
                else:
                    answer = await self._whole(http, kind.body(stream=False))
            except (httpx.HTTPError, AssertionError, json.JSONDecodeError) as error:
                if POISON in repr(error) and self._n_ended_since(started_s) >= DEATHS:
                    self.report.requests["ended after two deaths"] += 1
                else:
                    self._failed(kind, repr(error))
                continue
            if answer is None:
                self.report.requests["left by their client"] += 1
            else:
                self._check(kind, answer)

    async def _hostile(self, http: httpx.AsyncClient, rng: random.Random) -> None:
        """Perform one act after another; each comes up once before any repeats."""
        client = Hostile(http, LOOPBACK, self.server.port, rng)
        while True:
            for name in rng.sample(sorted(client.acts), len(client.acts)):
                await asyncio.sleep(rng.uniform(0.5, 1.5) * HOSTILE_PAUSE_S)
                if time.monotonic() >= self._end_s:
                    return
                try:
                    wrong = await client.acts[name]()
                except* (httpx.HTTPError, OSError) as errors:
                    wrong = repr(errors.exceptions)
                self.report.hostile[name] += 1
                if wrong is not None:
                    self.report.errors.append(f"hostile, {name}: {wrong[:500]}")

    async def _whole(self, http: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
        response = await http.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        answer = Answer()
        answer.take(response.json())
        return answer

    async def _streamed(
        self, http: httpx.AsyncClient, body: dict[str, Any], leaves_after: int | None, slow_s: float
    ) -> Answer | None:
        answer = Answer()
        n_chunks = 0
        last_s, longest_s = None, 0.0
        async with http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise AssertionError((await response.aread()).decode())
            async for part in _events(response):
                now_s = time.monotonic()
                longest_s = longest_s if last_s is None else max(longest_s, now_s - last_s - slow_s)
                last_s = now_s
                answer.take(part)
                n_chunks += 1
                if leaves_after is not None and n_chunks >= leaves_after:
                    return None
                if slow_s:
                    await asyncio.sleep(slow_s)
        self.report.gaps_s.append(longest_s)
        return answer

    def _n_ended_since(self, since_s: float) -> int:
        """The number of times any instance has been killed since this point."""
        return sum(killed_s >= since_s for killed_s in self._killed_s)

    def _check(self, kind: Kind, answer: Answer) -> None:
        expected = self._expected[kind.name]
        if (answer.reasons, answer.n_tokens) != (expected.reasons, expected.n_tokens):
            self._failed(kind, f"{answer.n_tokens} tokens, {answer.reasons}; not {expected}")
        elif answer.texts == expected.texts:
            self.report.requests["right"] += 1
        elif kind.movable:
            self._failed(kind, f"other text: {answer.texts}, not {expected.texts}")
        else:
            self.report.requests["right length, sampling state lost"] += 1

    def _failed(self, kind: Kind, why: str) -> None:
        self.report.requests["failed"] += 1
        self.report.errors.append(f"{kind.name}: {why[:500]}")

    # --- instances ---------------------------------------------------------------------------------------------------

    async def _torment(self, http: httpx.AsyncClient) -> None:
        """One action after another; each kind comes up once before any repeats."""
        while True:
            for action in self._rng.sample(self.actions, len(self.actions)):
                await asyncio.sleep(self._rng.uniform(0.5, 1.5) * PACE_S)
                if time.monotonic() >= self._end_s:
                    return
                await self._do(http, action)

    async def _do(self, http: httpx.AsyncClient, action: str) -> None:
        seen = (await http.get("/admin/instances")).json()["instances"]
        staying = [instance for instance in seen if instance["phase"] != "draining"]
        n_up = sum(instance["phase"] == "up" for instance in seen)
        if action == "drain" and len(staying) <= MIN_INSTANCES:
            action = "add"
        elif action == "add" and len(seen) >= MAX_INSTANCES:
            action = "drain" if len(staying) > MIN_INSTANCES else "kill"
        if action == "add":
            answer = await http.post("/admin/instances")
        elif action == "drain":
            victim = self._rng.choice(staying)
            path = f"/admin/instances/{victim['id']}"
            answer = await http.delete(path, params={"timeout_s": DRAIN_TIMEOUT_S})
            action = f"drain, {victim['phase']}"
        else:
            if n_up > 1 or self._rng.random() < ALL_DOWN_SHARE:
                self._kill(seen, whoever=action == "kill any")
            return
        if answer.status_code == 202:
            self.report.actions[action] += 1
        elif answer.status_code == 409:
            self.report.actions[f"{action}: refused"] += 1
        else:
            self.report.errors.append(f"{action}: {answer.status_code} {answer.text}")

    def _kill(self, seen: list[dict[str, Any]], *, whoever: bool) -> None:
        """Send SIGKILL to an instance in service, or to any process of any instance, even one that is starting."""
        cores = [(i["pid"], f"kill, {i['phase']}") for i in seen if i["pid"] is not None]
        others = [
            (process.pid, "kill, any process")
            for process in self.server.family()[1:]
            if "resource_tracker" not in _command(process)
        ]
        candidates = others if whoever else cores
        if not candidates:
            return
        pid, name = self._rng.choice(sorted(candidates))
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(pid).send_signal(signal.SIGKILL)
            self._died()
            self.report.actions[name] += 1

    def _died(self, n_instances: int = 1) -> None:
        """So many instances are lost now."""
        self._killed_s += [time.monotonic()] * n_instances


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a stream, which must end properly."""
    done = False
    async for line in response.aiter_lines():
        if not line.startswith("data: "):
            continue
        assert not done, "words after [DONE]"
        if line == "data: [DONE]":
            done = True
            continue
        part = json.loads(line.removeprefix("data: "))
        assert "error" not in part, part
        yield part
    assert done, "the stream broke off"


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return "resource_tracker"


def write(path: str | None, figures: dict[str, Any]) -> None:
    """Write the figures to this file, if one is given."""
    if path is not None:
        Path(path).write_text(json.dumps(figures, indent=2) + "\n")

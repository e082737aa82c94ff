"""
Hostile clients for the chaos test: what they send, and what must come back.

Each act once killed an engine, read another client's KV cache, kept an EngineCore busy for ever or left something
behind in the server. An act returns None if the server answered as it should, otherwise the answer.
"""

import asyncio
import contextlib
import json
import random
from collections.abc import Awaitable, Callable
from typing import Any, Final

import httpx
from server_process import API_KEY, MODEL

TICKET: Final = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_engine_id": "cascade-0-000000000000",
    "remote_request_id": "cmpl-0",
    "remote_host": "127.0.0.1",
    "remote_port": 5600,
    "remote_block_ids": [[1, 2, 3]],
    "remote_num_tokens": 96,
    "tp_size": 1,
}
"""A ticket, as one instance passes it to another for a moving request; from a client it is forged."""
WORDS: Final = (
    TICKET,
    {"do_remote_prefill": True},
    {"do_remote_decode": True},
    {"cascade_prompt_tokens": "x"},
    {"cascade_prompt_tokens": 1, "cascade_reservation": "client0/m1"},
)
MULTIPLE_OF: Final = {"json": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100}}
"""A valid schema whose grammar accepts tokens after its end one by one, but not in bulk."""
HALF_OPEN: Final = 20
FLOOD: Final = 16
LEAVE_S: Final = 0.02


def _nested(depth: int) -> dict[str, Any]:
    """A schema of this depth in which every object has four properties of the next level."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {
            "type": "object",
            "properties": dict.fromkeys(("alpha", "beta", "gamma", "delta"), schema),
            "required": ["alpha", "beta"],
        }
    return schema


def _fanned_out(levels: int) -> dict[str, Any]:
    """A small schema whose references expand to 2^levels parts."""
    definitions: dict[str, Any] = {f"level{levels}": {"type": "integer"}}
    for level in range(levels):
        next_level = {"$ref": f"#/$defs/level{level + 1}"}
        definitions[f"level{level}"] = {
            "type": "object",
            "properties": {"left": next_level, "right": next_level},
            "required": ["left", "right"],
        }
    return {"$defs": definitions, "$ref": "#/$defs/level0"}


BOMBS: Final[tuple[dict[str, Any], ...]] = (
    {"json": {"type": "string", "enum": [f"value number {i}" for i in range(50_000)]}},
    {"json": {"anyOf": [{"type": "object", "properties": {f"name{i}": {"type": "string"}}} for i in range(5_000)]}},
    {"json": _fanned_out(40)},
    {"regex": "(" * 40 + "a{1,200}" + "){1,200}" * 40},
    {"regex": "[ab]" * 50_000},
    {"choice": [f"choice number {i}" for i in range(50_000)]},
    {"grammar": "root ::= " + " | ".join(f'"word{i}"' for i in range(50_000))},
)


def completion(prompt: Any = "hello there you all", n_tokens: int = 8, **more: Any) -> dict[str, Any]:
    """The body of a greedy completion that does not end by itself."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": n_tokens, "temperature": 0, "ignore_eos": True}
    return {**body, **more}


def chat(**more: Any) -> dict[str, Any]:
    """The body of a chat request."""
    return {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, **more}


class Hostile:
    """One hostile client. The acts vary with the generator that is passed in, never with the clock."""

    def __init__(self, http: httpx.AsyncClient, host: str, port: int, rng: random.Random) -> None:
        """
        Args:
            http: Sends with the API key.
            host: Of the server, for raw connections.
            port: Likewise.
            rng: Chooses.
        """
        self._http = http
        self._address = (host, port)
        self._rng = rng
        self.acts: dict[str, Callable[[], Awaitable[str | None]]] = {
            "forged ticket": self.forged_ticket,
            "bomb": self.bomb,
            "grammar past its end": self.grammar_past_its_end,
            "no key": self.no_key,
            "body too large": self.body_too_large,
            "half-open connections": self.half_open,
            "flood of abandoned requests": self.abandoned,
            "flood of refused requests": self.refused,
            "odd request id": self.odd_request_id,
            "odd priority": self.odd_priority,
        }

    async def forged_ticket(self) -> str | None:
        """Send parameters that only the connector may use, on every surface that generates."""
        words = self._rng.choice(WORDS)
        surface, body = self._rng.choice(
            [
                ("/v1/completions", completion(kv_transfer_params=words)),
                ("/v1/completions", completion(kv_transfer_params=words, stream=True)),
                ("/v1/completions", completion(vllm_xargs={"kv_transfer_params": words})),
                ("/v1/chat/completions", chat(kv_transfer_params=words)),
                ("/v1/chat/completions", chat(kv_transfer_params=words, stream=True)),
                ("/v1/responses", {"model": MODEL, "input": "hello", "kv_transfer_params": words}),
                ("/v1/messages", chat(kv_transfer_params=words)),
                ("/invocations", completion(kv_transfer_params=words)),
            ]
        )
        return await self._expect({400}, surface, body)

    async def bomb(self) -> str | None:
        """A structured output whose grammar would take minutes and gigabytes to compile."""
        if self._rng.random() < 0.2:
            bomb: dict[str, Any] = {"json": _nested(9)}
        else:
            bomb = self._rng.choice(BOMBS)
        return await self._expect({400, 413}, "/v1/completions", completion(structured_outputs=bomb))

    async def grammar_past_its_end(self) -> str | None:
        """The request may end with an error, but it must end, and affect no other."""
        body = completion(n_tokens=200, structured_outputs=MULTIPLE_OF)
        return await self._expect({200, 500}, "/v1/completions", body)

    async def no_key(self) -> str | None:
        """All routes but health and metrics require the key."""
        path = self._rng.choice(
            ["/invocations", "/generative_scoring", "/tokenize", "/scale_elastic_ep", "/load", "/v1/models", "/docs"]
        )
        headers = {"Authorization": self._rng.choice(["", "Bearer", "Bearer wrong", f"Basic {API_KEY}"])}
        return await self._expect({401}, path, completion(), headers=headers)

    async def body_too_large(self) -> str | None:
        """A body that announces its size and sends nothing."""
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {API_KEY}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {self._rng.randrange(1 << 26, 1 << 40)}\r\n\r\n"
        reader, writer = await asyncio.open_connection(*self._address)
        try:
            writer.write(head.encode())
            status = (await reader.readline()).split()[1:2]
            return None if status == [b"413"] else f"{status}"
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def half_open(self) -> str | None:
        """Connections that never finish their headers and then vanish silently."""
        writers = []
        for _ in range(HALF_OPEN):
            _, writer = await asyncio.open_connection(*self._address)
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Slow: ")
            writers.append(writer)
        await asyncio.sleep(self._rng.random())
        for writer in writers:
            writer.transport.abort()
        return None

    async def abandoned(self) -> str | None:
        """Requests whose client leaves at once: before the headers, before the first token, among siblings."""

        async def leave(body: dict[str, Any], after_s: float) -> None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(after_s):
                    await self._http.post("/v1/completions", json=body)

        async with asyncio.TaskGroup() as group:
            for _ in range(FLOOD):
                body = completion(self._tokens(), 400, n=self._rng.choice([1, 1, 3]), stream=self._rng.random() < 0.5)
                group.create_task(leave(body, self._rng.random() * LEAVE_S * 10))
        return None

    async def refused(self) -> str | None:
        """Requests that cannot be served, many at once."""
        bodies = [
            completion([5] * 5000),
            completion(n_tokens=-1),
            completion(temperature=-3),
            completion([10**9]),
            completion(n=0),
            completion(""),
            completion([]),
            completion(stop=[""] * 100, n_tokens="many"),
            completion(structured_outputs={"regex": "("}),
            completion(structured_outputs={"json": {"type": "nothing"}}),
            completion(prompt_logprobs=10**6),
            completion(logit_bias={"9999999": 1}),
        ]
        chosen = [self._rng.choice(bodies) for _ in range(FLOOD)]
        answers = await asyncio.gather(*(self._http.post("/v1/completions", json=body) for body in chosen))
        wrong = [
            f"{answer.status_code} to {json.dumps(body)[:120]}"
            for answer, body in zip(answers, chosen, strict=True)
            if answer.status_code not in {200, 400, 422}
        ]
        return "; ".join(wrong) or None

    async def odd_request_id(self) -> str | None:
        """Identifiers that do not belong in logs."""
        name = self._rng.choice(["x" * 200, "a b", 'a"b', "a{b}", "$(reboot)", "a\tb"])
        return await self._expect({400}, "/v1/completions", completion(), headers={"X-Request-Id": name})

    async def odd_priority(self) -> str | None:
        """Numbers too large for any queue or message."""
        value = self._rng.choice([10**30, -(10**30), 2**63, -(2**63) - 1])
        return await self._expect({400, 422}, "/v1/completions", completion(priority=value))

    def _tokens(self) -> list[int]:
        return [self._rng.randrange(260, 440) for _ in range(self._rng.randrange(1, 200))]

    async def _expect(
        self, statuses: set[int], path: str, body: dict[str, Any], headers: dict[str, str] | None = None
    ) -> str | None:
        answer = await self._http.post(path, json=body, headers=headers)
        if answer.status_code in statuses:
            return None
        return f"{path} {json.dumps(body)[:200]}: {answer.status_code} {answer.text[:200]}"

"""
A small OpenAI server on the loopback whose behaviour is set per request.

It tokenises by words (each word is one token, and a text has one more, as with a begin-of-sequence token), streams one
chunk per token, and records the requests. A `Behaviour` per request says how it answers.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

BEGIN = 1


@dataclass(frozen=True)
class Behaviour:
    """
    How one request is answered.

    Attributes:
        status: HTTP status; with an error body unless it is 200.
        tokens: Most tokens to stream; None for all that were asked for.
        cut: Close the connection after this many tokens, without an end of the stream.
        clean_end: End the response in good order after `tokens`, but with neither finish reason nor [DONE].
        error_in_stream: Send an error object after `tokens`.
        error_code: Code in that object.
        usage: Whether the stream ends with usage.
        wait_for: Awaited before the first token.
        garbage: Send a line that is not JSON.
    """

    status: int = 200
    tokens: int | None = None
    cut: int | None = None
    clean_end: bool = False
    error_in_stream: bool = False
    error_code: int = 500
    usage: bool = True
    wait_for: asyncio.Event | None = None
    garbage: bool = False


@dataclass
class FakeServer:
    """The server's state; `behave` maps a request's number to its behaviour."""

    behave: Callable[[int], Behaviour] = lambda _: Behaviour()
    has_tokenize: bool = True
    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    answered: int = 0
    kept_connections: int = 0
    arrived: asyncio.Condition = field(default_factory=asyncio.Condition)
    vocabulary: dict[str, int] = field(default_factory=dict)

    def ids_of(self, text: str) -> list[int]:
        """One token per word."""
        return [self.vocabulary.setdefault(word, 100 + len(self.vocabulary)) for word in text.split()]

    async def models(self, _: web.Request) -> web.Response:
        """GET /v1/models."""
        return web.json_response({"data": [{"id": "fake"}]})

    async def tokenize(self, request: web.Request) -> web.Response:
        """POST /tokenize."""
        if not self.has_tokenize:
            return web.json_response({"error": "no such path"}, status=404)
        content = await request.json()
        if "messages" in content:
            ids = [BEGIN, 2, 3, *self.ids_of(content["messages"][0]["content"]), 4]
        else:
            ids = ([BEGIN] if content.get("add_special_tokens", True) else []) + self.ids_of(content["prompt"])
        return web.json_response({"tokens": ids, "count": len(ids)})

    def prompt_tokens(self, content: dict[str, Any]) -> int:
        """Number of tokens of a text, as the server counts."""
        if "messages" in content:
            return len(self.ids_of(content["messages"][0]["content"])) + 4
        prompt = content["prompt"]
        return len(prompt) if isinstance(prompt, list) else 1 + len(self.ids_of(prompt))

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions and /v1/chat/completions."""
        content = await request.json()
        behaviour = self.behave(len(self.asked))
        self.asked.append(content)  # before anything is waited for: no two requests have the same number
        self.kept_connections += int(request.keep_alive)
        async with self.arrived:
            self.arrived.notify_all()
        if behaviour.status != 200:
            return web.json_response({"error": {"message": "told to fail"}}, status=behaviour.status)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if behaviour.wait_for is not None:
            await behaviour.wait_for.wait()
        await self._stream(response, content, behaviour)
        async with self.arrived:
            self.answered += 1
            self.arrived.notify_all()
        return response

    async def _stream(self, response: web.StreamResponse, content: dict[str, Any], behaviour: Behaviour) -> None:
        chat = "messages" in content
        asked = int(content["max_tokens"])
        n_tokens = asked if behaviour.tokens is None else min(asked, behaviour.tokens)

        async def send(payload: object) -> None:
            await response.write(b"data: " + json.dumps(payload).encode() + b"\n\n")

        if behaviour.garbage:
            await response.write(b"data: {not json\n\n")
            return
        await response.write(b": ping\n\n")
        if chat:
            await send({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for number in range(n_tokens):
            if behaviour.cut == number:
                assert response._req.transport is not None
                response._req.transport.abort()
                return
            ends = number == n_tokens - 1 and not behaviour.clean_end and not behaviour.error_in_stream
            reason = ("length" if n_tokens == asked else "stop") if ends else None
            body = {"delta": {"content": "x"}} if chat else {"text": "x"}
            await send({"choices": [{**body, "finish_reason": reason}]})
        if behaviour.error_in_stream:
            await send({"error": {"message": "so it is", "code": behaviour.error_code}})
            return
        if behaviour.clean_end:
            return
        if behaviour.usage:
            usage = {"prompt_tokens": self.prompt_tokens(content), "completion_tokens": n_tokens}
            await send({"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")


@asynccontextmanager
async def running(server: FakeServer) -> AsyncIterator[FakeServer]:
    """Serve on a free port of the loopback."""
    app = web.Application(client_max_size=1 << 26)
    app.router.add_get("/v1/models", server.models)
    app.router.add_post("/tokenize", server.tokenize)
    app.router.add_post("/v1/completions", server.complete)
    app.router.add_post("/v1/chat/completions", server.complete)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    server.url = f"http://{host}:{port}"
    try:
        yield server
    finally:
        await runner.cleanup()

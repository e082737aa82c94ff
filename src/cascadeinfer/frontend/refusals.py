"""
A request that is refused gets its status, a stream too if it has not begun: HTTP 429 with `Retry-After`, 400 for what cannot be served, 500
for a request that ends the instances which run it.

vLLM sends status 200 and the headers of a stream before it hands the request over, and a refusal then as the stream's first event; clients
that wait and try again by themselves at a 429 (OpenAI's among them) take that for an answer that broke. So the head of a stream is held back until
its first event is there, which loses nothing: no byte of the answer exists before. Later events are not looked at. Whole answers have their
status already; what vLLM leaves out of them is when to come again.

This is around the whole app and reads what it sends, since vLLM answers exceptions itself and has built its app before we get it.
"""

import json
import re
from collections.abc import Awaitable, Sequence
from http import HTTPStatus
from math import ceil
from typing import Any, Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cascadeinfer.runtime.isolation import POISON_SENTENCE

EVENT_STREAM: Final = b"text/event-stream"
ERROR_EVENT: Final = b'data: {"error"'
REFUSALS: Final = frozenset({HTTPStatus.BAD_REQUEST, HTTPStatus.TOO_MANY_REQUESTS})
"""What a request is refused with before it begins; other errors may come of a stream that had begun elsewhere."""
TRY_AGAIN: Final = re.compile(r"try again in ([0-9.]+) s")
"""In the words of a RequestRejectedError, which is all of it that vLLM puts into an answer."""

Headers = Sequence[tuple[bytes, bytes]]


class Refusals:
    """An ASGI app around another. See the module header."""

    def __init__(self, app: ASGIApp) -> None:
        """
        Args:
            app: The server.
        """
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        await self._app(scope, receive, send if scope["type"] != "http" else _Head(send).send)


class _Head:
    """Holds back the head of one response, if what comes after it may change it."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._held: Message | None = None
        self._is_decided = False

    def send(self, message: Message) -> Awaitable[None]:
        """Not a coroutine of its own: every token of every stream passes here."""
        return self._send(message) if self._is_decided else self._decide(message)

    async def _decide(self, message: Message) -> None:
        if message["type"] == "http.response.start" and _may_be_refusal(message):
            self._held = message
            return
        self._is_decided = True
        if self._held is not None:
            held, self._held = self._held, None
            body = message.get("body", b"")
            if held["status"] == HTTPStatus.TOO_MANY_REQUESTS:
                held["headers"] = [*held["headers"], *_retry_after(body)]
            elif (refusal := _refusal_in(body)) is not None:
                await self._refuse(held["headers"], refusal)
                self._send = _dropped
                return
            await self._send(held)
        await self._send(message)

    async def _refuse(self, headers: Headers, refusal: dict[str, Any]) -> None:
        """Instead of a stream."""
        body = json.dumps(refusal).encode()
        told = [header for header in headers if header[0].lower() != b"content-type"]
        told += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        status = int(refusal["error"]["code"])
        await self._send({"type": "http.response.start", "status": status, "headers": [*told, *_retry_after(body)]})
        await self._send({"type": "http.response.body", "body": body})


async def _dropped(_: Message) -> None:
    """What vLLM still says after a refusal: the end of the stream."""


def _may_be_refusal(head: Message) -> bool:
    """Whether it is that of a 429 that does not say when to come again, or of a stream."""
    named = {name.lower(): value for name, value in head["headers"]}
    if head["status"] == HTTPStatus.TOO_MANY_REQUESTS:
        return b"retry-after" not in named
    return head["status"] == HTTPStatus.OK and named.get(b"content-type", b"").startswith(EVENT_STREAM)


def _refusal_in(body: bytes) -> dict[str, Any] | None:
    """What a stream's first event says, if it is that the request is refused."""
    if not body.startswith(ERROR_EVENT):
        return None
    event: dict[str, Any] = json.loads(body.partition(b"\n")[0].removeprefix(b"data: "))
    error = event["error"]
    return event if error.get("code") in REFUSALS or error.get("message") == POISON_SENTENCE else None


def _retry_after(body: bytes) -> Headers:
    """The header, in whole seconds, at least one; none when the body is not in our words (the operator's middleware may limit rates)."""
    told = TRY_AGAIN.search(body.decode(errors="replace"))
    return [] if told is None else [(b"retry-after", str(max(1, ceil(float(told[1])))).encode())]

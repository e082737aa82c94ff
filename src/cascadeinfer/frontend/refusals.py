"""
Refused requests get their HTTP status, even streams that have not begun: 429 with `Retry-After`, 400 for what cannot be
served, 500 for a request that kills the instances that run it.

vLLM sends status 200 and the headers of a stream before it hands the request over, and then a refusal as the stream's
first event. Clients that wait and retry at a 429 (OpenAI's among them) take that for an answer that broke. So the head
of a stream is held back until its first event is there, which loses nothing: no byte of the answer exists before. Later
events are not examined. Non-streamed answers already have their status; vLLM only leaves out when to retry.

This wraps the whole app and reads what it sends, because vLLM answers exceptions itself and has built its app before we
get it.
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
"""Statuses that refuse a request before it begins; other errors may come from a stream that began elsewhere."""
TRY_AGAIN: Final = re.compile(r"try again in ([0-9.]+) s")
"""Matches the message of a RequestRejectedError, the only part of it that vLLM puts into an answer."""

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
    """Holds back the head of one response if what follows may change it."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._held: Message | None = None
        self._is_decided = False

    def send(self, message: Message) -> Awaitable[None]:
        """Forward a message. Not a coroutine: every token of every stream passes here."""
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
        """Send a refusal instead of a stream."""
        body = json.dumps(refusal).encode()
        told = [header for header in headers if header[0].lower() != b"content-type"]
        told += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        status = int(refusal["error"]["code"])
        await self._send({"type": "http.response.start", "status": status, "headers": [*told, *_retry_after(body)]})
        await self._send({"type": "http.response.body", "body": body})


async def _dropped(_: Message) -> None:
    """Discards what vLLM still sends after a refusal: the end of the stream."""


def _may_be_refusal(head: Message) -> bool:
    """Whether the head is that of a stream, or of a 429 without `Retry-After`."""
    named = {name.lower(): value for name, value in head["headers"]}
    if head["status"] == HTTPStatus.TOO_MANY_REQUESTS:
        return b"retry-after" not in named
    return head["status"] == HTTPStatus.OK and named.get(b"content-type", b"").startswith(EVENT_STREAM)


def _refusal_in(body: bytes) -> dict[str, Any] | None:
    """The refusal in a stream's first event, if it is one."""
    if not body.startswith(ERROR_EVENT):
        return None
    event: dict[str, Any] = json.loads(body.partition(b"\n")[0].removeprefix(b"data: "))
    error = event["error"]
    return event if error.get("code") in REFUSALS or error.get("message") == POISON_SENTENCE else None


def _retry_after(body: bytes) -> Headers:
    """
    The `Retry-After` header, in whole seconds, at least one; empty when the body is not ours (the operator's middleware
    may limit rates).
    """
    told = TRY_AGAIN.search(body.decode(errors="replace"))
    return [] if told is None else [(b"retry-after", str(max(1, ceil(float(told[1])))).encode())]

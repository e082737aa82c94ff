"""
Response headers that say where a request ran: `--placement-headers`.

    x-cascade-instance   the instance that has it when the head of the answer is sent: for a whole answer the last one,
                         for a stream the one that gave the first token
    x-cascade-moves      how often it went from one instance to another; only with whole answers, since a stream's
                         head leaves before its moves
    x-request-id         the client's own, or the id in `/admin/instances`, the log and `cascadeinfer replay`

A request with several parts (`n`, several prompts) names the instances of all, and the sum of their moves. The engine
client notes each part in a context variable, which the tasks of a request inherit.
"""

from collections.abc import Awaitable
from contextvars import ContextVar
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cascadeinfer.runtime.streams import Journey

EVENT_STREAM: Final = b"text/event-stream"
REQUEST_ID: Final = b"x-request-id"

_JOURNEYS: ContextVar[list[Journey] | None] = ContextVar("journeys", default=None)


def note_journey(journey: Journey) -> None:
    """A part of the HTTP request that is being handled is on its way; nothing, outside of one or without the option."""
    if (journeys := _JOURNEYS.get()) is not None:
        journeys.append(journey)


class PlacementHeaders:
    """An ASGI app around another. See the module header."""

    def __init__(self, app: ASGIApp) -> None:
        """
        Args:
            app: The server, with whatever holds back the heads of streams.
        """
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        journeys: list[Journey] = []
        asked_id = next((value for name, value in scope["headers"] if name == REQUEST_ID), None)

        def noted(message: Message) -> Awaitable[None]:  # not a coroutine: every token passes here
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *headers_of(journeys, message, asked_id)]}
            return send(message)

        token = _JOURNEYS.set(journeys)
        try:
            await self._app(scope, receive, noted)
        finally:
            _JOURNEYS.reset(token)


def headers_of(journeys: list[Journey], head: Message, asked_id: bytes | None) -> list[tuple[bytes, bytes]]:
    """
    The headers that can be told now.

    Args:
        journeys: Of the parts of the request; none for what is no inference.
        head: The head of the answer.
        asked_id: The client's `X-Request-Id`.
    """
    named = {name.lower(): value for name, value in head["headers"]}
    found: list[tuple[bytes, bytes]] = []
    if REQUEST_ID not in named and (told := asked_id or next((j.request_id.encode() for j in journeys), None)):
        found.append((REQUEST_ID, told))
    placed = [journey for journey in journeys if journey.visits]
    if placed:
        instances = dict.fromkeys(journey.visits[-1].instance_id for journey in placed)
        found.append((b"x-cascade-instance", ",".join(instances).encode()))
        if not named.get(b"content-type", b"").startswith(EVENT_STREAM):
            found.append((b"x-cascade-moves", str(sum(journey.moves for journey in placed)).encode()))
    return found

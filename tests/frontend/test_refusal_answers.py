"""Refusals as they are sent: HTTP 429 with a time to retry after, even for streams that have not begun."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from cascadeinfer.core.errors import RequestRejectedError
from cascadeinfer.frontend.refusals import Refusals
from cascadeinfer.runtime.isolation import POISON_SENTENCE

HEAD: dict[str, Any] = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-request-id", b"7")],
}


def event(content: object, *, more: bool = True) -> Message:
    """An event of a stream."""
    return {"type": "http.response.body", "body": f"data: {json.dumps(content)}\n\n".encode(), "more_body": more}


def refusal(code: int = 429) -> dict[str, Any]:
    """An error as vLLM words it."""
    return {"error": {"message": str(RequestRejectedError("queue_full", 2.2)), "type": "TooManyRequests", "code": code}}


END: Message = {"type": "http.response.body", "body": b"", "more_body": False}


async def sent(messages: Sequence[Message], scope_type: str = "http") -> list[Message]:
    """What the client receives when the server sends these messages."""
    out: list[Message] = []

    async def server(_: Scope, __: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    async def to_client(message: Message) -> None:
        out.append(message)

    async def nothing() -> Message:
        raise AssertionError("nobody reads")

    await Refusals(server)({"type": scope_type}, nothing, to_client)
    return out


async def test_a_refused_stream_is_a_429() -> None:
    """Status, whole seconds to retry after, vLLM's JSON as the body, other headers unchanged, and nothing after it."""
    head, body = await sent([HEAD, event(refusal()), event("[DONE]"), END])
    assert head["status"] == 429
    headers = dict(head["headers"])
    assert headers[b"retry-after"] == b"3"
    assert headers[b"content-type"] == b"application/json"
    assert headers[b"x-request-id"] == b"7"
    assert json.loads(body["body"]) == refusal()
    assert int(headers[b"content-length"]) == len(body["body"])
    assert not body.get("more_body", False)


async def test_poison_before_the_first_event_is_a_500() -> None:
    """A stream that ended its instances before its first event gets the status that a whole answer would get."""
    told = {"error": {"message": POISON_SENTENCE, "code": 500}}
    head, body = await sent([HEAD, event(told), event("[DONE]"), END])
    assert head["status"] == 500
    assert b"retry-after" not in dict(head["headers"])
    assert json.loads(body["body"]) == told


async def test_a_refused_answer_says_when_to_come_again() -> None:
    """A whole answer with status 429 keeps its content and gets the header."""
    head: Message = {"type": "http.response.start", "status": 429, "headers": [(b"content-length", b"9")]}
    body: Message = {"type": "http.response.body", "body": json.dumps(refusal()).encode()}
    assert await sent([dict(head), body]) == [
        {**head, "headers": [(b"content-length", b"9"), (b"retry-after", b"3")]},
        body,
    ]


@pytest.mark.parametrize(
    "messages",
    [
        [HEAD, event({"choices": []}), event(refusal()), END],
        [HEAD, event(refusal(500)), END],
        [HEAD, END],
        [{**HEAD, "headers": [(b"content-type", b"application/json")]}, event(refusal()), END],
        [{**HEAD, "status": 503}, event(refusal()), END],
        [{**HEAD, "status": 429, "headers": [(b"Retry-After", b"60")]}, event(refusal()), END],
        [{**HEAD, "status": 429}, {"type": "http.response.body", "body": b"slow down"}],
    ],
    ids=[
        "after its first event",
        "another error",
        "empty",
        "no stream",
        "an error already",
        "told already",
        "not ours",
    ],
)
async def test_everything_else_passes(messages: list[Message]) -> None:
    """What is not one of our refusals reaches the client as the server sent it."""
    assert await sent(messages) == messages


async def test_the_head_waits_for_the_first_event() -> None:
    """
    A stream whose generator fails before its first event has sent no head, so the caller can still answer with an
    error.
    """
    assert await sent([HEAD]) == []


async def test_other_protocols_pass() -> None:
    """Messages of a websocket are passed on unread."""
    assert await sent([HEAD], scope_type="websocket") == [HEAD]

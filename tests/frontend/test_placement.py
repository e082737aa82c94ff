"""Headers that say where a request ran: what is known when the head is sent, and nothing where nothing ran."""

import asyncio
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cascadeinfer.frontend.placement import PlacementHeaders, note_journey
from cascadeinfer.frontend.refusals import Refusals
from cascadeinfer.runtime.streams import Journey, Visit

JSON = (b"content-type", b"application/json")
EVENTS = (b"content-type", b"text/event-stream")


def journey(*instances: str, request_id: str = "cmpl-1-ab") -> Journey:
    """A request that has been on these instances."""
    return Journey(request_id, [Visit(instance_id, "dispatched", "", 0.0) for instance_id in instances])


def answering(content: tuple[bytes, bytes], *journeys: Journey, late: Visit | None = None) -> ASGIApp:
    """An app that hands requests over in a task of its own, as vLLM's do, then answers in two parts."""

    async def app(_: Scope, __: Receive, send: Send) -> None:
        async def work() -> None:
            for one in journeys:
                note_journey(one)

        await send({"type": "http.response.start", "status": 200, "headers": [content]})
        await asyncio.create_task(work())
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        if late is not None:
            journeys[0].visits.append(late)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return app


async def whole(_: Scope, __: Receive, send: Send) -> None:
    """An app that answers when everything is known: a request that moved twice, and one that stayed."""
    note_journey(journey("0", "1", "1", "2"))
    note_journey(journey("0", request_id="cmpl-2-cd"))
    await send({"type": "http.response.start", "status": 200, "headers": [JSON]})
    await send({"type": "http.response.body", "body": b"{}"})


async def head_of(app: ASGIApp, *headers: tuple[bytes, bytes]) -> dict[bytes, bytes]:
    """The headers of the answer to a request with these headers."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": list(headers)}
    await app(scope, receive, send)
    assert [message["type"] for message in sent][:2] == ["http.response.start", "http.response.body"]
    named: Sequence[tuple[bytes, bytes]] = sent[0]["headers"]
    assert len(dict(named)) == len(named)
    return dict(named)


async def test_a_whole_answer() -> None:
    """The last instance of each part, the moves of all, and the id in our books."""
    head = await head_of(PlacementHeaders(whole))
    assert head[b"x-cascade-instance"] == b"2,0"
    assert head[b"x-cascade-moves"] == b"2"
    assert head[b"x-request-id"] == b"cmpl-1-ab"


async def test_the_head_of_a_stream() -> None:
    """The instance of the first token, whatever comes later, and no number of moves, which is not known yet."""
    late = Visit("1", "moved", "outgrew_stage", 1.0)
    head = await head_of(PlacementHeaders(Refusals(answering(EVENTS, journey("0"), late=late))))
    assert head[b"x-cascade-instance"] == b"0"
    assert b"x-cascade-moves" not in head


async def test_the_clients_own_id_is_said_back() -> None:
    """Unless vLLM's own middleware has done so."""
    assert (await head_of(PlacementHeaders(whole), (b"x-request-id", b"mine")))[b"x-request-id"] == b"mine"

    async def vllm(scope: Scope, receive: Receive, send: Send) -> None:
        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"].append((b"X-Request-Id", b"theirs"))
            await send(message)

        await whole(scope, receive, told)

    head = await head_of(PlacementHeaders(vllm))
    assert head[b"X-Request-Id"] == b"theirs"
    assert b"x-request-id" not in head


async def test_where_nothing_ran_nothing_is_said() -> None:
    """Other routes, and requests that were refused before they had a place."""
    for app in (answering(JSON), answering(JSON, journey())):
        assert not [name for name in await head_of(PlacementHeaders(app)) if name.startswith(b"x-cascade")]


async def test_without_the_option_nothing_is_noted() -> None:
    """The engine client's note outside of such an app goes nowhere."""
    note_journey(journey("0"))
    assert await head_of(whole) == dict([JSON])


async def test_requests_at_the_same_time_do_not_mix() -> None:
    """Each answer tells of its own request."""
    apps = [PlacementHeaders(Refusals(answering(EVENTS, journey(str(i))))) for i in range(20)]
    heads = await asyncio.gather(*(head_of(app) for app in apps))
    assert [head[b"x-cascade-instance"] for head in heads] == [str(i).encode() for i in range(20)]

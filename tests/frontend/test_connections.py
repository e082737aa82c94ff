"""Limits of connections, heads and bodies, on a real uvicorn server with a small app behind the door."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("vllm")

import uvicorn

from cascadeinfer.cluster.local import LOOPBACK
from cascadeinfer.frontend.door.connections import SPARE_CONNECTIONS, ConnectionLimits, guarded
from cascadeinfer.frontend.door.door import Door
from cascadeinfer.frontend.door.keys import Keys

LIMITS = ConnectionLimits(
    max_connections=8,
    head_timeout_s=30.0,
    body_timeout_s=30.0,
    max_head_bytes=2000,
    max_headers=20,
    send_timeout_s=30.0,
)
MAX_BODY_BYTES = 1000
GET = b"GET /health HTTP/1.1\r\nHost: x\r\n"
POST_CHUNKED = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key\r\nTransfer-Encoding: chunked\r\n\r\n"


class EchoApp:
    """Answers with the body's length; records the most bytes it was given of one body, and disconnects."""

    def __init__(self) -> None:
        self.most_bytes = 0
        self.n_disconnects = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """See ASGI."""
        assert scope["type"] == "http"
        n_bytes = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.n_disconnects += 1
                return
            n_bytes += len(message["body"])
            self.most_bytes = max(self.most_bytes, n_bytes)
            if not message.get("more_body"):
                break
        body = str(n_bytes).encode()
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition that nothing announces."""
    while not condition():  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(0.01)


class LargeApp:
    """Sends a large answer without reading the body."""

    N_BYTES = 8 << 20

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG002 - ASGI's
        """See ASGI."""
        headers = [(b"content-length", str(self.N_BYTES).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": bytes(self.N_BYTES)})


class PatientApp:
    """Answers only when the client has left."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG002 - ASGI's
        """See ASGI."""
        while (await receive())["type"] != "http.disconnect":
            pass


@asynccontextmanager
async def running(
    limits: ConnectionLimits = LIMITS, app: Any = None, keep_alive_s: float = 30.0
) -> AsyncIterator[tuple[tuple[str, int], uvicorn.Server]]:
    """A running server with these limits, on a port that the system chooses."""
    door = Door(app or EchoApp(), Keys(["key"], []), max_body_bytes=MAX_BODY_BYTES)
    listener = socket.create_server((LOOPBACK, 0))
    config = uvicorn.Config(
        door,
        http=guarded(limits),
        lifespan="off",
        log_level="critical",
        timeout_keep_alive=keep_alive_s,  # type: ignore[arg-type]
    )
    server = uvicorn.Server(config)
    task = asyncio.ensure_future(server.serve(sockets=[listener]))
    try:
        await until(lambda: server.started)
        yield listener.getsockname()[:2], server
    finally:
        server.should_exit = True
        await task


@asynccontextmanager
async def serving(limits: ConnectionLimits = LIMITS, app: Any = None) -> AsyncIterator[tuple[str, int]]:
    """Run a server; yields its address."""
    async with running(limits, app) as (address, _):
        yield address


async def answer(address: tuple[str, int], *parts: bytes) -> bytes:
    """Send these parts; returns all that comes back until the server closes the connection."""
    reader, writer = await asyncio.open_connection(*address)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
        return await reader.read()
    finally:
        writer.close()


async def test_a_head_that_is_never_finished_is_closed() -> None:
    """Half a head, nothing at all, and an empty line after a first request: each gets HTTP 408 and is closed."""
    async with serving(replace(LIMITS, head_timeout_s=0.2)) as address:
        for part in (GET, b""):
            assert b" 408 " in await answer(address, part)
        reader, writer = await asyncio.open_connection(*address)
        writer.write(GET + b"\r\n")
        assert (await reader.readuntil(b"\r\n\r\n0")).startswith(b"HTTP/1.1 200 ")
        writer.write(b"\r\n")
        assert b" 408 " in await reader.read()
        writer.close()


async def test_a_body_that_is_never_finished_is_closed() -> None:
    """The app is told that the client is gone, and the connection is closed."""
    app = EchoApp()
    async with serving(replace(LIMITS, body_timeout_s=0.2), app) as address:
        head = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key\r\nContent-Length: 10\r\n\r\n"
        assert await answer(address, head, b"12345") == b""
    assert app.n_disconnects == 1


async def test_a_head_that_is_too_large_is_refused() -> None:
    """Too many fields, a field or a target that is too long: refused. One that just fits is served."""
    async with serving() as address:
        for head in (
            GET + b"".join(b"X-%d: y\r\n" % i for i in range(30)),
            GET + b"X: " + b"y" * 2000 + b"\r\n",
            b"GET /" + b"x" * 2000 + b" HTTP/1.1\r\nHost: x\r\n",
        ):
            assert b" 431 " in await answer(address, head + b"\r\n")
        fits = GET + b"X: " + b"y" * 1800 + b"\r\nConnection: close\r\n\r\n"
        assert (await answer(address, fits)).endswith(b"\r\n\r\n0")


ENDLESS = 64 * LIMITS.max_head_bytes
"""Far more than the server may keep, in pieces that a connection takes."""


@pytest.mark.parametrize(
    "start",
    [
        GET + b"X: ",
        GET,
        b"GET /",
        POST_CHUNKED + b"0\r\nX: ",
        POST_CHUNKED + b"5;extension=",
        POST_CHUNKED + b"5\r\n12345\r\n0\r\nX: ",
    ],
    ids=["value", "name", "target", "trailer", "chunk extension", "trailer after a body"],
)
async def test_what_never_ends_is_not_kept(start: bytes) -> None:
    """The parser reports only complete fields; one that never completes ends the connection once it is too large."""
    async with serving() as address:
        _, writer = await asyncio.open_connection(*address)
        writer.write(start)
        with pytest.raises(ConnectionError):
            await _written_for_ever(writer)
        writer.transport.abort()


async def _written_for_ever(writer: asyncio.StreamWriter) -> None:
    """Write far more than the server may accept, until it refuses."""
    for _ in range(1000):
        writer.write(b"y" * ENDLESS)
        await writer.drain()


async def test_a_body_in_small_chunks_passes() -> None:
    """The lines between chunks do not count as a head, however many there are."""
    async with serving() as address:
        chunks = b"1\r\nx\r\n" * 900
        whole = POST_CHUNKED.replace(b"Host: x", b"Host: x\r\nConnection: close") + chunks + b"0\r\n\r\n"
        assert len(chunks) > LIMITS.max_head_bytes
        assert (await answer(address, whole)).endswith(b"\r\n\r\n900")


async def test_a_body_that_is_too_large_is_refused() -> None:
    """By its declared length before anything is read, in chunks once it is too large; the app never gets more."""
    app = EchoApp()
    head = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key\r\n"
    async with serving(app=app) as address:
        said = await answer(address, head + b"Content-Length: 1001\r\n\r\n")
        assert b" 413 " in said
        assert b"--max-request-body-mb" in said
        assert app.most_bytes == 0
        chunked = head + b"Transfer-Encoding: chunked\r\n\r\n"
        assert b" 413 " in await answer(address, chunked, *[b"64\r\n" + b"x" * 100 + b"\r\n"] * 11)
        assert app.most_bytes <= MAX_BODY_BYTES
        fits = head + b"Connection: close\r\nContent-Length: 1000\r\n\r\n" + b"x" * 1000
        assert (await answer(address, fits)).endswith(b"\r\n\r\n1000")


async def test_without_a_key_nothing_of_the_body_is_read() -> None:
    """The refusal comes before the body is read."""
    app = EchoApp()
    async with serving(app=app) as address:
        head = b"POST /invocations HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 900\r\n\r\n"
        assert b" 401 " in await answer(address, head)
    assert app.most_bytes == 0


async def test_beyond_the_limit_only_probes_are_served() -> None:
    """
    At the limit, one more connection gets HTTP 503, but a probe is answered; far beyond it, connections are closed at
    once.
    """
    async with serving() as address:
        held = [await asyncio.open_connection(*address) for _ in range(LIMITS.max_connections)]
        for _, writer in held:
            writer.write(GET)
        post = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key\r\nContent-Length: 0\r\n\r\n"
        served = post.replace(b"Host: x", b"Host: x\r\nConnection: close")
        for _ in range(1000):  # the server has not yet seen all that are open
            if b" 503 " in await answer(address, served):
                break
        else:
            pytest.fail("never refused")
        assert b" 200 " in await answer(address, GET + b"Connection: close\r\n\r\n")
        held += [await asyncio.open_connection(*address) for _ in range(SPARE_CONNECTIONS + 1)]
        with pytest.raises(ConnectionError):
            await _closed(held[-1][0])
        for _, writer in held:
            writer.transport.abort()
        for _ in range(1000):
            if b" 200 " in await _tried(address, served):
                return
        pytest.fail("never served again")


async def _closed(reader: asyncio.StreamReader) -> None:
    if await reader.read() == b"":
        raise ConnectionResetError


async def _tried(address: tuple[str, int], parts: bytes) -> bytes:
    try:
        return await answer(address, parts)
    except ConnectionError:
        return b""


UNAUTHORIZED = b"POST /admin/instances HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n"
UNREAD = b"GET /ping HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n"


@pytest.mark.parametrize("head", [UNAUTHORIZED, UNREAD], ids=["refused", "answered unread"])
async def test_a_body_after_the_answer_keeps_nothing_open(head: bytes) -> None:
    """The connection waits for its next request as long as any other; a head that never ends is refused as usual."""
    async with running(app=LargeApp(), keep_alive_s=0.3) as (address, _):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(head)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"12345")
        await reader.read()
        writer.close()
    async with running(app=LargeApp()) as (address, _):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(head)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"12345")
        writer.write(GET + b"X: ")
        drained = asyncio.ensure_future(reader.read())
        with pytest.raises(ConnectionError):
            await _written_for_ever(writer)
        drained.cancel()
        await asyncio.gather(drained, return_exceptions=True)
        writer.transport.abort()


async def test_a_head_that_never_ends_while_another_request_is_answered() -> None:
    """Its size is limited like the first one's."""
    async with running(app=PatientApp()) as (address, _):
        _, writer = await asyncio.open_connection(*address)
        writer.write(GET + b"\r\n" + GET + b"X: ")
        with pytest.raises(ConnectionError):
            await _written_for_ever(writer)
        writer.transport.abort()


@pytest.mark.parametrize("method", [b"GET", b"POST"])
async def test_a_websocket_with_a_body_is_refused(method: bytes) -> None:
    """Otherwise its handshake would never end."""
    upgrade = (
        b" /v1/realtime HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nContent-Length: 5\r\n\r\n"
    )
    async with serving() as address:
        assert b" 400 " in await answer(address, method + upgrade, b"12345")


@pytest.mark.parametrize("n_requests", [1, 100])
async def test_an_answer_that_is_not_read_keeps_nothing_open(n_requests: int) -> None:
    """A client that reads nothing is disconnected."""
    async with running(replace(LIMITS, send_timeout_s=0.3), LargeApp()) as (address, server):
        _, stalled = await asyncio.open_connection(*address, limit=1)
        stalled.write((GET + b"\r\n") * n_requests)
        await until(lambda: bool(server.server_state.connections))
        await until(lambda: not server.server_state.connections)
        stalled.transport.abort()


async def test_an_answer_that_is_read_slowly_arrives() -> None:
    """However many time-outs it takes."""
    async with running(replace(LIMITS, send_timeout_s=0.5), LargeApp()) as (address, _):
        reader, writer = await asyncio.open_connection(*address, limit=1 << 16)
        writer.write(GET + b"Connection: close\r\n\r\n")
        n_bytes = 0
        while part := await reader.read(1 << 19):
            n_bytes += len(part)
            await asyncio.sleep(0.02)
        writer.close()
    assert n_bytes > LargeApp.N_BYTES

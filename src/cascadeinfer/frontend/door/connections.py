"""
Connection limits that uvicorn lacks: the number of connections, size and duration of heads, duration of bodies and of
unread answers.

A class for uvicorn's `http` option. A connection waits for a head, reads it, reads a body, sends the answer, and waits
for the next request. Every phase but the answer has a deadline; while an answer is written, and after the connection
has been closed, the client must read some of it now and then. A connection beyond the limit may still serve a probe or
a scrape, so that a flood does not look like a death; it gets HTTP 503 otherwise.
"""

import asyncio
import enum
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, ClassVar, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from cascadeinfer.frontend.door.routes import OPEN

SPARE_CONNECTIONS: Final = 64
"""Connections for probes and scrapes beyond the limit; more are closed at once."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """
    What a client may use.

    Attributes:
        max_connections: Open connections in this process.
        head_timeout_s: From the connection, or the first byte of a further request, to the end of the head.
        body_timeout_s: From the end of the head to that of the body, while the server reads it.
        max_head_bytes: All header fields and the target together.
        max_headers: Header fields of a request.
        send_timeout_s: A client that reads nothing of its answer for this long is disconnected.
    """

    max_connections: int
    head_timeout_s: float
    body_timeout_s: float
    max_head_bytes: int
    max_headers: int
    send_timeout_s: float


class _Phase(enum.Enum):
    """What a connection is waiting for."""

    HEAD = "head"
    BODY = "body"
    ANSWER = "answer"
    NEXT = "next"


class _HeadTooLargeError(Exception):
    """Raised inside the parser, which ends it."""


class GuardedProtocol(HttpToolsProtocol):
    """See the module header. Use the class that `guarded` returns."""

    limits: ClassVar[ConnectionLimits]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """See HttpToolsProtocol."""
        super().__init__(*args, **kwargs)
        self._phase = _Phase.HEAD
        self._deadline: asyncio.TimerHandle | None = None
        self._sending: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._undecided_bytes = 0
        self._is_surplus = False
        self._bad_status = HTTPStatus.BAD_REQUEST

    def connection_made(self, transport: Any) -> None:
        """A client connects."""
        super().connection_made(transport)
        n_connections = len(self.connections)
        self._is_surplus = n_connections > self.limits.max_connections
        if n_connections > self.limits.max_connections + SPARE_CONNECTIONS:
            transport.abort()
            return
        self._wait_for(_Phase.HEAD, self.limits.head_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._wait_for(_Phase.NEXT)
        self._stop_watching()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Part of a request arrived."""
        if self.transport.is_closing():
            return
        if self._phase is _Phase.NEXT:  # uvicorn's keep-alive timer ends with the first byte, be it an empty line
            self._wait_for(_Phase.HEAD, self.limits.head_timeout_s)
        self._undecided_bytes += len(data)
        super().data_received(data)
        if self._undecided_bytes > self.limits.max_head_bytes:
            # A field, a chunk's head or a trailer that does not end: the parser keeps all of it before it reports any.
            # The same goes for another request's head while this one is answered.
            if self._phase is _Phase.HEAD:
                self._end_with(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
            else:
                self.transport.abort()

    def on_body(self, body: bytes) -> None:
        """Part of the body."""
        self._undecided_bytes = 0
        super().on_body(body)

    def on_message_begin(self) -> None:
        """The first byte of a head."""
        self._head_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Part of the target."""
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header field."""
        self._count_head(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is complete."""
        self._undecided_bytes = 0
        self._wait_for(_Phase.BODY, self.limits.body_timeout_s)
        if self._is_surplus:
            is_probe = self.url.partition(b"?")[0].decode("ascii", "replace") in OPEN
            self.limit_concurrency = None if is_probe else 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The body is complete."""
        self._undecided_bytes = 0
        self._wait_for(_Phase.ANSWER)
        self._look_for_next()  # it may have been answered before it was read
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """An answer was written; those to pipelined requests may follow."""
        self._look_for_next()
        super().on_response_complete()
        if self.transport.is_closing():
            self._watch_sending()

    def handle_websocket_upgrade(self) -> None:
        """Another protocol takes over; it knows no bodies, and would wait for ever for what follows one."""
        self._wait_for(_Phase.NEXT)
        has_body = any(
            name == b"transfer-encoding" or (name == b"content-length" and value.strip() != b"0")
            for name, value in self.headers
        )
        if has_body or self.scope["method"] != "GET":
            self._end_with(HTTPStatus.BAD_REQUEST)
        else:
            super().handle_websocket_upgrade()

    def timeout_keep_alive_handler(self) -> None:
        """No further request came."""
        super().timeout_keep_alive_handler()
        self._watch_sending()

    def pause_writing(self) -> None:
        """The client reads more slowly than the server sends."""
        super().pause_writing()
        self._watch_sending()

    def resume_writing(self) -> None:
        """The client has read some."""
        self._stop_watching()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """What arrived is not a request, or its head is too large."""
        self._wait_for(_Phase.NEXT)
        if self._bad_status is HTTPStatus.BAD_REQUEST:
            super().send_400_response(msg)
            self._watch_sending()
        else:
            self._end_with(self._bad_status)

    def _count_head(self, n_bytes: int) -> None:
        self._head_bytes += n_bytes
        if self._head_bytes > self.limits.max_head_bytes or len(self.headers) >= self.limits.max_headers:
            self._bad_status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            raise _HeadTooLargeError

    def _wait_for(self, phase: _Phase, timeout_s: float | None = None) -> None:
        self._phase = phase
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if timeout_s is not None:
            self._deadline = self.loop.call_later(timeout_s, self._overdue, timeout_s)

    def _look_for_next(self) -> None:
        """
        Whether all requests received are answered. uvicorn's keep-alive timer ends with any byte, including those of a
        late body.
        """
        cycle: RequestResponseCycle | None = getattr(self, "cycle", None)  # None before the first request
        if self._phase is _Phase.ANSWER and cycle is not None and cycle.response_complete:
            self._wait_for(_Phase.NEXT, self.timeout_keep_alive)

    def _watch_sending(self) -> None:
        """From now on, require the client to read some of what is unsent, until all is read or `_stop_watching`."""
        if self._sending is None:
            n_bytes = self.transport.get_write_buffer_size()
            self._sending = self.loop.call_later(self.limits.send_timeout_s, self._look_at_sending, n_bytes)

    def _look_at_sending(self, before_bytes: int) -> None:
        self._sending = None
        if self.transport.get_write_buffer_size() < before_bytes:
            self._watch_sending()
        elif before_bytes or self.transport.is_closing():
            self.transport.abort()

    def _stop_watching(self) -> None:
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None

    def _overdue(self, timeout_s: float) -> None:
        # While the server has paused reading, a late body is not the client's fault.
        if self._phase is _Phase.BODY and self.flow.read_paused:
            self._wait_for(_Phase.BODY, timeout_s)
            return
        if self._phase is _Phase.HEAD:
            self._end_with(HTTPStatus.REQUEST_TIMEOUT)
        else:
            self.transport.close()  # the app, which waits for the body, learns that the client is gone
            self._watch_sending()

    def _end_with(self, status: HTTPStatus) -> None:
        head = f"HTTP/1.1 {int(status)} {status.phrase}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode())
        self.transport.close()
        self._watch_sending()


def guarded(limits: ConnectionLimits) -> type[GuardedProtocol]:
    """The class for uvicorn's `http` option."""
    return type("LimitedProtocol", (GuardedProtocol,), {"limits": limits})

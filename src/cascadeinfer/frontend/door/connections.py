"""
Limits of a connection that uvicorn does not have: how many there are, how long and how large a head may be, how long a body may take.

A class for uvicorn's `http` option. A connection waits for a head, reads it, reads a body, and then belongs to its answer; the first three
have a deadline. Between two requests uvicorn's own keep-alive time-out holds. A connection beyond the most that there may be is still served
a probe or a scrape, so that a flood does not look like a death, and HTTP 503 otherwise.
"""

import asyncio
import enum
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, ClassVar, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cascadeinfer.frontend.door.routes import OPEN

SPARE_CONNECTIONS: Final = 64
"""For probes and scrapes beyond the limit; more are closed at once."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """
    What a client may take.

    Attributes:
        max_connections: Open at once in this process.
        head_timeout_s: From the connection, or the first byte of a further request, to the end of the head.
        body_timeout_s: From the end of the head to that of the body, while the server reads it.
        max_head_bytes: Of all header fields and the target together.
        max_headers: Header fields of a request.
    """

    max_connections: int
    head_timeout_s: float
    body_timeout_s: float
    max_head_bytes: int
    max_headers: int


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
        """It is gone."""
        self._wait_for(_Phase.NEXT)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Some of a request came."""
        if self.transport.is_closing():
            return
        if self._phase is _Phase.NEXT:  # uvicorn's keep-alive timer ends with the first byte, be it an empty line
            self._wait_for(_Phase.HEAD, self.limits.head_timeout_s)
        self._undecided_bytes += len(data)
        super().data_received(data)
        if self._phase in {_Phase.HEAD, _Phase.BODY} and self._undecided_bytes > self.limits.max_head_bytes:
            # A field, a chunk's head or a trailer that does not end: the parser says nothing of it before it has kept all of it.
            if self._phase is _Phase.HEAD:
                self._end_with(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
            else:
                self.transport.abort()

    def on_body(self, body: bytes) -> None:
        """Some of the body."""
        self._undecided_bytes = 0
        super().on_body(body)

    def on_message_begin(self) -> None:
        """The first byte of a head."""
        self._head_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Some of the target."""
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
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """The answer was sent."""
        if self._phase is _Phase.ANSWER:
            self._wait_for(_Phase.NEXT)
        super().on_response_complete()

    def handle_websocket_upgrade(self) -> None:
        """Another protocol takes over."""
        self._wait_for(_Phase.NEXT)
        super().handle_websocket_upgrade()

    def send_400_response(self, msg: str) -> None:
        """What came is no request, or its head is too large."""
        self._wait_for(_Phase.NEXT)
        if self._bad_status is HTTPStatus.BAD_REQUEST:
            super().send_400_response(msg)
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

    def _overdue(self, timeout_s: float) -> None:
        if self._phase is _Phase.BODY and self.flow.read_paused:  # the server does not read on: not the client's fault
            self._wait_for(_Phase.BODY, timeout_s)
            return
        if self._phase is _Phase.HEAD:
            self._end_with(HTTPStatus.REQUEST_TIMEOUT)
        else:
            self.transport.close()  # the app, which waits for the body, hears that the client is gone

    def _end_with(self, status: HTTPStatus) -> None:
        head = f"HTTP/1.1 {int(status)} {status.phrase}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode())
        self.transport.close()


def guarded(limits: ConnectionLimits) -> type[GuardedProtocol]:
    """The class for uvicorn's `http` option."""
    return type("LimitedProtocol", (GuardedProtocol,), {"limits": limits})

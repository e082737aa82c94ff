"""
An ASGI app around the whole server: requires the key, bounds the body, checks what goes into logs.

It is outermost, even outside the operator's own middleware: nothing of a request is read, and no route is looked up,
before its key is known. Routes are closed unless `routes.py` says otherwise, so no list of paths has to be complete.
"""

import json
import re
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

from starlette._utils import get_route_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cascadeinfer.frontend.door.keys import SCHEME, Keys
from cascadeinfer.frontend.door.routes import IMPOSSIBLE, Access, access_of

ID_CHARACTERS: Final = "[A-Za-z0-9._:@/+=~-]"
PLAIN_ID: Final = "must be 1 to 128 letters, digits or characters of . _ : @ / + = ~ -"
REQUEST_ID: Final = re.compile(f"{ID_CHARACTERS}{{1,128}}".encode())
"""What `X-Request-Id` may be: it goes into logs, metrics and the file names of whoever reads them."""
WEBSOCKET_DENIED: Final = 1008
"""The code of a policy violation; before the handshake the server answers it with HTTP 403."""

Headers = Sequence[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class _Refusal:
    status: HTTPStatus
    sentence: str
    headers: Headers = ()


class _BodyTooLargeError(Exception):
    """The body exceeds the limit."""


class Door:
    """See the module header."""

    def __init__(self, app: ASGIApp, keys: Keys, *, max_body_bytes: int, root_path: str = "") -> None:
        """
        Args:
            app: The server.
            keys: Which keys open which routes.
            max_body_bytes: Limit on a request's body; larger ones get HTTP 413.
            root_path: The prefix under which a proxy has mounted the service.
        """
        self._app = app
        self._keys = keys
        self._max_body_bytes = max_body_bytes
        self._root_path = root_path.rstrip("/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if scope["type"] == "websocket":
            await (self._app(scope, receive, send) if refusal is None else _deny(receive, send))
            return
        if refusal is not None:
            await _answer(send, refusal)
            return
        await self._bounded(scope, receive, send)

    def _refusal(self, scope: Scope) -> _Refusal | None:
        headers = scope["headers"]
        if _is_preflight(scope, headers):
            return _bad_request_id(headers)
        path = get_route_path({**scope, "root_path": self._root_path or scope.get("root_path", "")})
        access = access_of(path)
        if not self._keys.open(access, authorization := _shown_key(headers)):
            return self._closed(access, authorization)
        if path in IMPOSSIBLE:
            return _Refusal(HTTPStatus.NOT_IMPLEMENTED, f"{path} does not work here: {IMPOSSIBLE[path]}")
        if (bad_id := _bad_request_id(headers)) is not None:
            return bad_id
        length = _header(headers, b"content-length")
        if length is not None and length.isdigit() and int(length[:20]) > self._max_body_bytes:
            return self._too_large()
        return None

    def _closed(self, access: Access, authorization: bytes) -> _Refusal:
        if access is Access.ADMIN and self._keys.knows(authorization):
            return _Refusal(HTTPStatus.FORBIDDEN, "this route needs the admin key (--admin-api-key)")
        return _Refusal(HTTPStatus.UNAUTHORIZED, "Unauthorized", [(b"www-authenticate", b"Bearer")])

    def _too_large(self) -> _Refusal:
        return _Refusal(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"the body is larger than {self._max_body_bytes} bytes (--max-request-body-mb)",
            [(b"connection", b"close")],
        )

    async def _bounded(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app with a body that is counted as it arrives: a chunked body does not announce its length."""
        if not _has_body(scope["headers"]):
            await self._app(scope, receive, send)
            return
        n_bytes = 0
        started = False

        async def counted_receive() -> Message:
            nonlocal n_bytes
            message = await receive()
            n_bytes += len(message.get("body", b""))
            if n_bytes > self._max_body_bytes:
                raise _BodyTooLargeError
            return message

        def noted_send(message: Message) -> Awaitable[None]:  # not a coroutine: every token passes here
            nonlocal started
            if n_bytes > self._max_body_bytes and not started:
                return _dropped()  # the app would take it for a malformed body, which has another status
            started = True
            return send(message)

        try:
            await self._app(scope, counted_receive, noted_send)
        except _BodyTooLargeError:
            if started:
                raise
        if not started and n_bytes > self._max_body_bytes:
            await _answer(send, self._too_large())


def _bad_request_id(headers: Headers) -> _Refusal | None:
    request_ids = [value for name, value in headers if name.lower() == b"x-request-id"]
    if len(request_ids) <= 1 and all(REQUEST_ID.fullmatch(value) for value in request_ids):
        return None
    return _Refusal(HTTPStatus.BAD_REQUEST, f"X-Request-Id {PLAIN_ID}")


def _is_preflight(scope: Scope, headers: Headers) -> bool:
    """A browser's preflight, which carries no key; vLLM's CORS middleware answers it before any route is looked up."""
    return (
        scope.get("method") == "OPTIONS"
        and _header(headers, b"origin") is not None
        and _header(headers, b"access-control-request-method") is not None
    )


def _has_body(headers: Headers) -> bool:
    return any(name.lower() in {b"content-length", b"transfer-encoding"} for name, _ in headers)


def _header(headers: Headers, wanted: bytes) -> bytes | None:
    """The value of a header that occurs once; a repeated one counts as missing."""
    values = [value for name, value in headers if name.lower() == wanted]
    return values[0] if len(values) == 1 else None


def _shown_key(headers: Headers) -> bytes:
    """
    The key as the value of an `Authorization` header, which decides where there is one.

    Clients of Anthropic's API may send it as `X-Api-Key` instead.
    """
    if any(name.lower() == b"authorization" for name, _ in headers):
        return _header(headers, b"authorization") or b""
    key = _header(headers, b"x-api-key")
    return b"" if key is None else b" ".join((SCHEME, key))


async def _dropped() -> None:
    """Discards what the app says about a refused body."""


async def _deny(receive: Receive, send: Send) -> None:
    await receive()  # websocket.connect
    await send({"type": "websocket.close", "code": WEBSOCKET_DENIED, "reason": "Unauthorized"})


async def _answer(send: Send, refusal: _Refusal) -> None:
    """An error in the form of OpenAI's API."""
    error = {"message": refusal.sentence, "type": refusal.status.phrase, "param": None, "code": int(refusal.status)}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *refusal.headers]
    await send({"type": "http.response.start", "status": int(refusal.status), "headers": headers})
    await send({"type": "http.response.body", "body": body})

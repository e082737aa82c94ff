"""
An ASGI app around vLLM's server that checks bodies before any vLLM model reads them.

It checks for words reserved for the service, and for structural tags, which vLLM compiles while it parses the request,
in the front end's event loop. (All other structured outputs are checked in `params.py`, where every API meets.)

Nearly every body is passed on unread: only one that contains such a word, or may contain one in disguise, is decoded.
JSON allows names to be written with escapes, and its decoder accepts UTF-16 and UTF-32; we use the same decoder as
vLLM, so both see the same.
"""

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cascadeinfer.frontend.contents.limits import ContentLimits, SchemaLimits
from cascadeinfer.frontend.contents.schemas import SchemaRefusedError, check_structured_output
from cascadeinfer.frontend.contents.words import FORBIDDEN, WHY_REFUSED, forbidden_words, without_words

STRUCTURAL_TAG: Final = "structural_tag"
TAG_FIELDS: Final = ("response_format", "structured_outputs", "text")
"""Where a request may contain a structural tag."""
WORDS: Final = (*(word.encode() for word in FORBIDDEN), STRUCTURAL_TAG.encode())
ESCAPE: Final = b"\\u"
WIDE_MARKS: Final = (b"\xff\xfe", b"\xfe\xff")
METHODS_WITH_BODY: Final = frozenset({"POST", "PUT", "PATCH", "DELETE"})


class Bodies:
    """See the module header. The surrounding app bounds the size of bodies."""

    def __init__(self, app: ASGIApp, limits: ContentLimits) -> None:
        """
        Args:
            app: The server.
            limits: What bodies may contain.
        """
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http" or scope["method"] not in METHODS_WITH_BODY:
            await self._app(scope, receive, send)
            return
        body, last = await _whole(receive)
        if last["type"] == "http.disconnect":
            return
        if needs_a_look(body):
            try:
                decoded = _decoded(body)
                path = next(forbidden_words(decoded), None)
                refusal = _tag_refusal(decoded, self._limits.schemas)
                kept = None if path is None else without_words(decoded)
            except RecursionError:
                await _refuse("body", "it is nested too deeply", scope, receive, send)
                return
            if path is not None and not self._limits.ignores_words:
                refusal = ".".join(path), f"{path[-1]} {WHY_REFUSED}"
            if refusal is not None:
                await _refuse(*refusal, scope, receive, send)
                return
            if path is not None:
                body = json.dumps(kept).encode()
                scope = {**scope, "headers": _with_length(scope["headers"], len(body))}
        await self._app(scope, _replay(body, receive), send)


def needs_a_look(body: bytes) -> bool:
    """Whether a body has to be decoded to decide."""
    return any(word in body for word in WORDS) or ESCAPE in body or body.startswith(WIDE_MARKS) or b"\0" in body[:4]


def _decoded(body: bytes) -> Any:
    """The body as vLLM decodes it; vLLM itself refuses what cannot be decoded."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


async def _whole(receive: Receive) -> tuple[bytes, Message]:
    """The body and its last message."""
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts), message


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once, and then whatever follows it."""
    given = False

    async def receive_again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again


def _with_length(headers: list[tuple[bytes, bytes]], length: int) -> list[tuple[bytes, bytes]]:
    kept = [header for header in headers if header[0].lower() not in {b"content-length", b"transfer-encoding"}]
    return [*kept, (b"content-length", str(length).encode())]


def _tag_refusal(body: Any, limits: SchemaLimits) -> tuple[str, str] | None:
    """The field with a structural tag that is too large, and why; None if there is none."""
    for field in TAG_FIELDS if isinstance(body, Mapping) else ():
        value = body.get(field)
        if not isinstance(value, Mapping):
            continue
        tags = [value[STRUCTURAL_TAG]] if value.get(STRUCTURAL_TAG) is not None else []
        for tag in [*tags, *(part for part in (value, value.get("format")) if _is_tag(part))]:
            try:
                check_structured_output(STRUCTURAL_TAG, tag, limits)
            except SchemaRefusedError as refused:
                return field, f"the structured output ({STRUCTURAL_TAG}) is refused: {refused}"
    return None


def _is_tag(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == STRUCTURAL_TAG


async def _refuse(path: str, sentence: str, scope: Scope, receive: Receive, send: Send) -> None:
    status = HTTPStatus.BAD_REQUEST
    error = {"message": sentence, "type": "BadRequestError", "param": path, "code": int(status)}
    await JSONResponse({"error": error}, status)(scope, receive, send)

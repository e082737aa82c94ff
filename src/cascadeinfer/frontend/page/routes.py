"""
The routes of the operator's page.

    GET /admin                  the page; without data, so open to anybody (`frontend/door/routes.py`)
    GET /admin/events           server-sent events: a picture each second (`runtime/picture.py`), with `service`
    GET /admin/requests/ID      the story of a live request

The page is one file. Its Content-Security-Policy permits its own script and style, by their hashes, and connections to
this server; nothing else is loaded, and no other page may frame it. In the schema none of them is listed: they are for
our own page, and the events never end.
"""

import base64
import hashlib
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from http import HTTPStatus
from importlib import resources
from typing import Any, Final

from fastapi import APIRouter, FastAPI, HTTPException
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from cascadeinfer import __version__
from cascadeinfer.frontend.admin import Admin
from cascadeinfer.frontend.door.routes import PAGE
from cascadeinfer.frontend.page.viewers import Viewers

HASHED: Final = {"script-src": "script", "style-src": "style"}
RETRY_AFTER_S: Final = 10
NOT_STORED: Final = {"Cache-Control": "no-store"}


@dataclass(frozen=True, slots=True)
class Served:
    """
    What is served, for the head of the page.

    Attributes:
        model: Its name, or names.
        policy: The scheduling policy's name.
        max_tokens: Longest sequence: the end of the page's length axis.
        version: Ours.
    """

    model: str
    policy: str
    max_tokens: int
    version: str = __version__


def security_headers(html: str) -> dict[str, str]:
    """The headers with which the page is sent. See the module header."""
    policy = ["default-src 'none'", "connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'"]
    for directive, tag in HASHED.items():
        parts = re.findall(f"<{tag}>(.*?)</{tag}>", html, flags=re.DOTALL)
        hashes = (base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in parts)
        policy.append(" ".join([directive, *(f"'sha256-{digest}'" for digest in hashes)]))
    return {
        "Content-Security-Policy": "; ".join([*policy, "frame-ancestors 'none'"]),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        **NOT_STORED,
    }


class EventStream(Response):
    """The answer to a viewer; HTTP 503 when too many watch."""

    def __init__(self, viewers: Viewers) -> None:
        """
        Args:
            viewers: All of this process; a seat is taken when the answer begins.
        """
        super().__init__()
        self._viewers = viewers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        with self._viewers.seat() as is_seated:
            answer = self._events() if is_seated else self._full()
            await answer(scope, receive, send)

    def _events(self) -> Response:
        headers = {**NOT_STORED, "X-Accel-Buffering": "no"}  # nginx would collect events otherwise
        return StreamingResponse(self._viewers.events(), media_type="text/event-stream", headers=headers)

    def _full(self) -> Response:
        status = HTTPStatus.SERVICE_UNAVAILABLE
        message = f"too many viewers: try again in {RETRY_AFTER_S} s, or close another one"
        error = {"message": message, "type": status.phrase, "param": None, "code": int(status)}
        return JSONResponse({"error": error}, status, headers={"Retry-After": str(RETRY_AFTER_S)})


def attach_page(app: FastAPI, admin: Admin, served: Served, is_ending: Callable[[], bool]) -> Viewers:
    """
    Add the routes.

    Args:
        app: vLLM's.
        admin: Makes pictures, tells stories.
        served: For the head of the page.
        is_ending: Whether the server drains.

    Returns:
        Those who watch.
    """
    html = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    headers = security_headers(html)
    service = asdict(served)
    router = APIRouter(prefix=PAGE, include_in_schema=False)

    async def look() -> dict[str, Any]:
        return {"service": service, **await admin.picture()}

    viewers = Viewers(look, is_ending)

    @router.get("")
    async def page() -> HTMLResponse:
        """The page."""
        return HTMLResponse(html, headers=headers)

    @router.get("/events")
    async def events() -> EventStream:
        """A picture each second."""
        return EventStream(viewers)

    @router.get("/requests/{request_id:path}")
    async def story(request_id: str) -> dict[str, Any]:
        """What has happened to a live request, whichever process has it."""
        try:
            told = await admin.story(request_id)
        except TimeoutError:
            raise HTTPException(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "a front-end process that may have this request does not answer; try again",
                headers={"Retry-After": str(RETRY_AFTER_S)},
            ) from None
        if told is None:
            raise HTTPException(HTTPStatus.NOT_FOUND, f"no live request {request_id!r}")
        return told

    app.include_router(router)
    return viewers

"""
Server-sent events for all viewers of a process: one look a second, whatever their number, and none without viewers.

A viewer that reads slowly misses pictures; none is kept for it. Each picture stands for itself, so nothing is lost.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from typing import Any, Final

import msgspec

logger = logging.getLogger(__name__)

INTERVAL_S: Final = 1.0
MAX_VIEWERS: Final = 16
"""Per process: each is an open connection and up to 50 KB a second, and few people look at one server."""


class Viewers:
    """See the module header."""

    def __init__(
        self,
        look: Callable[[], Awaitable[dict[str, Any]]],
        is_ending: Callable[[], bool],
        *,
        interval_s: float = INTERVAL_S,
        max_viewers: int = MAX_VIEWERS,
    ) -> None:
        """
        Args:
            look: Makes a picture. Raises TimeoutError if another process does not answer.
            is_ending: Whether the server drains: it waits for open answers, so the streams must end.
            interval_s: Time between two pictures.
            max_viewers: Limit on viewers at a time.
        """
        self._look = look
        self._is_ending = is_ending
        self._interval_s = interval_s
        self._max_viewers = max_viewers
        self._n_viewers = 0
        self._looking: asyncio.Task[None] | None = None
        self._last: bytes | None = None
        self._coming: asyncio.Future[bytes | None] | None = None

    @contextlib.contextmanager
    def seat(self) -> Iterator[bool]:
        """A place among the viewers while in this context; False if all are taken."""
        if self._n_viewers >= self._max_viewers:
            yield False
            return
        self._n_viewers += 1
        if self._looking is None:
            self._last, self._coming = None, asyncio.get_running_loop().create_future()
            self._looking = asyncio.get_running_loop().create_task(self._keep_looking())
        try:
            yield True
        finally:
            self._n_viewers -= 1
            if not self._n_viewers:
                self._looking.cancel()
                self._looking = None

    async def events(self) -> AsyncGenerator[bytes]:
        """Server-sent events, the first at once if others watch; they end when the server drains. Needs a seat."""
        assert self._coming is not None
        if self._last is not None:
            yield self._last
        while (event := await asyncio.shield(self._coming)) is not None:
            yield event
        yield b"event: ending\ndata: {}\n\n"

    async def _keep_looking(self) -> None:
        while not self._is_ending():
            self._show(await self._event())
            await asyncio.sleep(self._interval_s)
        assert self._coming is not None
        self._coming.set_result(None)  # and no other follows

    def _show(self, event: bytes) -> None:
        assert self._coming is not None
        self._coming.set_result(event)
        self._last, self._coming = event, asyncio.get_running_loop().create_future()

    async def _event(self) -> bytes:
        try:
            return b"data: " + msgspec.json.encode(await self._look()) + b"\n\n"
        except TimeoutError:
            return _trouble("process 0 does not answer")
        except Exception:  # our own bug: the viewers are told, and the next look may do better
            logger.exception("internal error: no picture for the operator's page")
            return _trouble("no picture could be made; the server's log says why")


def _trouble(sentence: str) -> bytes:
    return b"event: trouble\ndata: " + msgspec.json.encode({"message": sentence}) + b"\n\n"

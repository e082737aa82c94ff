"""The operator's page behind the real door and routes, served over HTTP with recorded pictures."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import uvicorn
from fastapi import FastAPI

from cascadeinfer.frontend.door.door import Door
from cascadeinfer.frontend.door.keys import Keys
from cascadeinfer.frontend.page.routes import Served, attach_page
from support.pictures import MAX_TOKENS

API_KEY, ADMIN_KEY = "inference-key", "admin-key"
SERVED = Served("a simulated model", "cascade", MAX_TOKENS, "0.1.0")


class Recorded:
    """See `cascadeinfer.frontend.admin.Admin`: shows one recorded picture after the other, and then the last."""

    def __init__(self, pictures: Sequence[dict[str, Any]]) -> None:
        """
        Args:
            pictures: At least one; the last has the story of its oldest request.
        """
        self.pictures = [{name: part for name, part in picture.items() if name != "story"} for picture in pictures]
        self.told = pictures[-1].get("story")
        self.n_looks = 0
        self.is_ending = False

    async def picture(self) -> dict[str, Any]:
        """The next one."""
        self.n_looks += 1
        return self.pictures[min(self.n_looks, len(self.pictures)) - 1]

    async def story(self, request_id: str) -> dict[str, Any] | None:
        """The recorded one."""
        return self.told if self.told is not None and self.told["id"] == request_id else None

    def app(self) -> Door:
        """The door with the page's routes behind it."""
        inner = FastAPI()
        attach_page(inner, self, SERVED, lambda: self.is_ending)  # type: ignore[arg-type] - adds and drains nothing
        return Door(inner, Keys([API_KEY], [ADMIN_KEY]), max_body_bytes=1000)


class Shown(Protocol):
    """What is served; its streams end when it is told that the server ends."""

    is_ending: bool

    def app(self) -> Door:
        """The door with the routes behind it."""
        ...


@contextlib.contextmanager
def serving(recorded: Shown) -> Iterator[str]:
    """Serve it in a thread while in this context; yields the address."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()  # clients may come before the server runs
    server = uvicorn.Server(uvicorn.Config(recorded.app(), log_level="warning", lifespan="off"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        recorded.is_ending = server.should_exit = True
        thread.join()
        listener.close()

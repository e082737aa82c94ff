"""The operator's page without a browser: headers, keys, one look for all viewers, the end of a server."""

import asyncio
import contextlib
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from cascadeinfer.frontend.page.routes import security_headers
from cascadeinfer.frontend.page.viewers import Viewers
from support.served_page import ADMIN_KEY, API_KEY, Recorded
from support.virtual_time import virtual_time

PICTURE: dict[str, Any] = {"now_s": 1.0, "instances": []}
STORY = {"id": "a/b", "instance": "0", "tokens": 5, "dropped": 0, "chapters": []}


def bearer(key: str) -> dict[str, str]:
    """The header that carries a key."""
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def recorded() -> Recorded:
    """A server that shows one picture, and drains: its streams end at once."""
    shown = Recorded([{**PICTURE, "story": STORY}])
    shown.is_ending = True
    return shown


def test_the_page_is_open_and_empty(recorded: Recorded) -> None:
    """Anybody gets the page, which has no data; only GET is answered, and nothing is looked at."""
    client = TestClient(recorded.app())
    page = client.get("/admin")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert recorded.n_looks == 0
    assert client.post("/admin").status_code == 405
    assert client.get("/admin/").status_code == 401


def test_the_page_loads_nothing_and_runs_only_its_own_script(recorded: Recorded) -> None:
    """The policy permits the page's own script and style, by hash, and this server; no handlers are inline."""
    page = TestClient(recorded.app()).get("/admin")
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    for directive in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", policy[directive]), policy[directive]
    assert page.headers["cache-control"] == "no-store"
    assert page.headers["x-content-type-options"] == "nosniff"
    markup = re.sub(r"<(script|style)>.*?</\1>", "", page.text, flags=re.DOTALL)
    assert not re.search(r"\s(on\w+|style)=|\bsrc=|https?://", markup)
    assert "innerHTML" not in page.text


def test_the_policy_follows_the_script() -> None:
    """Another script has another hash: the header is made from what is sent."""
    one, other = (security_headers(f"<style>b</style><script>{text}</script>") for text in ("a()", "b()"))
    assert one["Content-Security-Policy"] != other["Content-Security-Policy"]


@pytest.mark.parametrize("path", ["/admin/events", "/admin/requests/a"])
def test_data_asks_for_the_admin_key(recorded: Recorded, path: str) -> None:
    """Without a key 401, with the API key 403, and nothing is looked at."""
    client = TestClient(recorded.app())
    assert client.get(path).status_code == 401
    assert client.get(path, headers=bearer("wrong")).status_code == 401
    assert client.get(path, headers=bearer(API_KEY)).status_code == 403
    assert recorded.n_looks == 0


def test_a_story_is_told_by_id(recorded: Recorded) -> None:
    """Ids may hold slashes, as clients' may; a request that is not live is 404."""
    client = TestClient(recorded.app(), headers=bearer(ADMIN_KEY))
    assert client.get("/admin/requests/a%2Fb").json() == STORY
    assert client.get("/admin/requests/b").status_code == 404


def test_a_draining_server_ends_its_streams(recorded: Recorded) -> None:
    """A server waits for open answers when it drains: those of viewers end with an event that says so."""
    answer = TestClient(recorded.app()).get("/admin/events", headers=bearer(ADMIN_KEY))
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text == "event: ending\ndata: {}\n\n"


class Watched:
    """Viewers of a counter, in virtual time."""

    def __init__(self, fault: Callable[[int], Exception | None] = lambda _: None, max_viewers: int = 16) -> None:
        """
        Args:
            fault: What the n-th look raises, or None.
            max_viewers: Limit on viewers.
        """
        self.n_looks = 0
        self.is_ending = False
        self._fault = fault
        self.viewers = Viewers(self.look, lambda: self.is_ending, max_viewers=max_viewers)

    async def look(self) -> dict[str, Any]:
        """The number of this look."""
        self.n_looks += 1
        if (fault := self._fault(self.n_looks)) is not None:
            raise fault
        return {"n": self.n_looks}

    async def watch(self, n_events: int) -> list[Any]:
        """What a viewer gets who leaves after so many events; None for one who finds no seat."""
        with self.viewers.seat() as is_seated:
            if not is_seated:
                return [None]
            async with contextlib.aclosing(self.viewers.events()) as events:
                heard: list[Any] = []
                async for event in events:
                    heard.append(parsed(event))
                    if len(heard) == n_events:
                        break
                return heard


def parsed(event: bytes) -> Any:
    """The number in a picture, or the kind of another event."""
    kind = re.match(rb"event: (\w+)\n", event)
    return kind[1].decode() if kind else json.loads(event.removeprefix(b"data: "))["n"]


@virtual_time
async def test_viewers_share_their_looks() -> None:
    """Any number of viewers costs one look a second; whoever comes later begins with the last one, at once."""
    watched = Watched()
    one = asyncio.create_task(watched.watch(4))
    await asyncio.sleep(1.5)
    others = [asyncio.create_task(watched.watch(2)) for _ in range(5)]
    assert await one == [1, 2, 3, 4]
    assert await asyncio.gather(*others) == [[2, 3]] * 5
    assert watched.n_looks == 4


@virtual_time
async def test_nothing_is_looked_at_when_nobody_watches() -> None:
    """Before the first viewer and after the last nothing happens; the next one gets a fresh picture."""
    watched = Watched()
    await asyncio.sleep(10.0)
    assert watched.n_looks == 0
    assert await watched.watch(2) == [1, 2]
    await asyncio.sleep(10.0)
    assert watched.n_looks == 2
    assert await watched.watch(1) == [3]


@virtual_time
async def test_viewers_are_bounded() -> None:
    """One too many finds no seat, and takes none; a seat that was left is free."""
    watched = Watched(max_viewers=2)
    two = [asyncio.create_task(watched.watch(3)) for _ in range(2)]
    await asyncio.sleep(0.5)
    assert await watched.watch(1) == [None]
    await asyncio.gather(*two)
    assert await watched.watch(1) == [4]


@virtual_time
async def test_a_viewer_who_leaves_disturbs_nobody() -> None:
    """One is cut off in the middle of its wait; the other goes on."""
    watched = Watched()
    leaving, staying = (asyncio.create_task(watched.watch(5)) for _ in range(2))
    await asyncio.sleep(1.5)
    leaving.cancel()
    assert await staying == [1, 2, 3, 4, 5]
    assert watched.n_looks == 5


@virtual_time
async def test_a_failed_look_is_told_and_tried_again() -> None:
    """Process 0 may not answer, and we may have bugs: viewers hear so, and see the next picture."""
    faults = {1: TimeoutError(), 3: ZeroDivisionError()}
    watched = Watched(faults.get)
    assert await watched.watch(4) == ["trouble", 2, "trouble", 4]


@virtual_time
async def test_the_end_reaches_every_viewer() -> None:
    """When the server drains, all streams end within a second."""
    watched = Watched()
    viewers = [asyncio.create_task(watched.watch(9)) for _ in range(3)]
    await asyncio.sleep(1.5)
    watched.is_ending = True
    assert await asyncio.gather(*viewers) == [[1, 2, "ending"]] * 3
    assert watched.n_looks == 2


def test_too_many_viewers_get_503(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the form of the API's errors, with the time to come again."""
    monkeypatch.setattr(Viewers, "seat", lambda _: contextlib.nullcontext(False))
    answer = TestClient(recorded.app()).get("/admin/events", headers=bearer(ADMIN_KEY))
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "10"
    assert "too many viewers" in answer.json()["error"]["message"]

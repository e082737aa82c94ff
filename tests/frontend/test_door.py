"""
Who may do what: every route of the real application, with all of vLLM's optional routers, behind the door.

The application is vLLM's own, made without an engine. The door answers before the application is asked, so whether a
route is closed does not depend on what the route would do.
"""

import os
import re
from collections.abc import Iterator
from typing import Any
from unittest.mock import MagicMock

import pytest

pytest.importorskip("vllm")

from fastapi import FastAPI
from starlette.routing import Mount, WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect

from cascadeinfer.frontend.admin import attach_admin_routes
from cascadeinfer.frontend.door.door import Door
from cascadeinfer.frontend.door.keys import Keys
from cascadeinfer.frontend.door.routes import IMPOSSIBLE, INFERENCE, OPEN, PAGE, Access, access_of
from cascadeinfer.frontend.page.routes import Served, attach_page

API, ADMIN = "inference-key", "admin-key"
EVERY_ROUTER = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
TASKS = (
    "generate",
    "transcription",
    "realtime",
    "embed",
    "classify",
    "token_embed",
    "token_classify",
    "plugin",
    "render",
)
CHANGES_THE_SERVICE = (
    "/admin/instances",
    "/admin/instances/{instance_id}",
    "/admin/events",
    "/admin/requests/{request_id:path}",
    "/sleep",
    "/wake_up",
    "/pause",
    "/resume",
    "/reset_prefix_cache",
    "/reset_mm_cache",
    "/reset_encoder_cache",
    "/collective_rpc",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/adapters",
    "/adapters/{adapter_name}",
    "/update_weights",
    "/abort_requests",
    "/inference/v1/abort_requests",
    "/release_kv_cache_memory",
)


@pytest.fixture(scope="module")
def app() -> Iterator[FastAPI]:
    """The application with all routes, including ours."""
    before = dict(os.environ)
    os.environ.update(EVERY_ROUTER)
    try:
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--enable-tokenizer-info-endpoint"])
        application = build_app(args, TASKS, MagicMock())  # a model of every kind: routers ask it what it can do
        attach_admin_routes(application, None, None, drain_timeout_s=1.0)  # type: ignore[arg-type] - nothing is called
        attach_page(application, None, Served("m", "p", 1024), lambda: False)  # type: ignore[arg-type] - the same
        yield application
    finally:
        os.environ.clear()
        os.environ.update(before)


class Recorder:
    """Stands in for the application: records that a request came through."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """See ASGI."""
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept"})
            await send({"type": "websocket.close", "code": 1000})
            return
        await send({"type": "http.response.start", "status": 299, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def behind(api: list[str], admin: list[str], **options: Any) -> TestClient:
    """A client of a door with these keys."""
    return TestClient(Door(Recorder(), Keys(api, admin), **({"max_body_bytes": 1000} | options)))


def bearer(key: str | None) -> dict[str, str]:
    """Headers with a key."""
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def routes_of(app: FastAPI) -> list[tuple[str, str]]:
    """Every method and path of the application, including mounts, with parameters filled in."""
    found = []
    for route in app.routes:
        if isinstance(route, WebSocketRoute):
            continue
        path = route.path.replace("{path:path}", "x")
        while "{" in path:
            path = path[: path.index("{")] + "x" + path[path.index("}") + 1 :]
        methods = ["GET", "POST"] if isinstance(route, Mount) else sorted(route.methods)
        found += [(method, path) for method in methods]
    return found


def test_every_route_asks_for_the_key(app: FastAPI) -> None:
    """Without a key, or with a wrong one, probes, metrics and the empty page are open; an API key opens everything."""
    client = behind([API], [])
    routes = routes_of(app)
    assert len(routes) > 60
    for method, path in routes:
        expected = 299 if path in OPEN or path == PAGE else 401
        for headers in ({}, bearer("wrong"), {"Authorization": API}, {"Authorization": f"Basic {API}"}):
            assert client.request(method, path, headers=headers).status_code == expected, (method, path)
        opened = client.request(method, path, headers=bearer(API))
        assert opened.status_code == (501 if path in IMPOSSIBLE else 299), (method, path)


def test_a_key_may_come_as_anthropic_sends_it() -> None:
    """`X-Api-Key` opens what `Authorization` would, unless there is an `Authorization`, which then decides."""
    client = behind([API], [ADMIN])

    def status(path: str, *headers: tuple[str, str]) -> int:
        return client.post(path, headers=list(headers)).status_code

    messages, admin = "/v1/messages", "/admin/instances"
    assert status(messages, ("X-Api-Key", API)) == 299
    assert status(admin, ("X-Api-Key", API)) == 403
    assert status(admin, ("X-Api-Key", ADMIN)) == 299
    for wrong in ("wrong", "", f"Bearer {API}"):
        assert status(messages, ("X-Api-Key", wrong)) == 401
    assert status(messages, ("X-Api-Key", API), ("X-Api-Key", API)) == 401
    assert status(messages, ("X-Api-Key", "wrong"), ("Authorization", f"Bearer {API}")) == 299
    assert status(messages, ("X-Api-Key", API), ("Authorization", "Bearer wrong")) == 401
    assert status(messages, ("X-Api-Key", API), *[("Authorization", f"Bearer {API}")] * 2) == 401


def test_websockets_ask_for_the_key(app: FastAPI) -> None:
    """A websocket without a key is not accepted: its handshake is refused."""
    client = behind([API], [])
    sockets = [route.path for route in app.routes if isinstance(route, WebSocketRoute)]
    assert sockets
    for path in sockets:
        with pytest.raises((WebSocketDisconnect, WebSocketDenialResponse)) as refused, client.websocket_connect(path):
            pass
        assert getattr(refused.value, "code", 403) in {403, 1008}
        with client.websocket_connect(path, headers=bearer(API)):
            pass


def test_what_changes_the_service_asks_for_the_admin_key(app: FastAPI) -> None:
    """
    With a separate admin key, the API key opens only inference, and the refusal says what is missing; the admin key
    opens everything.
    """
    client = behind([API], [ADMIN])
    there = {route.path for route in app.routes}
    assert not {path for path in CHANGES_THE_SERVICE if path not in there}
    closed = set()
    for method, path in routes_of(app):
        if path in IMPOSSIBLE:
            continue
        assert client.request(method, path, headers=bearer(ADMIN)).status_code == 299, (method, path)
        status = client.request(method, path, headers=bearer(API)).status_code
        assert status == (403 if access_of(path) is Access.ADMIN else 299), (method, path)
        if status == 403:
            closed.add(path)
    assert {re.sub(r"\{[^}]*\}", "x", path) for path in CHANGES_THE_SERVICE} <= closed


def test_an_admin_key_alone_leaves_inference_open() -> None:
    """Clients need no key, since none is set for them; routes that change the service ask for the admin key."""
    client = behind([], [ADMIN])
    assert client.post("/v1/completions").status_code == 299
    assert client.get("/admin/instances").status_code == 401
    assert client.get("/admin/instances", headers=bearer(ADMIN)).status_code == 299


def test_without_keys_everything_is_open() -> None:
    """As with vLLM, which listens on the loopback by default."""
    assert behind([], []).get("/admin/instances").status_code == 299


@pytest.mark.parametrize(
    "path",
    [
        "/made_up_by_a_later_version",
        "/v1/made_up",
        "/health/../admin/instances",
        "/healthy",
        "/health/",
        "/health/x",
        "//health",
        "/HEALTH",
        "/ping/",
        "/metrics/../v1/models",
        "/metricsx",
        "/%2e%2e/health",
        "/v1/models/../../admin/instances",
        "/v1/chat/completions/x",
        "",
        "*",
    ],
)
def test_unknown_routes_and_tricks_are_closed(path: str) -> None:
    """Whatever is not listed is an admin route, however it is spelled."""
    assert access_of(path) is Access.ADMIN


def test_a_prefix_is_no_way_around() -> None:
    """Under a mount prefix, the routes below it count; the prefix itself opens nothing."""
    client = behind([API], [], root_path="/health")
    assert client.get("/health/admin/instances").status_code == 401
    assert client.get("/health/health").status_code == 299
    assert behind([API], [], root_path="/svc").get("/svc/health").status_code == 299
    assert behind([API], [], root_path="/svc").get("/svc/v1/models").status_code == 401


def test_preflights_need_no_key_and_open_nothing() -> None:
    """A browser's preflight is answered; any other OPTIONS request asks for the key."""
    client = behind([API], [])
    asks = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    assert client.options("/v1/completions", headers=asks).status_code == 299
    assert client.options("/v1/completions").status_code == 401
    assert client.options("/v1/completions", headers={**asks, "X-Request-Id": "a b"}).status_code == 400


def test_the_refusal_is_an_openai_error() -> None:
    """Its message is for the client; the header says how to authenticate."""
    refused = behind([API], []).get("/v1/models")
    assert refused.headers["www-authenticate"] == "Bearer"
    assert refused.json()["error"] == {"message": "Unauthorized", "type": "Unauthorized", "param": None, "code": 401}
    impossible = behind([], []).post("/scale_elastic_ep")
    assert impossible.status_code == 501
    assert "/admin/instances" in impossible.json()["error"]["message"]


@pytest.mark.parametrize("value", ["x" * 129, "", "a b", 'a"b', "a{b}", "$(reboot)", "a\tb", "é"])
def test_odd_request_ids_are_refused(value: str) -> None:
    """Because request ids go into logs and metrics."""
    answer = behind([], []).get("/v1/models", headers={"X-Request-Id": value.encode()})
    assert answer.status_code == 400
    assert "X-Request-Id" in answer.json()["error"]["message"]


def test_usual_request_ids_pass() -> None:
    """UUIDs, trace ids and the like pass; two ids in one request do not."""
    client = behind([], [])
    for value in ("4bf92f35-77b3-4da6-a3ce-929d0e0e4736", "x" * 128, "req_01:abc/def+g=", "a.b@c"):
        assert client.get("/v1/models", headers={"X-Request-Id": value}).status_code == 299
    assert client.get("/v1/models", headers=[("X-Request-Id", "a"), ("X-Request-Id", "b")]).status_code == 400


def test_inference_patterns_are_needed(app: FastAPI) -> None:
    """Each pattern matches a route of this vLLM, or a route for a kind of model that it can serve."""
    paths = {path for _, path in routes_of(app)} | {r.path for r in app.routes if isinstance(r, WebSocketRoute)}
    unused = [pattern for pattern in INFERENCE if not any(re.fullmatch(pattern, path) for path in paths)]
    assert unused == [r"/cohere/v2/chat(/render)?"], "Cohere's needs a package of theirs"

"""
vLLM's OpenAI server on our engine client, with our own start and stop.

SIGTERM drains: the listening socket closes, running requests finish, then the server ends and the caller stops the
instances. A second signal, or the drain time-out, ends it at once.
"""

import asyncio
import contextlib
import logging
import os
import re
import socket
from argparse import Namespace
from collections.abc import Iterator, MutableSequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, make_asgi_app, values
from prometheus_client.multiprocess import MultiProcessCollector
from starlette.routing import Mount
from starlette.types import ASGIApp
from vllm import envs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.launcher import NoSignalServer
from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config
from vllm.entrypoints.launchers.utils.ssl import SSLCertRefresher
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager

from cascadeinfer.frontend.admin import Admin, OwnRuntime, attach_admin_routes
from cascadeinfer.frontend.contents.bodies import Bodies
from cascadeinfer.frontend.contents.limits import ContentLimits
from cascadeinfer.frontend.door.settings import DoorSettings, without_keys
from cascadeinfer.frontend.engine_client import CascadeLLM
from cascadeinfer.frontend.listening import url_of
from cascadeinfer.frontend.page.routes import Served, attach_page
from cascadeinfer.frontend.placement import PlacementHeaders
from cascadeinfer.frontend.refusal_log import log_refusals_in_one_line
from cascadeinfer.frontend.refusals import Refusals
from cascadeinfer.frontend.start_report import ready_lines
from cascadeinfer.frontend.stop_signals import StopSignals
from cascadeinfer.runtime.shell import Runtime

logger = logging.getLogger(__name__)

STARTED_POLL_S = 0.05


def import_parser_plugins(args: Namespace) -> None:
    """Import the operator's own tool and reasoning parsers, so that options can name them."""
    if args.tool_parser_plugin:
        ToolParserManager.import_tool_parser(args.tool_parser_plugin)
    if args.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)


@contextlib.contextmanager
def shared_metrics(folder: Path) -> Iterator[None]:
    """
    In this context, Prometheus metrics of this process and of those it starts are kept in files that all of them read.

    Args:
        folder: Created here; removed with the server's own folder.
    """
    folder.mkdir(mode=0o700)
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
    # The environment determined the class when the module was imported; metrics look it up when they are created.
    values.ValueClass = values.get_value_class()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        del os.environ["PROMETHEUS_MULTIPROC_DIR"]


@dataclass(frozen=True, slots=True)
class SharedServing:
    """
    What a process needs to serve alongside others.

    Attributes:
        admin: Answers for all processes.
        loads: Shared counts of open connections per process, and this process's index in them.
    """

    admin: Admin
    loads: tuple[MutableSequence[int], int]


@dataclass(frozen=True, slots=True)
class RequestRules:
    """The operator's rules for requests: keys, sizes, permitted contents, and what answers tell of placement."""

    door: DoorSettings
    contents: ContentLimits
    placement_headers: bool = False


async def serve(
    llm: CascadeLLM,
    runtime: Runtime,
    listener: socket.socket,
    args: Namespace,
    signals: StopSignals,
    *,
    drain_timeout_s: float,
    rules: RequestRules,
    policy: str,
    is_first: bool = True,
    shared: SharedServing | None = None,
) -> None:
    """
    Serve until a signal comes and the last request has finished (or the drain time-out has passed).

    Args:
        rules: Who may send which requests.
        policy: Its name, for the operator's page and the lines that say that the server is ready.
        is_first: Whether this process says those lines; another one says them for all.
        shared: Given when several processes serve.
    """
    supported_tasks = await llm.get_supported_tasks()
    app = build_app(without_keys(args), supported_tasks, llm.model_config)
    await init_app_state(llm, app.state, args, supported_tasks)
    admin = OwnRuntime(runtime) if shared is None else shared.admin
    attach_admin_routes(app, runtime, admin, drain_timeout_s=drain_timeout_s)
    served = Served(", ".join(args.served_model_name or [args.model]), policy, llm.model_config.max_model_len)
    attach_page(app, admin, served, is_ending=lambda: app.state.server.should_exit)
    if shared is not None:
        _show_metrics_of_all(app, runtime)
    # Around the whole app: vLLM has built its stack of middleware already.
    llm.content_limits = rules.contents
    log_refusals_in_one_line()
    answers: ASGIApp = Refusals(app)
    if rules.placement_headers:
        answers = PlacementHeaders(answers)
    inner = Bodies(answers, rules.contents)
    config = _uvicorn_config(rules.door.around(inner, args), args, drain_timeout_s, rules.door.protocol(args))
    server = NoSignalServer(config, shared and shared.loads)
    app.state.server = server
    signals.drain(server)
    saying = asyncio.ensure_future(_say_ready(server, args, listener, policy, runtime)) if is_first else None
    try:
        with _refreshed_certificates(config, watched=args.enable_ssl_refresh):
            await server.serve(sockets=[listener])
    finally:
        if saying is not None:
            saying.cancel()
            await asyncio.wait([saying])


async def _say_ready(
    server: uvicorn.Server, args: Namespace, listener: socket.socket, policy: str, runtime: Runtime
) -> None:
    """Say where the server is and what it serves, once it accepts connections."""
    url = url_of(args, listener)
    while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(STARTED_POLL_S)
    model = (args.served_model_name or [args.model])[0]
    for line in ready_lines(url, model, policy, runtime.fleet.layout, len(runtime.live_engines())):
        logger.info("%s", line)


@contextlib.contextmanager
def _refreshed_certificates(config: uvicorn.Config, *, watched: bool) -> Iterator[None]:
    """In this context, certificates whose files change are loaded anew, for connections from then on."""
    if not watched:
        yield
        return
    config.load()  # makes the context that the server will use
    refresher = SSLCertRefresher(config.ssl, config.ssl_keyfile, config.ssl_certfile, config.ssl_ca_certs)
    try:
        yield
    finally:
        refresher.stop()


def _show_metrics_of_all(app: FastAPI, runtime: Runtime) -> None:
    """`/metrics`: counters of all processes from their shared files, our gauges as this process sees them."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    registry.register(runtime.metrics)
    route = Mount("/metrics", make_asgi_app(registry=registry))
    route.path_regex = re.compile("^/metrics(?P<path>.*)$")  # else /metrics is redirected to /metrics/
    app.routes.insert(0, route)


def _uvicorn_config(app: Any, args: Namespace, drain_timeout_s: float, protocol: Any) -> uvicorn.Config:
    log_config = get_uvicorn_log_config(args)
    optional = {} if log_config is None else {"log_config": log_config}
    return uvicorn.Config(
        app,
        http=protocol,
        host=args.host,
        port=args.port,
        log_level=args.uvicorn_log_level,
        access_log=not args.disable_uvicorn_access_log,
        timeout_keep_alive=envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
        timeout_graceful_shutdown=int(drain_timeout_s),
        ssl_keyfile=args.ssl_keyfile,
        ssl_certfile=args.ssl_certfile,
        ssl_ca_certs=args.ssl_ca_certs,
        ssl_cert_reqs=args.ssl_cert_reqs,
        ssl_ciphers=args.ssl_ciphers,
        **optional,
    )

"""
vLLM's OpenAI server on our engine client, with our own start and stop.

SIGTERM drains: the listening socket closes, running requests finish, then the server ends and the caller stops the instances. A second
signal, or the drain time-out, ends it at once.
"""

import asyncio
import contextlib
import logging
import signal
import socket
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import uvicorn
from vllm import envs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.launcher import NoSignalServer
from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config

from cascadeinfer.core.errors import ConfigError
from cascadeinfer.frontend.admin import attach_admin_routes
from cascadeinfer.frontend.engine_client import CascadeLLM
from cascadeinfer.runtime.shell import Runtime

logger = logging.getLogger(__name__)


def bind(host: str, port: int) -> socket.socket:
    """
    Bind the listening socket, before any instance is started.

    Raises:
        ConfigError: The address is in use or cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror}", option="--port", fix="choose another port or host"
        ) from error
    return listener


async def serve(
    llm: CascadeLLM, runtime: Runtime, listener: socket.socket, args: Namespace, drain_timeout_s: float
) -> None:
    """Serve until a signal comes and the last request has finished (or the drain time-out has passed)."""
    supported_tasks = await llm.get_supported_tasks()
    app = build_app(args, supported_tasks, llm.model_config)
    await init_app_state(llm, app.state, args, supported_tasks)
    attach_admin_routes(app, runtime, args)
    server = NoSignalServer(_uvicorn_config(app, args, drain_timeout_s))
    app.state.server = server
    with _signals_to(server):
        await server.serve(sockets=[listener])


def _uvicorn_config(app: Any, args: Namespace, drain_timeout_s: float) -> uvicorn.Config:
    log_config = get_uvicorn_log_config(args)
    optional = {} if log_config is None else {"log_config": log_config}
    config = uvicorn.Config(
        app,
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
    if args.h11_max_incomplete_event_size is not None:
        config.h11_max_incomplete_event_size = args.h11_max_incomplete_event_size
    return config


@contextlib.contextmanager
def _signals_to(server: uvicorn.Server) -> Iterator[None]:
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if server.should_exit:
            logger.warning("second signal: stopping at once")
            server.force_exit = True
        else:
            logger.info("draining: no new requests, running ones finish")
            server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)

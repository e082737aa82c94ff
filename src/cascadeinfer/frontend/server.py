"""
vLLM's OpenAI server on our engine client, with our own start and stop.

SIGTERM drains: the listening socket closes, running requests finish, then the server ends and the caller stops the instances. A second
signal, or the drain time-out, ends it at once.
"""

import asyncio
import logging
import signal
import socket
from argparse import Namespace
from typing import Any, Self

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
    if not 0 <= port <= 65535:
        raise ConfigError(f"{port} is not a TCP port", option="--port", fix="choose one from 1 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror}",
            option="--host, --port",
            fix="choose another port or host",
        ) from error
    return listener


class StopSignals:
    """
    SIGINT and SIGTERM from the first moment on.

    Before the server serves, a signal cancels the start. While it serves, the first one drains and the second stops at once.
    """

    def __init__(self) -> None:
        """Nothing is installed yet."""
        self._server: uvicorn.Server | None = None
        self._starting: asyncio.Task[Any] | None = None

    def __enter__(self) -> Self:
        """Take the signals over, in the event loop of the task that starts the server."""
        self._starting = asyncio.current_task()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        """Give them back."""
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().remove_signal_handler(number)

    def drain(self, server: uvicorn.Server) -> None:
        """From now on a signal drains this server."""
        self._server = server

    def _on_signal(self) -> None:
        if self._server is None:
            logger.warning("stopped while starting")
            assert self._starting is not None
            self._starting.cancel()
        elif self._server.should_exit:
            logger.warning("second signal: stopping at once")
            self._server.force_exit = True
        else:
            logger.warning("draining: no new requests, running ones finish")
            self._server.should_exit = True


async def serve(
    llm: CascadeLLM,
    runtime: Runtime,
    listener: socket.socket,
    args: Namespace,
    signals: StopSignals,
    *,
    drain_timeout_s: float,
) -> None:
    """Serve until a signal comes and the last request has finished (or the drain time-out has passed)."""
    supported_tasks = await llm.get_supported_tasks()
    app = build_app(args, supported_tasks, llm.model_config)
    await init_app_state(llm, app.state, args, supported_tasks)
    attach_admin_routes(app, runtime, args, drain_timeout_s=drain_timeout_s)
    server = NoSignalServer(_uvicorn_config(app, args, drain_timeout_s))
    app.state.server = server
    signals.drain(server)
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

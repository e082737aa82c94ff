"""What a server needs before any engine starts: the listening socket, its TLS files, and enough file descriptors."""

import asyncio
import contextlib
import errno
import logging
import resource
import socket
import ssl
import stat
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

from uvicorn.config import SSL_PROTOCOL_VERSION, create_ssl_context

from cascadeinfer.core.errors import ConfigError

logger = logging.getLogger(__name__)

OPEN_FILES: Final = 65535
"""The soft limit on open files that vLLM's server asks for; a connection is one, and so are the engines' sockets."""
LET_GO_S: Final = 10.0
LET_GO_POLL_S: Final = 0.05
TLS_FILES: Final = ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs")


@contextlib.contextmanager
def listening(host: str, port: int, uds: str | None, at_leave: list[Callable[[], None]]) -> Iterator[socket.socket]:
    """
    The listening socket, bound before any instance is started; closed at the end.

    Args:
        host: Address to bind.
        port: TCP port.
        uds: Path of a Unix domain socket to bind in place of address and port, or None.
        at_leave: Gets what removes the socket's file when the process leaves without unwinding.

    Raises:
        ConfigError: The address is in use or cannot be bound.
    """
    if uds is None:
        with contextlib.closing(bind(host, port)) as listener:
            yield listener
        return
    path = Path(uds)
    listener = _bind_path(path)
    own = path.stat()
    remove = partial(_remove_own, path, (own.st_dev, own.st_ino))
    at_leave.append(remove)
    with contextlib.closing(listener):
        try:
            yield listener
        finally:
            remove()


async def until_let_go(host: str, port: int, uds: str | None) -> None:
    """
    Wait while the address is in use, for `LET_GO_S` at most.

    The other front-end processes of a server that was killed end a moment after it, and listen until then.
    """
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + LET_GO_S
    while loop.time() < deadline_s:
        try:
            with listening(host, port, uds, []):
                return
        except ConfigError as error:
            if not isinstance(error.__cause__, OSError) or error.__cause__.errno != errno.EADDRINUSE:
                return  # whoever binds it says why not
        await asyncio.sleep(LET_GO_POLL_S)


def bind(host: str, port: int) -> socket.socket:
    """
    Bind the TCP socket.

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


def _bind_path(path: Path) -> socket.socket:
    if _is_stale(path):
        path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {path}: {error.strerror or error}", option="--uds", fix="choose another path"
        ) from error
    return listener


def _is_stale(path: Path) -> bool:
    """Whether a socket is there on which nobody listens: what a killed server has left behind."""
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.connect(str(path))
    except OSError as error:
        return error.errno == errno.ECONNREFUSED
    return False


def _remove_own(path: Path, identity: tuple[int, int]) -> None:
    """Remove our socket's file, unless another server's is there by now."""
    with contextlib.suppress(FileNotFoundError):
        found = path.stat()
        if (found.st_dev, found.st_ino) == identity:
            path.unlink()


def check_tls(args: Namespace) -> None:
    """
    Check the TLS options by making a context, as the server will.

    Raises:
        ConfigError: A file is missing or unreadable, key and certificate do not fit, or a value is unknown.
    """
    for name in TLS_FILES:
        if (file := getattr(args, name)) is not None:
            _check_readable(Path(file), "--" + name.replace("_", "-"))
    if args.enable_ssl_refresh and not (args.ssl_keyfile and args.ssl_certfile):
        raise ConfigError(
            "has no certificate to watch", option="--enable-ssl-refresh", fix="add --ssl-certfile and --ssl-keyfile"
        )
    if args.ssl_certfile is None:
        given = [name for name in ("ssl_keyfile", "ssl_ca_certs", "ssl_ciphers") if getattr(args, name) is not None]
        if given:
            flag = "--" + given[0].replace("_", "-")
            raise ConfigError("has no effect without a certificate", option=flag, fix="add --ssl-certfile")
        return
    try:
        create_ssl_context(
            certfile=args.ssl_certfile,
            keyfile=args.ssl_keyfile,
            password=None,
            ssl_version=SSL_PROTOCOL_VERSION,
            cert_reqs=args.ssl_cert_reqs,
            ca_certs=args.ssl_ca_certs,
            ciphers=args.ssl_ciphers,
        )
    except (ssl.SSLError, OSError, ValueError) as error:
        raise ConfigError(
            f"TLS cannot be set up: {error}", option="--ssl-certfile", fix="check the --ssl-* options"
        ) from error


def _check_readable(path: Path, flag: str) -> None:
    try:
        with path.open("rb"):
            return
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", option=flag) from error


def raise_open_files_limit(max_connections: int) -> None:
    """Raise the soft limit on open files of this process as far as it may; warn if connections may not fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    wanted = OPEN_FILES if hard == unlimited else min(OPEN_FILES, hard)
    if soft not in {unlimited, wanted} and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    if soft != unlimited and soft <= max_connections:
        logger.warning(
            "at most %s open files: fewer than --max-connections %s (raise the hard limit, e.g. `ulimit -Hn`)",
            soft,
            max_connections,
        )


def url_of(args: Namespace, listener: socket.socket) -> str:
    """Where clients find the server, such as `http://127.0.0.1:8000` or `unix:/run/cascade.sock`."""
    if args.uds is not None:
        return f"unix:{args.uds}"
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"http{'s' if args.ssl_certfile else ''}://{shown}:{port}{(args.root_path or '').rstrip('/')}"

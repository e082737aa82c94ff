"""
`cascadeinfer top URL`: the operator's page of a running server in a terminal.

It reads the same server-sent events as the page (`frontend/page`), one picture a second, until Ctrl-C, which is its
ordinary end (exit code 0).
"""

import contextlib
import http.client
import json
import os
from collections.abc import Iterator
from http import HTTPStatus
from typing import Annotated, Any, Final
from urllib.parse import SplitResult, urlsplit

import typer

from cascadeinfer.core.errors import ConfigError

KEY_VARIABLE: Final = "CASCADEINFER_ADMIN_API_KEY"
EVENTS: Final = "/admin/events"
SILENT_S: Final = 15.0
"""A server sends a picture each second, and a sentence when it cannot make one for 10 s."""


def register(app: typer.Typer, name: str, help_text: str) -> None:
    """Add the command."""
    app.command(name, help=help_text)(top)


def top(
    url: Annotated[str, typer.Argument(help="The server, e.g. http://127.0.0.1:8000.")],
    *,
    admin_api_key: Annotated[
        str | None,
        typer.Option(help=f"The server's admin key. Better set in the environment ({KEY_VARIABLE})."),
    ] = None,
    once: Annotated[
        bool, typer.Option("--once", help="Print one picture and end, as when the output is no terminal.")
    ] = False,
) -> None:
    """Watch a running server: instances, the lengths of their requests, moves. Ctrl-C ends it."""
    from rich.console import Console
    from rich.live import Live

    from cascadeinfer.cli.top_view import render

    console = Console()
    with contextlib.suppress(KeyboardInterrupt):
        pictures = _pictures(_parsed(url), admin_api_key or os.environ.get(KEY_VARIABLE))
        before = next(pictures)
        if once or not console.is_terminal:
            console.print(render(before, None, console.width))
            return
        with Live(render(before, None, console.width, console.height), console=console, screen=True) as live:
            for picture in pictures:
                live.update(render(picture, before, console.width, console.height), refresh=True)
                before = picture


def _parsed(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises where it is no number
    except ValueError as error:
        raise ConfigError(f"{url!r} is not an address: {error}", option="URL") from error
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ConfigError(f"{url!r} is not an address", option="URL", fix="for example http://127.0.0.1:8000")
    return parts


def _pictures(server: SplitResult, key: str | None) -> Iterator[dict[str, Any]]:
    """
    The server's pictures, until it ends.

    Raises:
        ConfigError: It cannot be reached, refuses the key, is none of ours, or says no more.
    """
    where = f"{server.scheme}://{server.netloc}{server.path.rstrip('/')}"
    make = http.client.HTTPSConnection if server.scheme == "https" else http.client.HTTPConnection
    assert server.hostname is not None
    connection = make(server.hostname, server.port, timeout=SILENT_S)
    try:
        headers = {"Accept": "text/event-stream"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
        connection.request("GET", server.path.rstrip("/") + EVENTS, headers=headers)
        answer = connection.getresponse()
        if answer.status != HTTPStatus.OK:
            raise _refusal(where, answer, key)
        yield from _events(answer, where)
    except TimeoutError as error:
        raise ConfigError(f"{where} has said nothing for {SILENT_S:g} s") from error
    except (OSError, http.client.HTTPException) as error:
        raise ConfigError(f"{where} cannot be reached: {getattr(error, 'strerror', None) or error}") from error
    finally:
        connection.close()


def _refusal(where: str, answer: http.client.HTTPResponse, key: str | None) -> ConfigError:
    fix = f"--admin-api-key, or {KEY_VARIABLE} in the environment"
    match answer.status:
        case HTTPStatus.UNAUTHORIZED if key is None:
            return ConfigError(f"{where} asks for its admin key", fix=fix)
        case HTTPStatus.UNAUTHORIZED:
            return ConfigError(f"{where} does not know this key", fix=fix)
        case HTTPStatus.FORBIDDEN:
            return ConfigError(f"{where} knows this key, but not as its admin key", fix=fix)
        case HTTPStatus.NOT_FOUND:
            return ConfigError(f"{where} has no {EVENTS}: it is another server, or an older version")
        case HTTPStatus.SERVICE_UNAVAILABLE:
            return ConfigError(f"{where} has too many viewers; try again later")
        case _:
            return ConfigError(f"{where} answers {answer.status} {answer.reason}")


def _events(answer: http.client.HTTPResponse, where: str) -> Iterator[dict[str, Any]]:
    kind = "picture"
    for line in answer:
        name, _, value = line.decode().rstrip("\r\n").partition(": ")
        match name, kind:
            case "event", _:
                kind = value
            case "data", "picture":
                yield json.loads(value)
            case "data", "ending":
                raise ConfigError(f"{where} drains: it takes no more requests")
            case "data", _:
                raise ConfigError(f"{where}: {json.loads(value)['message']}")
            case _:
                kind = "picture"  # the empty line after an event
    raise ConfigError(f"{where} has ended the connection")

"""
`cascadeinfer top URL`: the operator's page of a running server in a terminal.

It reads the same server-sent events as the page (`frontend/page`), one picture a second, until Ctrl-C, which is its
ordinary end (exit code 0).
"""

import contextlib
import http.client
import json
from collections.abc import Iterator
from typing import Annotated, Any, Final

import typer

from cascadeinfer.cli.admin_calls import KEY_HELP, AdminCalls, parsed_url
from cascadeinfer.core.errors import ConfigError

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
        typer.Option(help=KEY_HELP),
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
        pictures = _pictures(AdminCalls(parsed_url(url, "URL"), admin_api_key))
        before = next(pictures)
        if once or not console.is_terminal:
            console.print(render(before, None, console.width))
            return
        with Live(render(before, None, console.width, console.height), console=console, screen=True) as live:
            for picture in pictures:
                live.update(render(picture, before, console.width, console.height), refresh=True)
                before = picture


def _pictures(server: AdminCalls) -> Iterator[dict[str, Any]]:
    """
    The server's pictures, until it ends.

    Raises:
        ConfigError: It cannot be reached, refuses the key, is none of ours, or says no more.
    """
    with server.answer("GET", EVENTS, SILENT_S, accept="text/event-stream") as answer:
        yield from _events(answer, server.where)


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

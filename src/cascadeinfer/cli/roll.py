"""
`cascadeinfer roll [engine options]`: replace the instances of a running server by others, one by one.

The server checks the options and does the work (`/admin/roll`); this command tells how far it is. All words that are
not its own options go to the server. It ends with 0 once all instances are replaced, with 2 if the server refused the
options and nothing was touched, with 1 if the update stopped in the middle.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Annotated, Any, Final

import typer

from cascadeinfer.cli.admin_calls import KEY_HELP, AdminCalls, parsed_url
from cascadeinfer.cli.main import EXIT_FAILURE, complain
from cascadeinfer.core.errors import ConfigError

ROLL: Final = "/admin/roll"
POLL_S: Final = 1.0
CHECK_TIMEOUT_S: Final = 300.0
"""The server makes a configuration, perhaps of a model that it has to find first."""
SHOW_TIMEOUT_S: Final = 30.0
EXIT_INTERRUPTED: Final = 130
OTHER_WORDS: Final = {"allow_extra_args": True, "ignore_unknown_options": True}


def register(app: typer.Typer, name: str, help_text: str) -> None:
    """Add the command."""
    app.command(name, help=help_text, context_settings=OTHER_WORDS)(roll)


def roll(
    context: typer.Context,
    *,
    url: Annotated[str, typer.Option(help="The server.", metavar="URL")] = "http://127.0.0.1:8000",
    timeout_s: Annotated[
        float | None,
        typer.Option(
            help="Seconds that each old instance has to hand its requests over; by default as the server's "
            "--drain-timeout-s. What is left then is computed anew elsewhere, or ends with an error if the model "
            "changes.",
            min=0.0,
            max=86400.0,
        ),
    ] = None,
    admin_api_key: Annotated[str | None, typer.Option(help=KEY_HELP)] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Begin nothing: follow the update that is under way.")] = False,
) -> None:
    """All other words are engine options of vLLM: what changes for the instances. See docs/operating.md."""
    server = AdminCalls(parsed_url(url, "--url"), admin_api_key)
    if watch and context.args:
        raise ConfigError("begins nothing, so it takes no engine options", option="--watch")
    if not watch:
        server.call("POST", ROLL, CHECK_TIMEOUT_S, {"options": context.args, "timeout_s": timeout_s})
    try:
        shown = _followed(server)
    except KeyboardInterrupt:
        typer.echo("the update goes on; --watch follows it again")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if shown["state"] == "failed":
        raise typer.Exit(EXIT_FAILURE)
    if shown["options"]:
        typer.echo(f"from now on, start this server with: {' '.join(shown['options'])}")


def _followed(server: AdminCalls) -> dict[str, Any]:
    """Tell what the server says until the update has ended; its last state."""
    shown: dict[str, Any] = {}
    n_told = 0
    for shown in _states(server):
        for told in shown["lines"][n_told:]:
            typer.echo(f"{told['seconds']:7.1f} s  {told['line']}")
        n_told = len(shown["lines"])
    return shown


def _states(server: AdminCalls) -> Iterator[dict[str, Any]]:
    """Its states, until it has ended."""
    shown = server.call("GET", ROLL, SHOW_TIMEOUT_S)
    if shown["state"] == "none":
        raise ConfigError(f"{server.where} has begun no update since its start", option="--watch")
    while True:
        yield shown
        if shown["state"] != "rolling":
            return
        time.sleep(POLL_S)
        with _lost_in_the_middle(server):
            shown = server.call("GET", ROLL, SHOW_TIMEOUT_S)


@contextlib.contextmanager
def _lost_in_the_middle(server: AdminCalls) -> Iterator[None]:
    """A server that is gone now is no mistake of the operator's."""
    try:
        yield
    except ConfigError as error:
        complain(
            ConfigError(f"the update was under way, and {error}", fix=f"--watch follows it, if {server.where} lives")
        )
        raise typer.Exit(EXIT_FAILURE) from error

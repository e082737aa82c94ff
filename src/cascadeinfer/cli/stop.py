"""
`cascadeinfer stop NAME`: end a fleet, its engines and the server that uses it.

The server is told first, and may finish its running requests; a second server that stands by is told when it takes
over.
"""

import asyncio
import contextlib
import os
import signal
import time
from typing import Annotated, Final

import typer

from cascadeinfer.cluster.fleet import Fleet, folder_of, names, user_of
from cascadeinfer.cluster.local_keepers import LocalKeepers
from cascadeinfer.core.errors import ConfigError

POLL_S: Final = 0.1
ENGINE_TIMEOUT_S: Final = 5.0


def register(app: typer.Typer, name: str, help_text: str) -> None:
    """Add the command."""
    app.command(name, help=help_text)(stop)


def stop(
    fleet: Annotated[str, typer.Argument(help="The fleet's name, as given with --fleet.", metavar="NAME")],
    *,
    timeout_s: Annotated[
        float, typer.Option(help="Seconds that its server may take to finish its requests.", min=0.0)
    ] = 600.0,
) -> None:
    """End a fleet: the server that uses it, once its requests have finished, and its engines."""
    if not folder_of(fleet).exists():
        there = f"there are: {', '.join(names())}" if names() else "there is none"
        raise ConfigError(f"there is no fleet {fleet}", option="NAME", fix=there)
    taken = _once_free(fleet, timeout_s)
    n_engines = asyncio.run(_end_engines(taken))
    taken.remove()
    typer.echo(f"fleet {fleet} has ended: {n_engines} engine{'s' if n_engines != 1 else ''} stopped")


def _once_free(name: str, timeout_s: float) -> Fleet:
    """Take the fleet from whoever uses it."""
    deadline_s, told = time.monotonic() + timeout_s, set[int]()
    while True:
        try:
            return Fleet.take(name)
        except ConfigError:
            user = user_of(name)
            if time.monotonic() > deadline_s:
                raise
        if user is not None and user not in told:
            told.add(user)
            typer.echo(f"the server with process id {user} is told to end")
            with contextlib.suppress(ProcessLookupError):
                os.kill(user, signal.SIGTERM)
        time.sleep(POLL_S)


async def _end_engines(fleet: Fleet) -> int:
    keepers = LocalKeepers(fleet.path)
    found = await keepers.find()
    await asyncio.gather(*(keepers.stop(instance_id, ENGINE_TIMEOUT_S) for instance_id in found))
    return len(found)

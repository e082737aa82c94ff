"""
`cascadeinfer stop NAME`: end a fleet, its engines and the server that uses it, here or on a Ray cluster.

The server is told first, and may finish its running requests; a second server that stands by is told when it takes
over.
"""

import asyncio
import contextlib
import enum
import os
import signal
import time
from typing import Annotated, Final

import typer

from cascadeinfer.cli.extras import need
from cascadeinfer.cluster.fleet import Fleet, folder_of, names, user_of
from cascadeinfer.cluster.keeping import Keepers
from cascadeinfer.cluster.local_keepers import LocalKeepers
from cascadeinfer.cluster.ray_here import found_address
from cascadeinfer.cluster.ray_keepers import RayFleet, RayTerms
from cascadeinfer.core.errors import ConfigError

POLL_S: Final = 0.1
ENGINE_TIMEOUT_S: Final = 5.0


class Cluster(enum.Enum):
    """Where a fleet's engines are."""

    LOCAL = "local"
    RAY = "ray"


def register(app: typer.Typer, name: str, help_text: str) -> None:
    """Add the command."""
    app.command(name, help=help_text)(stop)


def stop(
    fleet: Annotated[str, typer.Argument(help="The fleet's name, as given with --fleet.", metavar="NAME")],
    *,
    timeout_s: Annotated[
        float, typer.Option(help="Seconds that its server may take to finish its requests.", min=0.0)
    ] = 600.0,
    cluster: Annotated[
        Cluster, typer.Option(help="Where its engines are, as given to serve.", case_sensitive=False)
    ] = Cluster.LOCAL,
    ray_address: Annotated[
        str | None, typer.Option(help="With --cluster ray: as given to serve.", metavar="ADDRESS")
    ] = None,
    cluster_host: Annotated[
        str | None, typer.Option(help="With --cluster ray: as given to serve.", metavar="ADDRESS")
    ] = None,
) -> None:
    """End a fleet: the server that uses it, once its requests have finished, and its engines."""
    if cluster is Cluster.RAY:
        need("ray")
        terms = RayTerms(found_address(ray_address), cluster_host)
        _say_ended(fleet, asyncio.run(_stop_on_ray(fleet, terms, timeout_s)))
        return
    if not folder_of(fleet).exists():
        there = f"there are: {', '.join(names())}" if names() else "there is none"
        raise ConfigError(f"there is no fleet {fleet}", option="NAME", fix=there)
    taken = _once_free(fleet, timeout_s)
    n_engines = asyncio.run(_end_engines(taken))
    taken.remove()
    _say_ended(fleet, n_engines)


def stop_on_ray(fleet: str) -> int:
    """
    End a fleet without a server on the Ray cluster that `cascadeinfer cluster up` has started.

    Returns:
        How many engines it had; 0 if there is no such fleet.
    """
    return asyncio.run(_stop_on_ray(fleet, RayTerms(found_address(None), None), 0.0, must_exist=False))


def _say_ended(fleet: str, n_engines: int) -> None:
    typer.echo(f"fleet {fleet} has ended: {n_engines} engine{'s' if n_engines != 1 else ''} stopped")


async def _stop_on_ray(name: str, terms: RayTerms, timeout_s: float, *, must_exist: bool = True) -> int:
    async with RayFleet.used(name, terms, ends_others=True, must_exist=must_exist, timeout_s=timeout_s) as fleet:
        n_engines = await _end_all(fleet.keepers())
        await fleet.remove()
    return n_engines


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
    return await _end_all(LocalKeepers(fleet.path))


async def _end_all(keepers: Keepers) -> int:
    found = await keepers.find()
    await asyncio.gather(*(keepers.stop(instance_id, ENGINE_TIMEOUT_S) for instance_id in found))
    return len(found)

"""The fleet that a server's options name, on this machine or on a Ray cluster."""

import contextlib
import signal
from collections.abc import AsyncIterator

from cascadeinfer.cluster.fleet import Fleet
from cascadeinfer.cluster.fleets import LocalFleet, UsedFleet
from cascadeinfer.cluster.ray_here import found_address, need_ray
from cascadeinfer.cluster.ray_keepers import RayFleet, RayTerms
from cascadeinfer.cluster.ray_messages import Need


@contextlib.asynccontextmanager
async def used_fleet(
    name: str | None, *, wait: bool, on_ray: RayTerms | None = None
) -> AsyncIterator[UsedFleet | None]:
    """
    In this context, this process uses a fleet.

    Args:
        name: Its name; None: the server's engines end with it, and this does nothing.
        wait: Until no other server uses it.
        on_ray: Where its Ray cluster is; None: it is on this machine.

    Raises:
        ConfigError: Another server uses it, or the cluster cannot be reached.
        ModuleNotFoundError: Ray is not installed.
    """
    if name is None:
        yield None
    elif on_ray is None:
        with Fleet.used(name, wait=wait) as here:
            yield LocalFleet(here)
    else:
        # Whoever stops the fleet asks its server to end, which is then like a signal at any moment of its life.
        async with RayFleet.used(
            name, on_ray, wait=wait, asked_to_end=lambda: signal.raise_signal(signal.SIGTERM)
        ) as there:
            yield there


def ray_terms(
    address: str | None, host: str | None, cpus: int, gpus: int, workers: int, others: dict[str, float]
) -> RayTerms:
    """
    Where a server's Ray cluster is and what its instances take there; the arguments are those of the options.

    Raises:
        ModuleNotFoundError: Ray is not installed.
    """
    need_ray()
    return RayTerms(found_address(address), host, Need(cpus, None if gpus < 0 else gpus, workers, others))

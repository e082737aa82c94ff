"""
A fleet that this process uses, wherever its engines are: on this machine (`fleet.py`), or on the nodes of a Ray cluster
(`ray_keepers.py`).
"""

from collections.abc import Callable
from typing import Protocol

from cascadeinfer.cluster.fleet import Fleet, Record
from cascadeinfer.cluster.keeping import Keepers
from cascadeinfer.cluster.local_keepers import LocalKeepers, Rooms


class UsedFleet(Protocol):
    """A fleet, used by this process."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def logs(self) -> str:
        """Where its engines' logs are, in words."""
        ...

    @property
    def is_here(self) -> bool:
        """Whether its engines run on this machine, which the server divides among them."""
        ...

    @property
    def stop_command(self) -> str:
        """What ends the fleet, for the operator."""
        ...

    def keepers(self, places: Callable[[], Rooms]) -> Keepers:
        """
        Its keepers.

        Args:
            places: The cores or devices of this machine, for engines that run here.
        """
        ...

    async def check(self, n_instances: int, model: str) -> list[str]:
        """
        Look whether there is room for more instances.

        Args:
            n_instances: So many more than live.
            model: As the server was told.

        Returns:
            Lines for the operator.

        Raises:
            ConfigError: There is none, or a machine is not fit for them.
        """
        ...

    async def record(self) -> Record | None:
        """What its engines were started with; None for a new fleet. Raises ConfigError if that cannot be read."""
        ...

    async def write(self, record: Record) -> None:
        """Its engines are started with this from now on."""
        ...

    async def key(self) -> str:
        """The secret of its engines and front ends."""
        ...


class LocalFleet:
    """A fleet of this machine. See UsedFleet."""

    is_here = True

    def __init__(self, fleet: Fleet) -> None:
        """
        Args:
            fleet: Taken by this process.
        """
        self._fleet = fleet
        self.name = fleet.name
        self.logs = f"in {fleet.path}/logs"
        self.stop_command = f"cascadeinfer stop {fleet.name}"

    def keepers(self, places: Callable[[], Rooms]) -> LocalKeepers:
        """See UsedFleet."""
        return LocalKeepers(self._fleet.path, places())

    async def check(self, n_instances: int, model: str) -> list[str]:  # noqa: ARG002 - the protocol's
        """See UsedFleet; the places have been dealt out already."""
        return []

    async def record(self) -> Record | None:
        """See UsedFleet."""
        return self._fleet.record()

    async def write(self, record: Record) -> None:
        """See UsedFleet."""
        self._fleet.write(record)

    async def key(self) -> str:
        """See UsedFleet."""
        return self._fleet.key()

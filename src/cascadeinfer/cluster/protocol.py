"""
The protocol of a launcher, which decides where engines run and keeps them running.

A launcher gives an instance a place, starts an engine there and keeps it: it knows whether the engine is alive, ends
it, and lets front ends attach to it. What depends on the kind of place (how far an address reaches, how a process is
killed, whether clocks are shared) stays behind this protocol.

A place holds one engine at a time; each start there is a new life with its own engine id. A front end is a numbered
*client* of the engine, and its successor takes the number over: the client binds two sockets, and the engine connects
to them.

Launchers differ in their further abilities (`Abilities`); check them before relying on one. `cluster/local.py` is the
launcher for processes of this machine; `docs/extending.md` explains how to write another.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from cascadeinfer.core.types import InstanceId

OrderT_contra = TypeVar("OrderT_contra", contravariant=True)
"""What a launcher is asked to start; the engine's side and the launcher agree on its type."""
HelloT = TypeVar("HelloT")
"""What a started engine reports about itself."""


@dataclass(frozen=True, slots=True)
class Place:
    """
    Room for one instance.

    Attributes:
        instance_id: The instance it belongs to.
        node: The machine, by a name unique among machines.
        resources: Its part of the machine: cores or devices in the engine's notation (`0,1`, `0|1`).
        host: The address on which its processes listen for each other and for other instances.
        network_device: The interface that has this address.
    """

    instance_id: InstanceId
    node: str
    resources: str
    host: str
    network_device: str


@dataclass(frozen=True, slots=True)
class ClientAddresses:
    """
    The two sockets that a client binds.

    Attributes:
        input_address: Where the engine receives requests.
        output_address: Where the engine sends its outputs.
    """

    input_address: str
    output_address: str


@dataclass(frozen=True, slots=True)
class Kept(Generic[HelloT]):
    """
    A running engine: everything a client must know of it except the client's own addresses.

    Attributes:
        place: Where it runs.
        pid: Its main process on that node.
        hello: What it reports about itself.
        ready_payload: The engine's ready message, which each client needs.
        config: The engine's own configuration, completed by its start; opaque here.
    """

    place: Place
    pid: int
    hello: HelloT
    ready_payload: bytes = field(repr=False)
    config: Any = field(repr=False)


@dataclass(frozen=True, slots=True)
class Abilities:
    """
    What a launcher can do beyond keeping engines while its own process lives.

    Attributes:
        new_clients: An engine accepts clients that were not named at its start.
        outlives_front_end: Its engines survive the process that started them; `living` finds them again.
    """

    new_clients: bool
    outlives_front_end: bool


class Launcher(Protocol[OrderT_contra, HelloT]):
    """See the module header. All methods are called from one event loop."""

    @property
    def abilities(self) -> Abilities:
        """What it can do."""
        ...

    def place(self, instance_id: InstanceId) -> Place:
        """
        Find room for one more instance.

        Raises:
            ScalingRefusedError: There is none left.
        """
        ...

    def release(self, place: Place) -> None:
        """The instance is gone for good and nothing runs there: free its place."""
        ...

    async def start(self, place: Place, order: OrderT_contra) -> Kept[HelloT]:
        """
        Start an engine and wait until it answers. A caller that stops waiting, or gets an error, must call `stop`.

        Raises:
            EngineError: It did not start, was stopped meanwhile, or one is already running there.
        """
        ...

    def living(self) -> Mapping[InstanceId, Kept[HelloT]]:
        """Engines that have started and have not been stopped; a dead one is listed until it is stopped."""
        ...

    def client_addresses(self, place: Place, client: int) -> ClientAddresses:
        """
        Addresses that a client within reach of this process can bind for the engine at a place.

        Args:
            place: An engine has begun to start there.
            client: The client's number, from 1; number 0 is the process that starts the engine.

        Raises:
            EngineError: The engine has no room for a client of this number.
        """
        ...

    async def attach(self, place: Place, client: int, addresses: ClientAddresses) -> None:
        """
        Have the engine serve a client at these addresses. Idempotent.

        Raises:
            EngineError: It is not running, or cannot serve a client there.
        """
        ...

    async def detach(self, place: Place, client: int) -> None:
        """The client at these addresses is gone. Whoever commands the engine aborts what the client left there."""
        ...

    async def death(self, place: Place) -> str:
        """Wait until the engine started there is gone; returns the reason as far as known."""
        ...

    def kill(self, place: Place) -> None:
        """End the engine's processes at once; harmless when there are none."""
        ...

    async def stop(self, place: Place, timeout_s: float) -> None:
        """
        End the engine, even while it starts, and remove what it leaves on the node. Idempotent, also after a
        cancellation.

        Args:
            place: Where it runs.
            timeout_s: Time to exit by itself before it is killed.
        """
        ...

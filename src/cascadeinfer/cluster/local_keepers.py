"""
Keepers of engines on this machine: processes of their own, found again by a folder each.

    FLEET/instances/ID/         see `keeper.py`; and, of whoever starts it:
        content, key, place     for the engine
    FLEET/logs/ID.log           what the engine and its keeper say; that of the start before is ID.log.old
"""

import asyncio
import contextlib
import logging
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import msgspec

from cascadeinfer.cluster.addresses import EngineAddress, host_and_port
from cascadeinfer.cluster.fleet import INSTANCES
from cascadeinfer.cluster.keeping import (
    CONTENT,
    CONTROL,
    DOOR,
    ENDED,
    KEY,
    PLACE,
    STAGE,
    STARTER_PIPE_VARIABLE,
    TOLD,
    EngineOrder,
    Kill,
    OrderTo,
    PlaceTold,
    Stop,
    Told,
    as_line,
    read_json,
    write_whole,
)
from cascadeinfer.cluster.local import LOOPBACK, LOOPBACK_DEVICE
from cascadeinfer.cluster.process_start import operator_environment
from cascadeinfer.cluster.runtime_folder import instance_environment
from cascadeinfer.core.errors import EngineError
from cascadeinfer.core.types import InstanceId
from cascadeinfer.engines.patience import within

logger = logging.getLogger(__name__)

METRICS_VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"
CONNECT_POLL_S: Final = 0.02
KEEPER_TIMEOUT_S: Final = 60.0
"""For a light process to begin to listen, or to do what it is told, on a busy machine."""
REAP_TIMEOUT_S: Final = 10.0
LOG_TAIL_BYTES: Final = 1 << 16
FAULT: Final = re.compile(r"^(?:\(.*?\) )?(?:[\w.]+\.)?(\w*(?:Error|Exception)): (.+)$")
"""The last line of a traceback, behind vLLM's names of its processes."""


class Where(NamedTuple):
    """
    Where engines listen.

    Attributes:
        host: An address of this machine.
        network_device: The interface that has it.
        sharers: See PlaceTold.
    """

    host: str = LOOPBACK
    network_device: str = LOOPBACK_DEVICE
    sharers: int | None = None


class Rooms(Protocol):
    """The cores or devices of this machine. See `cascadeinfer.cluster.places.Places`."""

    def take(self, instance_id: InstanceId, /) -> str | None:
        """A place for one more instance; None: whoever started this process has arranged that."""
        ...

    def hold(self, instance_id: InstanceId, place: str) -> None:
        """An instance has this place already."""
        ...

    def give_back(self, instance_id: InstanceId) -> None:
        """The instance is gone."""
        ...


class _Link:
    """A connection to one keeper."""

    def __init__(self, instance_id: InstanceId, folder: Path, process: subprocess.Popen[bytes] | None) -> None:
        """
        Args:
            instance_id: The engine's.
            folder: The keeper's.
            process: The keeper, if this process has started it.
        """
        self.instance_id = instance_id
        self.folder = folder
        self.process = process
        self.told = Told("starting")
        self.changed = asyncio.Condition()
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """
        Connect.

        Raises:
            OSError: Nobody listens there.
        """
        reader, self._writer = await asyncio.open_unix_connection(self.folder / CONTROL)
        if line := await reader.readline():
            self.told = TOLD.decode(line)
        self._reading = asyncio.ensure_future(self._read(reader))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError):  # as an end
            while line := await reader.readline():
                await self._become(TOLD.decode(line))
        if self.told.state != "ended":
            await self._become(Told("ended", None, None, self._last_word() or "its keeper ended"))

    async def _become(self, told: Told) -> None:
        async with self.changed:
            self.told = told
            self.changed.notify_all()

    def _last_word(self) -> str | None:
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / ENDED).read_text(encoding="utf-8")
        return None

    def order(self, order: OrderTo) -> None:
        """Tell the keeper to do something; nothing happens if it is gone."""
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(as_line(order))

    def kill_keeper(self) -> None:
        """End the keeper itself, at once. Its engine ends with it."""
        assert self._writer is not None, "it is connected"
        sock = self._writer.get_extra_info("socket")
        pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    async def until(self, is_so: Callable[[Told], bool]) -> Told:
        """Wait until the keeper says something."""
        async with self.changed:
            await self.changed.wait_for(lambda: is_so(self.told))
        return self.told

    async def close(self) -> None:
        """Let go."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
        if self._writer is not None:
            self._writer.close()


class LocalKeepers:
    """See `cascadeinfer.cluster.keeping.Keepers`."""

    def __init__(
        self, folder: Path, places: Rooms | None = None, where: Where | None = None, *, ends_with_us: bool = False
    ) -> None:
        """
        Args:
            folder: The fleet's; it exists, and no other front end starts engines in it.
            places: The cores or devices of this machine; None: nothing is started.
            where: Engines listen; by default on the loopback interface.
            ends_with_us: Whether keepers that are started end with this process.
        """
        self._places = places
        self._where = where or Where()
        self._ends_with_us = ends_with_us
        #: The ends of pipes that keepers watch.
        self._lifelines: list[int] = []
        self._folder = folder / INSTANCES
        self._logs = folder / "logs"
        for each in (self._folder, self._logs):
            each.mkdir(mode=0o700, exist_ok=True)
        self._links: dict[InstanceId, _Link] = {}
        #: Of instances that have a place.
        self._resources: dict[InstanceId, str | None] = {}

    def folder_of(self, instance_id: InstanceId) -> Path:
        """An instance's own."""
        return self._folder / instance_id

    def log_of(self, instance_id: InstanceId) -> Path:
        """What an instance's processes say."""
        return self._logs / f"{instance_id}.log"

    async def find(self) -> list[InstanceId]:
        """See Keepers; what dead ones have left is removed."""
        found = []
        for folder in sorted(self._folder.iterdir()):
            link = _Link(folder.name, folder, None)
            try:
                await link.open()
            except OSError:
                await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
                continue
            if link.told.state == "ended":
                await link.close()
                continue
            self._links[folder.name] = link
            found.append(folder.name)
        return found

    def lives(self, instance_id: InstanceId) -> bool:
        """See Keepers."""
        link = self._links.get(instance_id)
        return link is not None and link.told.state != "ended"

    def place(self, instance_id: InstanceId) -> None:
        """See Keepers."""
        assert self._places is not None, "engines are started"
        if instance_id in self._links:
            told: PlaceTold = read_json(self.folder_of(instance_id) / PLACE, PlaceTold)
            if told.resources is not None:
                self._places.hold(instance_id, told.resources)
            self._resources[instance_id] = told.resources
        else:
            self._resources[instance_id] = self._places.take(instance_id)

    def release(self, instance_id: InstanceId) -> None:
        """See Keepers."""
        assert self._places is not None, "engines are started"
        del self._resources[instance_id]
        self._places.give_back(instance_id)

    async def start(self, instance_id: InstanceId, order: EngineOrder) -> None:
        """See Keepers."""
        if self.lives(instance_id):
            raise EngineError("is kept already", instance_id=instance_id)
        await self.stop(instance_id, 0.0)  # what a dead one has left
        folder = self.folder_of(instance_id)
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        host, device, sharers = self._where
        place = PlaceTold(instance_id, host, device, self._resources[instance_id], sharers)
        link = self._links[instance_id] = _Link(instance_id, folder, self._spawned(folder, order, place))
        await self._listening(link)

    def _spawned(self, folder: Path, order: EngineOrder, place: PlaceTold) -> "subprocess.Popen[bytes]":
        folder.mkdir(mode=0o700)
        for name, content in ((CONTENT, order.content), (KEY, order.key.encode()), (PLACE, msgspec.json.encode(place))):
            write_whole(folder / name, content)
        environment = {**operator_environment(), **order.environment, **instance_environment(folder)}
        environment.pop(METRICS_VARIABLE, None)  # files of the server's processes, which end before the engine
        path = self.log_of(place.instance_id)
        if path.exists():
            path.replace(path.with_suffix(".log.old"))
        lifeline: list[int] = []
        if self._ends_with_us:
            watched, held = os.pipe()
            self._lifelines.append(held)
            lifeline = [watched]
            environment[STARTER_PIPE_VARIABLE] = str(watched)
        try:
            with path.open("xb") as log:
                return subprocess.Popen(  # noqa: S603 - our own interpreter and module
                    [sys.executable, "-m", "cascadeinfer.cluster.keeper", str(folder), order.module],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    pass_fds=lifeline,
                    start_new_session=True,  # signals of our terminal are not for it
                )
        finally:
            for end in lifeline:
                os.close(end)

    async def _listening(self, link: _Link) -> None:
        """Connect to a keeper that has just been started."""
        assert link.process is not None
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + KEEPER_TIMEOUT_S
        while True:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                return await link.open()
            if link.process.poll() is not None or loop.time() > deadline_s:
                raise EngineError(
                    f"has no keeper: {_fault_in(self.log_of(link.instance_id))}", instance_id=link.instance_id
                )
            await asyncio.sleep(CONNECT_POLL_S)

    async def ready(self, instance_id: InstanceId) -> EngineAddress:
        """See Keepers."""
        link = self._link(instance_id)
        told = await link.until(lambda told: told.state != "starting")
        if told.door is None:
            raise EngineError(f"{told.why}: {_fault_in(self.log_of(instance_id))}", instance_id=instance_id)
        return EngineAddress(*host_and_port(told.door, DOOR))

    async def ended(self, instance_id: InstanceId) -> str:
        """See Keepers."""
        told = await self._link(instance_id).until(lambda told: told.state == "ended")
        return told.why or ""

    def _link(self, instance_id: InstanceId) -> _Link:
        if (link := self._links.get(instance_id)) is None:
            raise EngineError("has no keeper", instance_id=instance_id)
        return link

    def kill(self, instance_id: InstanceId) -> None:
        """See Keepers."""
        if (link := self._links.get(instance_id)) is not None:
            link.order(Kill())

    async def stop(self, instance_id: InstanceId, timeout_s: float) -> None:
        """See Keepers."""
        if (link := self._links.get(instance_id)) is None:
            return
        link.order(Stop(timeout_s))
        ending = link.until(lambda told: told.state == "ended")
        try:
            await within(timeout_s + KEEPER_TIMEOUT_S, ending)
        except TimeoutError:
            logger.warning(
                "the keeper of instance %s does not answer: it is killed, and its engine with it", instance_id
            )
            link.kill_keeper()
            await link.until(lambda told: told.state == "ended")
        await link.close()
        if link.process is not None:
            await asyncio.to_thread(link.process.wait, REAP_TIMEOUT_S)
        await asyncio.to_thread(shutil.rmtree, link.folder, ignore_errors=True)
        if self._links.get(instance_id) is link:
            del self._links[instance_id]

    def stage(self, instance_id: InstanceId) -> str | None:
        """See Keepers."""
        with contextlib.suppress(FileNotFoundError):
            return (self.folder_of(instance_id) / STAGE).read_text(encoding="utf-8") or None
        return None

    async def leave(self) -> None:
        """See Keepers."""
        for link in self._links.values():
            await link.close()
        self._links.clear()


def _fault_in(log: Path) -> str:
    """What a log says last of a fault, and where the log is."""
    with log.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - LOG_TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    faults = [match for line in lines if (match := FAULT.match(line.strip())) is not None]
    last = f"{faults[-1][1]}: {faults[-1][2]} " if faults else ""
    return f"{last}(its log: {log})"

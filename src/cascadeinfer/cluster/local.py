"""
The launcher for instances that run on this machine, as child processes of the process that starts them.

Everything specific to one machine stays behind it: loopback addresses, sockets in a private folder, process ids and
signals, shared memory (`shared_memory.py`), the start-up environment (`process_start.py`), cores and devices
(`places.py`), starts one by one on a shared device (`start_turns.py`).

What an engine's processes are is defined by the engine's side (`EngineProcesses`). vLLM's processes learn the addresses
of all their clients at start, accept no others later, and end with the process that started them, so this launcher has
neither of the `Abilities`.
"""

import asyncio
import os
import random
import shutil
import socket
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import psutil

from cascadeinfer.cluster.places import Places
from cascadeinfer.cluster.process_start import ProcessStart
from cascadeinfer.cluster.protocol import Abilities, ClientAddresses, Kept, Place
from cascadeinfer.cluster.runtime_folder import instance_environment, instance_folder
from cascadeinfer.cluster.shared_memory import Segments
from cascadeinfer.cluster.start_turns import StartTurns, Turn
from cascadeinfer.core.errors import EngineError, ScalingRefusedError
from cascadeinfer.core.types import InstanceId

LOOPBACK = "127.0.0.1"
LOOPBACK_DEVICE = "lo"
PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""Of the ports that the system gives to connections: the first and the last."""
PORTS_OF_SERVERS = range(20_000, 32_768)
"""Above those of Ray's workers; below those of connections, as Linux has them by default."""
PORT_TRIES = 50
START_POLL_S = 2.0
REAP_TIMEOUT_S = 5.0

HelloT = TypeVar("HelloT")
HelloT_co = TypeVar("HelloT_co", covariant=True)


def free_port() -> int:
    """
    A TCP port on the loopback that was free a moment ago.

    Where there is one, it is none of those that the system gives to connections by itself: one of these could take it
    before a server that starts slowly has bound it.
    """
    for _ in range(PORT_TRIES):
        port = random.SystemRandom().choice(PORTS_OF_SERVERS)
        if port < _first_port_of_connections() and _is_free(port):
            return port
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _first_port_of_connections() -> int:
    try:
        return int(PORT_RANGE.read_text().split()[0])
    except OSError:
        return 0


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def usable_cores() -> list[int]:
    """Cores of this machine on which this process may run."""
    return sorted(os.sched_getaffinity(0))


def free_memory_bytes() -> int:
    """Main memory of this machine that is free now."""
    return int(psutil.virtual_memory().available)


async def exit_of(process: BaseProcess) -> None:
    """Wait until a process started here has ended."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    watched = os.dup(process.sentinel)
    loop.add_reader(watched, lambda: None if ended.done() else ended.set_result(None))
    try:
        await ended
    finally:
        loop.remove_reader(watched)
        os.close(watched)


class EngineProcesses(Protocol[HelloT_co]):
    """
    The processes of one start of an engine, and its first client. Methods documented as blocking are called in a
    thread.

    Attributes:
        environment: Variables for them, in addition to the launcher's.
        n_clients: How many clients will use it, including the first (number 0).
    """

    environment: Mapping[str, str]
    n_clients: int

    @property
    def processes(self) -> Sequence[BaseProcess]:
        """Processes that have been started and not yet cleaned up; the main one is first."""
        ...

    @property
    def ready_payload(self) -> bytes:
        """See `Kept`; available once started."""
        ...

    @property
    def config(self) -> Any:
        """See `Kept`; available once started."""
        ...

    def start(self, environment: ProcessStart, further_clients: Sequence[ClientAddresses]) -> None:
        """Start the processes in this environment and block until they are ready. Raises after `end`."""
        ...

    async def hello(self) -> HelloT_co:
        """What the engine reports about itself once it is ready."""
        ...

    def end(self, timeout_s: float) -> None:
        """End the processes, even while they start, and block until all have exited or been killed. Idempotent."""
        ...

    def put_away(self) -> None:
        """After they have exited: close what they leave in this process. Runs in the event loop's thread."""
        ...


@dataclass(slots=True)
class _Life(Generic[HelloT]):
    """
    One start at a place.

    Attributes:
        folder: Its sockets and temporary files.
        further_clients: Addresses of the clients from number 1 on, known once the start has begun.
        turn: Its turn to start, where starts on shared devices are one by one.
        creation: The thread that starts it.
        kept: Set once it has started.
        attached: Clients that are attached.
    """

    engine: EngineProcesses[HelloT]
    folder: Path | None = None
    further_clients: tuple[ClientAddresses, ...] = ()
    turn: Turn | None = None
    creation: "asyncio.Future[None] | None" = None
    kept: Kept[HelloT] | None = None
    attached: set[int] = field(default_factory=set)
    segments: Segments = field(default_factory=Segments)


class LocalLauncher(Generic[HelloT]):
    """See `cascadeinfer.cluster.protocol.Launcher`."""

    abilities = Abilities(new_clients=False, outlives_front_end=False)

    def __init__(
        self, places: Places, n_first: int, further_needs_bytes: float = 0.0, turns: StartTurns | None = None
    ) -> None:
        """
        Args:
            places: The cores or devices of this machine.
            n_first: Number of initial instances, which share all of its memory.
            further_needs_bytes: Main memory that must be free for each further instance.
            turns: Makes starts wait for each other where places share devices; None: all start in parallel.
        """
        self._places = places
        self._n_first = n_first
        self._further_needs_bytes = further_needs_bytes
        self._turns = turns
        self._n_placed = 0
        self._node = socket.gethostname()
        self._lives: dict[InstanceId, _Life[HelloT]] = {}

    def place(self, instance_id: InstanceId) -> Place:
        """See Launcher."""
        if self._n_placed >= self._n_first:
            self._check_memory()
        resources = self._places.take(instance_id)
        self._n_placed += 1
        return Place(instance_id, self._node, resources, LOOPBACK, LOOPBACK_DEVICE)

    def _check_memory(self) -> None:
        available = free_memory_bytes()
        if available < self._further_needs_bytes:
            raise ScalingRefusedError(
                f"no memory left: an instance needs {self._further_needs_bytes / 2**30:.1f} GiB for KV blocks alone, "
                f"{available / 2**30:.1f} GiB are free "
                "(drain one, or start the server with a smaller --kv-cache-memory-bytes)"
            )

    def release(self, place: Place) -> None:
        """See Launcher."""
        self._places.give_back(place.instance_id)

    async def start(self, place: Place, order: EngineProcesses[HelloT]) -> Kept[HelloT]:
        """See Launcher; an order is the processes to be started."""
        if place.instance_id in self._lives:
            raise EngineError("runs already", instance_id=place.instance_id)
        life = self._lives[place.instance_id] = _Life(order)
        if self._turns is not None:
            life.turn = self._turns.arrive(place.instance_id, place.resources)
            await self._turns.come(life.turn)
        life.creation = asyncio.ensure_future(asyncio.to_thread(self._create, life))
        try:
            await self._until_created(place, life, life.creation)
            life.kept = self._keep(place, life, await order.hello())
        except Exception as error:
            raise EngineError(f"did not start: {error}", instance_id=place.instance_id) from error
        self._leave(life)
        return life.kept

    def _leave(self, life: _Life[HelloT]) -> None:
        if self._turns is not None and life.turn is not None:
            self._turns.leave(life.turn)

    def _keep(self, place: Place, life: _Life[HelloT], hello: HelloT) -> Kept[HelloT]:
        processes = life.engine.processes
        if self._lives.get(place.instance_id) is not life or not processes:
            raise EngineError("stopped while starting", instance_id=place.instance_id)
        pid = processes[0].pid
        assert pid is not None, "it has been started"
        return Kept(place, pid, hello, life.engine.ready_payload, life.engine.config)

    @staticmethod
    def _create(life: _Life[HelloT]) -> None:
        """
        Start the processes and wait for them; runs in a thread. Ends early with an error if `stop` is called meanwhile.

        The started processes are recorded in the life, not by the waiting caller: the caller may have been cancelled,
        and `stop` must find them.
        """
        folder = life.folder = instance_folder()
        life.further_clients = tuple(
            ClientAddresses(f"ipc://{folder}/{uuid.uuid4()}", f"ipc://{folder}/{uuid.uuid4()}")
            for _ in range(life.engine.n_clients - 1)
        )
        environment = ProcessStart({**life.engine.environment, **instance_environment(folder)})
        life.engine.start(environment, life.further_clients)
        life.segments.remember(life.engine.processes)

    @staticmethod
    async def _until_created(place: Place, life: _Life[HelloT], creation: "asyncio.Future[None]") -> None:
        """
        Wait for the thread that starts the processes.

        vLLM stops watching the process between its last start-up message and first reply; a death there would block it
        until `VLLM_ENGINE_READY_TIMEOUT_S`, ten minutes. The thread stays blocked; we poll.
        """
        was_dead = False
        while not (await asyncio.wait([creation], timeout=START_POLL_S))[0]:
            processes = list(life.engine.processes)
            await asyncio.to_thread(life.segments.remember, processes)
            is_dead = not all(process.is_alive() for process in processes)
            if is_dead and was_dead:
                raise EngineError("its process died while it started", instance_id=place.instance_id)
            was_dead = is_dead
        creation.result()

    def living(self) -> Mapping[InstanceId, Kept[HelloT]]:
        """See Launcher."""
        return {instance_id: life.kept for instance_id, life in self._lives.items() if life.kept is not None}

    def client_addresses(self, place: Place, client: int) -> ClientAddresses:
        """See Launcher: only the addresses named at its start."""
        addresses = self._life(place).further_clients
        if not 1 <= client <= len(addresses):
            raise EngineError(f"was not started for a client {client}", instance_id=place.instance_id)
        return addresses[client - 1]

    async def attach(self, place: Place, client: int, addresses: ClientAddresses) -> None:
        """See Launcher: the engine learned of all its clients at its start."""
        life = self._life(place)
        if life.kept is None:
            raise EngineError("has not started", instance_id=place.instance_id)
        if addresses != self.client_addresses(place, client):
            raise EngineError(f"has a client {client} elsewhere since its start", instance_id=place.instance_id)
        life.attached.add(client)

    async def detach(self, place: Place, client: int) -> None:
        """See Launcher: the engine keeps the addresses, for the client's successor."""
        if (life := self._lives.get(place.instance_id)) is not None:
            life.attached.discard(client)

    async def death(self, place: Place) -> str:
        """See Launcher."""
        processes = list(self._life(place).engine.processes)
        if not processes:
            return "it was ended"
        exits = [asyncio.ensure_future(exit_of(process)) for process in processes]
        try:
            await asyncio.wait(exits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for waiting in exits:
                waiting.cancel()
            await asyncio.gather(*exits, return_exceptions=True)
        return "its process died"

    def kill(self, place: Place) -> None:
        """See Launcher."""
        life = self._lives.get(place.instance_id)
        for process in [] if life is None else list(life.engine.processes):
            process.kill()

    async def stop(self, place: Place, timeout_s: float) -> None:
        """See Launcher."""
        if (life := self._lives.get(place.instance_id)) is None:
            return
        if life.creation is None:
            self._leave(life)  # it waits for its turn
        processes = list(life.engine.processes)
        if life.kept is None:  # else they are known
            await asyncio.to_thread(life.segments.remember, processes)
        await asyncio.to_thread(life.engine.end, timeout_s)
        for process in processes:
            await asyncio.to_thread(process.join, REAP_TIMEOUT_S)  # reap the killed process, or it stays a zombie
        if life.creation is not None:
            await asyncio.wait([life.creation], timeout=REAP_TIMEOUT_S)
            # Retrieve its error: the task that waited for it may have been cancelled.
            life.creation.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        life.engine.put_away()
        await asyncio.to_thread(life.segments.remove)
        if life.folder is not None:
            # Its sockets are no longer used.
            await asyncio.to_thread(shutil.rmtree, life.folder, ignore_errors=True)
        self._leave(life)  # not before: it held memory
        if self._lives.get(place.instance_id) is life:
            del self._lives[place.instance_id]

    def _life(self, place: Place) -> _Life[HelloT]:
        if (life := self._lives.get(place.instance_id)) is None:
            raise EngineError("does not run", instance_id=place.instance_id)
        return life

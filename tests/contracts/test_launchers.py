"""The launcher contract on this machine's launcher and on a scripted one that has every ability of the protocol."""

import asyncio
import multiprocessing
import os
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from launcher_contract import RULES, LauncherBed

from cascadeinfer.cluster.local import LocalLauncher
from cascadeinfer.cluster.places import Places, device_places
from cascadeinfer.cluster.process_start import ProcessStart
from cascadeinfer.cluster.protocol import Abilities, ClientAddresses, Kept, Place
from cascadeinfer.cluster.start_turns import StartTurns
from cascadeinfer.core.errors import EngineError, ScalingRefusedError
from cascadeinfer.core.types import InstanceId

FORK = multiprocessing.get_context("fork")
SLEEP_S = 600.0


class SleepingProcesses:
    """An engine whose process sleeps. See `cascadeinfer.cluster.local.EngineProcesses`."""

    environment: Mapping[str, str] = {"CASCADE_TEST_PLACE": "here"}

    def __init__(self, n_clients: int, *, becomes_ready: bool, may_go_on: threading.Event | None = None) -> None:
        """Set up for this many clients; it starts up to the point where another thread lets it go on."""
        self.n_clients = n_clients
        self.config: Any = {"completed": False}
        self.ready_payload = b""
        self.processes: list[BaseProcess] = []
        self.environment_at_start: dict[str, str] = {}
        self._becomes_ready = becomes_ready
        self._may_go_on = may_go_on
        self._ended = threading.Event()

    def start(self, environment: ProcessStart, further_clients: Sequence[ClientAddresses]) -> None:
        """Fork a process that does nothing."""
        assert len(further_clients) == self.n_clients - 1
        process = FORK.Process(target=time.sleep, args=(SLEEP_S,), daemon=True)
        with environment:
            self.environment_at_start = dict(os.environ)
            process.start()
        self.processes.append(process)
        if not self._becomes_ready:
            self._ended.wait(SLEEP_S)
        if self._may_go_on is not None:
            self._may_go_on.wait(SLEEP_S)
        if self._ended.is_set():
            process.kill()
            raise RuntimeError("stopped while starting")
        self.config, self.ready_payload = {"completed": True}, b"ready"

    async def hello(self) -> Mapping[str, Any]:
        """Its name."""
        return {"engine": "written"}

    def end(self, timeout_s: float) -> None:
        """Kill it; it never exits by itself."""
        assert timeout_s >= 0.0
        self._ended.set()
        for process in self.processes:
            process.kill()
            process.join()

    def put_away(self) -> None:
        """Nothing is left but the list."""
        self.processes.clear()


class LocalBed:
    """The launcher for this machine, with two places."""

    def __init__(self) -> None:
        """Nothing runs."""
        self.launcher: LocalLauncher[Mapping[str, Any]] = LocalLauncher(Places(["0", "1"], [], may_share=False), 2)

    def order(self, *, n_clients: int = 2) -> SleepingProcesses:
        """See LauncherBed."""
        return SleepingProcesses(n_clients, becomes_ready=True)

    def slow_order(self) -> SleepingProcesses:
        """See LauncherBed."""
        return SleepingProcesses(1, becomes_ready=False)

    def elsewhere(self) -> ClientAddresses:
        """See LauncherBed."""
        return ClientAddresses("ipc:///nowhere/in", "ipc:///nowhere/out")


@dataclass(slots=True)
class WrittenOrder:
    """For `WrittenLauncher`."""

    n_clients: int
    ready: bool


@dataclass(slots=True)
class WrittenLife:
    """An engine that exists only as a record."""

    kept: Kept[Mapping[str, Any]] | None = None
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    clients: dict[int, ClientAddresses] = field(default_factory=dict)


class WrittenLauncher:
    """Two imaginary nodes; engines accept clients from anywhere and would outlive this process. See `Launcher`."""

    abilities = Abilities(new_clients=True, outlives_front_end=True)

    def __init__(self) -> None:
        """Nothing runs."""
        self._free = ["node0", "node1"]
        self._lives: dict[InstanceId, WrittenLife] = {}
        self._n_started = 0

    def place(self, instance_id: InstanceId) -> Place:
        """See Launcher."""
        if not self._free:
            raise ScalingRefusedError("both nodes are taken")
        node = self._free.pop(0)
        return Place(instance_id, node, node, f"{node}.example", "eth0")

    def release(self, place: Place) -> None:
        """See Launcher."""
        self._free.append(place.node)

    async def start(self, place: Place, order: WrittenOrder) -> Kept[Mapping[str, Any]]:
        """See Launcher."""
        if place.instance_id in self._lives:
            raise EngineError("runs already", instance_id=place.instance_id)
        life = self._lives[place.instance_id] = WrittenLife()
        if not order.ready:
            await life.gone.wait()
        if life.gone.is_set():
            raise EngineError("stopped while starting", instance_id=place.instance_id)
        self._n_started += 1
        life.kept = Kept(place, self._n_started, {"engine": "written"}, b"ready", {"completed": True})
        return life.kept

    def living(self) -> Mapping[InstanceId, Kept[Mapping[str, Any]]]:
        """See Launcher."""
        return {instance_id: life.kept for instance_id, life in self._lives.items() if life.kept is not None}

    def client_addresses(self, place: Place, client: int) -> ClientAddresses:
        """See Launcher."""
        return ClientAddresses(f"tcp://{place.host}:{1000 + client}", f"tcp://{place.host}:{2000 + client}")

    async def attach(self, place: Place, client: int, addresses: ClientAddresses) -> None:
        """See Launcher."""
        if place.instance_id not in self._lives:
            raise EngineError("does not run", instance_id=place.instance_id)
        self._lives[place.instance_id].clients[client] = addresses

    async def detach(self, place: Place, client: int) -> None:
        """See Launcher."""
        if place.instance_id in self._lives:
            self._lives[place.instance_id].clients.pop(client, None)

    async def death(self, place: Place) -> str:
        """See Launcher."""
        await self._lives[place.instance_id].gone.wait()
        return "it was crossed out"

    def kill(self, place: Place) -> None:
        """See Launcher."""
        if place.instance_id in self._lives:
            self._lives[place.instance_id].gone.set()

    async def stop(self, place: Place, timeout_s: float) -> None:
        """See Launcher."""
        assert timeout_s >= 0.0
        if (life := self._lives.pop(place.instance_id, None)) is not None:
            life.gone.set()


class WrittenBed:
    """The scripted launcher."""

    def __init__(self) -> None:
        """Nothing runs."""
        self.launcher = WrittenLauncher()

    def order(self, *, n_clients: int = 2) -> WrittenOrder:
        """See LauncherBed."""
        return WrittenOrder(n_clients, ready=True)

    def slow_order(self) -> WrittenOrder:
        """See LauncherBed."""
        return WrittenOrder(1, ready=False)

    def elsewhere(self) -> ClientAddresses:
        """See LauncherBed."""
        return ClientAddresses("tcp://elsewhere.example:1", "tcp://elsewhere.example:2")


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which starts on this machine make their own folders."""
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("make_bed", [LocalBed, WrittenBed], ids=["local", "written"])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
async def test_contract(rule: Callable[[LauncherBed], Awaitable[None]], make_bed: Callable[[], LauncherBed]) -> None:
    """A launcher keeps the contract."""
    bed = make_bed()
    try:
        await rule(bed)
    finally:
        for kept in list(bed.launcher.living().values()):
            await bed.launcher.stop(kept.place, 0.0)


def entries_of(folder: Path) -> list[Path]:
    """The folder's entries."""
    return list(folder.iterdir())


async def test_a_start_on_this_machine_leaves_nothing(folders: Path) -> None:
    """
    Its processes have their own variables and a private folder for
    sockets and temporary files, removed with them.
    """
    bed = LocalBed()
    order = bed.order(n_clients=2)
    kept = await bed.launcher.start(bed.launcher.place("a"), order)
    [folder] = entries_of(folders)
    addresses = bed.launcher.client_addresses(kept.place, 1)
    assert addresses.input_address.startswith(f"ipc://{folder}/")
    assert order.environment_at_start["TMPDIR"] == str(folder)
    assert order.environment_at_start["CASCADE_TEST_PLACE"] == "here"
    assert "CASCADE_TEST_PLACE" not in os.environ
    process = order.processes[0]
    await bed.launcher.stop(kept.place, 0.0)
    assert not process.is_alive()
    assert not entries_of(folders)


async def test_a_process_that_dies_while_it_starts_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The start raises, though the thread that waits for readiness does not end."""
    monkeypatch.setattr("cascadeinfer.cluster.local.START_POLL_S", 0.01)
    bed = LocalBed()
    place, order = bed.launcher.place("a"), bed.slow_order()
    start = asyncio.ensure_future(bed.launcher.start(place, order))
    async with asyncio.timeout(60.0):
        while not order.processes:  # noqa: ASYNC110 - a thread fills it
            await asyncio.sleep(0.01)
    bed.launcher.kill(place)
    with pytest.raises(EngineError, match="died while it started"):
        await asyncio.wait_for(start, 60.0)
    await bed.launcher.stop(place, 0.0)


def test_a_further_instance_must_find_its_memory_free() -> None:
    """Initial instances share the memory there is; a later one is refused if too little is left, and takes no place."""
    launcher: LocalLauncher[Any] = LocalLauncher(Places(["0"], ["1"], may_share=False), 1, further_needs_bytes=2.0**60)
    launcher.place("a")
    with pytest.raises(ScalingRefusedError, match="no memory left"):
        launcher.place("b")


async def until_forked(order: SleepingProcesses) -> None:
    """Wait until the start has made its process."""
    async with asyncio.timeout(60.0):
        while not order.processes:  # noqa: ASYNC110 - a thread fills it
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("n_devices", [1, 2])
async def test_starts_on_one_device_are_one_by_one(n_devices: int) -> None:
    """
    Two that share the only device start one after the other, in their order; an added one and a restart wait as well.

    With a device each, both are under way at the same time.
    """
    places = device_places(2, 1, [str(number) for number in range(n_devices)])
    launcher: LocalLauncher[Mapping[str, Any]] = LocalLauncher(places, 2, turns=StartTurns(SLEEP_S))
    go = [threading.Event() for _ in range(4)]
    orders = [SleepingProcesses(1, becomes_ready=True, may_go_on=event) for event in go]
    a, b = launcher.place("a"), launcher.place("b")
    starts = [asyncio.ensure_future(launcher.start(place, order)) for place, order in zip((a, b), orders, strict=False)]
    try:
        await until_forked(orders[0])
        if n_devices == 2:
            await until_forked(orders[1])
            return
        assert not orders[1].processes
        go[0].set()
        await starts[0]
        await until_forked(orders[1])  # its turn came with the end of the first start
        await launcher.stop(a, 0.0)
        starts.append(asyncio.ensure_future(launcher.start(a, orders[2])))  # a restart
        added = launcher.place("c")
        starts.append(asyncio.ensure_future(launcher.start(added, orders[3])))
        await asyncio.sleep(0.05)
        assert not orders[2].processes
        await launcher.stop(a, 0.0)  # while it waits
        with pytest.raises(EngineError, match="stopped while starting"):
            await starts[2]
        assert not orders[3].processes
        await launcher.stop(b, 0.0)  # a start that fails is in the way until nothing of it is left
        go[1].set()
        with pytest.raises(EngineError):
            await starts[1]
        await until_forked(orders[3])
        go[3].set()
        assert (await starts[3]).place == added
    finally:
        for event in go:
            event.set()
        for name in "abc":
            await launcher.stop(Place(name, a.node, "", "", ""), 0.0)
        await asyncio.gather(*starts, return_exceptions=True)


async def test_a_hung_start_does_not_keep_a_restart_waiting_for_ever() -> None:
    """After the limit the other one starts beside it."""
    launcher: LocalLauncher[Mapping[str, Any]] = LocalLauncher(
        device_places(2, 1, ["0"]), 2, turns=StartTurns(limit_s=0.1)
    )
    hung, other = launcher.place("a"), launcher.place("b")
    hanging = asyncio.ensure_future(launcher.start(hung, SleepingProcesses(1, becomes_ready=False)))
    kept = await asyncio.wait_for(launcher.start(other, SleepingProcesses(1, becomes_ready=True)), 60.0)
    assert not hanging.done()
    for place in (hung, kept.place):
        await launcher.stop(place, 0.0)
    await asyncio.gather(hanging, return_exceptions=True)

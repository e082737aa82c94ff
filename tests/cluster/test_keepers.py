"""Keepers of this machine, with processes that stand in for engines."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cascadeinfer.cluster.addresses import EngineAddress
from cascadeinfer.cluster.keeper import Keeper
from cascadeinfer.cluster.keeping import EngineOrder
from cascadeinfer.cluster.local_keepers import LocalKeepers
from cascadeinfer.cluster.places import Places
from cascadeinfer.core.errors import EngineError

FAKE = Path(__file__).parent / "fake"
DEADLINE_S = 60.0
STOP_S = 30.0


@pytest.fixture
def folder() -> Iterator[Path]:
    """A fleet's; short, for the names of sockets."""
    with tempfile.TemporaryDirectory(prefix="cf") as made:
        yield Path(made)


def keepers_in(folder: Path) -> LocalKeepers:
    """A front end's view."""
    return LocalKeepers(folder, Places(["core 1", "core 2"], ["core 3"], may_share=False))


@pytest.fixture
async def keepers(folder: Path) -> AsyncIterator[LocalKeepers]:
    """Of one front end; every engine has ended afterwards."""
    made = keepers_in(folder)
    yield made
    again = keepers_in(folder)
    await made.leave()
    for instance_id in await again.find():
        again.kill(instance_id)
        await again.stop(instance_id, 0.0)
    await again.leave()


def order(behaviour: str) -> EngineOrder:
    """To start a stand-in that behaves like this."""
    path = os.pathsep.join([str(FAKE), *sys.path])
    return EngineOrder("fake_engine", behaviour.encode(), "k" * 32, {"PYTHONPATH": path})


async def start(keepers: LocalKeepers, instance_id: str, behaviour: str = "serves") -> None:
    """Start one."""
    keepers.place(instance_id)
    await keepers.start(instance_id, order(behaviour))


async def until(holds: Callable[[], bool]) -> None:
    """Wait for a fact."""
    async with asyncio.timeout(DEADLINE_S):
        while not holds():  # noqa: ASYNC110 - other processes
            await asyncio.sleep(0.01)


def number_in(keepers: LocalKeepers, instance_id: str, name: str) -> int:
    """A process id that a stand-in has written down."""
    return int((keepers.folder_of(instance_id) / name).read_text())


def is_there(segment: Path) -> bool:
    """Whether the shared memory exists."""
    return segment.exists()


def lives(pid: int) -> bool:
    """Whether a process runs."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def engine_of(worker: int) -> psutil.Process:
    """The stand-in above its worker."""
    engine = psutil.Process(worker).parent()
    assert engine is not None
    return engine


async def test_an_engine_gets_ready_and_ends(keepers: LocalKeepers) -> None:
    """Its door is told; after its stop nothing of it is left but its log."""
    await start(keepers, "0")
    assert await keepers.ready("0") == EngineAddress("127.0.0.1", 7300)
    worker, folder = number_in(keepers, "0", "worker"), keepers.folder_of("0")
    segment = Path("/dev/shm", (folder / "segment").read_text())  # noqa: S108 - where Linux has it
    assert is_there(segment)
    keeper = engine_of(worker).parent()
    assert keeper is not None
    assert folder.stat().st_mode & 0o077 == 0
    await keepers.stop("0", STOP_S)
    await until(lambda: not lives(worker) and not lives(keeper.pid))
    assert not is_there(segment)
    assert not folder.exists()
    assert keepers.log_of("0").exists()
    await keepers.stop("0", STOP_S)  # harmless


async def test_files_of_a_servers_metrics_are_not_for_engines(
    keepers: LocalKeepers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several front-end processes share them; they are removed with the server, which the engine outlives."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/no/folder")
    await start(keepers, "0")
    await keepers.ready("0")
    assert "PROMETHEUS_MULTIPROC_DIR" not in engine_of(number_in(keepers, "0", "worker")).environ()


async def test_another_front_end_finds_it(keepers: LocalKeepers, folder: Path) -> None:
    """With its place; and what dead keepers have left is removed."""
    await start(keepers, "0")
    await start(keepers, "7")
    await keepers.ready("7")
    (folder / "instances" / "3").mkdir()
    await keepers.leave()
    second = keepers_in(folder)
    assert sorted(await second.find()) == ["0", "7"]
    assert not (folder / "instances" / "3").exists()
    assert await second.ready("7") == EngineAddress("127.0.0.1", 7300)
    second.place("7")
    second.place("1")
    assert second._resources == {"7": "core 2", "1": "core 1"}
    for instance_id in ("0", "7"):
        await second.stop(instance_id, STOP_S)
    assert await second.find() == []
    await second.leave()


async def test_it_outlives_who_has_started_it(folder: Path) -> None:
    """A front end that is killed takes no engine with it."""
    script = f"""
import asyncio, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_keepers import keepers_in, start

async def main():
    keepers = keepers_in(Path({str(folder)!r}))
    await start(keepers, "0")
    await keepers.ready("0")
    print("ready", flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""
    starter = subprocess.Popen(  # noqa: ASYNC220 - killed below, which asyncio's own would await
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    )
    assert starter.stdout is not None
    with starter.stdout:
        assert await asyncio.to_thread(starter.stdout.readline) == "ready\n"
        starter.kill()
        starter.wait()
    keepers = keepers_in(folder)
    assert await keepers.find() == ["0"]
    assert lives(number_in(keepers, "0", "worker"))
    await keepers.stop("0", STOP_S)
    await keepers.leave()


async def test_a_dead_engine_is_told(keepers: LocalKeepers) -> None:
    """With the signal; its workers and its shared memory go, and it can be started again."""
    await start(keepers, "0")
    await keepers.ready("0")
    worker = number_in(keepers, "0", "worker")
    segment = Path("/dev/shm", (keepers.folder_of("0") / "segment").read_text())  # noqa: S108 - where Linux has it
    engine_of(worker).kill()
    assert await keepers.ended("0") == "its process was killed by SIGKILL"
    await until(lambda: not lives(worker) and not segment.exists())
    await keepers.stop("0", STOP_S)
    await keepers.start("0", order("serves"))
    await keepers.ready("0")


async def test_an_engine_that_quits(keepers: LocalKeepers) -> None:
    """Whoever waits for it learns how it ended, also one who asks later."""
    await start(keepers, "0", "quits")
    assert await keepers.ended("0") == "its process ended with code 3"
    assert await keepers.ended("0") == "its process ended with code 3"


async def test_a_dead_keeper_takes_its_engine_along(keepers: LocalKeepers) -> None:
    """Otherwise it would hold a device without anybody knowing."""
    await start(keepers, "0")
    await keepers.ready("0")
    worker = number_in(keepers, "0", "worker")
    keeper = engine_of(worker).parent()
    assert keeper is not None
    keeper.kill()
    assert await keepers.ended("0") == "its keeper ended"
    await until(lambda: not lives(worker))


async def test_a_start_that_fails(keepers: LocalKeepers) -> None:
    """The error has the engine's own last word, and names a log that stays."""
    await start(keepers, "0", "fails")
    with pytest.raises(EngineError, match=r"ended with code 1: ValueError: no such model \(its log: .*0\.log\)"):
        await keepers.ready("0")
    await keepers.stop("0", STOP_S)
    assert "no such model" in keepers.log_of("0").read_text()
    await keepers.start("0", order("serves"))
    await keepers.ready("0")
    assert "no such model" in keepers.log_of("0").with_suffix(".log.old").read_text()


async def test_one_that_does_not_want_to_end(keepers: LocalKeepers) -> None:
    """It is killed when its time is over."""
    await start(keepers, "0", "stays")
    await keepers.ready("0")
    worker = number_in(keepers, "0", "worker")
    await keepers.stop("0", 0.1)
    await until(lambda: not lives(worker))


@pytest.mark.parametrize("behaviour", ["hangs", "serves"])
async def test_an_end_while_it_starts(keepers: LocalKeepers, behaviour: str) -> None:
    """At any moment of the start."""
    await start(keepers, "0", behaviour)
    waiting = asyncio.ensure_future(keepers.ready("0"))
    if behaviour == "hangs":
        await until((keepers.folder_of("0") / "worker").exists)
    await keepers.stop("0", STOP_S)
    [told] = await asyncio.gather(waiting, return_exceptions=True)
    if behaviour == "hangs":
        assert isinstance(told, EngineError)
        assert "it was stopped" in str(told)
    assert not keepers.folder_of("0").exists()


async def test_a_keeper_that_is_told_by_a_signal(keepers: LocalKeepers) -> None:
    """As at the shutdown of the machine: the engine ends in good order, too."""
    await start(keepers, "0")
    await keepers.ready("0")
    worker = number_in(keepers, "0", "worker")
    keeper = engine_of(worker).parent()
    assert keeper is not None
    keeper.send_signal(signal.SIGTERM)
    assert await keepers.ended("0") == "it was stopped"
    await until(lambda: not lives(worker) and not lives(keeper.pid))


async def test_one_name_twice(keepers: LocalKeepers) -> None:
    """A second start is refused, and the first is not harmed."""
    await start(keepers, "0")
    with pytest.raises(EngineError, match="kept already"):
        await keepers.start("0", order("serves"))
    await keepers.ready("0")


async def test_listeners_that_leave_while_they_are_let_go(tmp_path: Path) -> None:
    """A front end that has read the last word closes its connection at once: the others are let go all the same."""
    keeper = Keeper(tmp_path, "fake_engine")

    class Listener:
        """Leaves with all others as soon as somebody waits for it."""

        is_closed = False

        async def drain(self) -> None:
            keeper._listeners.clear()

        def close(self) -> None:
            self.is_closed = True

    listeners: Any = [Listener() for _ in range(3)]
    keeper._listeners.update(listeners)
    await keeper._let_listeners_go()
    assert all(listener.is_closed for listener in listeners)

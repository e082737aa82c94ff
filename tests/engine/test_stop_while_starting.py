"""
SIGTERM at many moments of a start: one line, exit code 143, nothing left behind.

A moment is a condition on the server's processes or files, never a time. `START_MOMENTS=all` tries more of them.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from server_process import QUICK_SERVER

from cascadeinfer.cluster.local import free_port
from cascadeinfer.cluster.runtime_folder import sweep
from cascadeinfer.cluster.shared_memory import SHARED_MEMORY, segments_of
from conftest import QUICK_ENVIRONMENT

pytestmark = pytest.mark.engine

DEADLINE_S = 240.0
MARK = "CASCADEINFER_TEST_START"
COMMAND = (str(Path(sys.executable).parent / "cascadeinfer"),)


class Start(NamedTuple):
    """A server that is starting."""

    process: subprocess.Popen[bytes]
    base: Path
    log: Path
    mark: str

    def below(self) -> list[psutil.Process]:
        """Instances and followers: Python processes that were spawned or forked, except Python's resource tracker."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has just ended
                command = " ".join(process.cmdline())
                if any(name in command for name in ("spawn_main", "quick_server", "VLLM::")):
                    found.append(process)
        return found

    def folders(self) -> list[Path]:
        """Processes of its instances."""
        return list(self.base.glob("cascadeinfer-*/i*"))

    def listening(self) -> int:
        """Its instances whose side channel is listening."""
        return sum(
            any(c.status == psutil.CONN_LISTEN and c.laddr.port != 0 for c in p.net_connections(kind="inet"))
            for p in self.below()
        )

    def segments(self) -> set[str]:
        """Names of the shared memory segments that its processes use."""
        return {name for process in self.below() for name in segments_of(process.pid)}

    def marked(self) -> list[psutil.Process]:
        """Every process on the machine that descends from this start."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found


def catches_signals(start: Start) -> bool:
    """Our signal handler is installed, which is the first thing the command does."""
    status = Path(f"/proc/{start.process.pid}/status").read_text()
    caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


class Moment(NamedTuple):
    """A moment of a start."""

    come: Callable[[Start], object]
    program: tuple[str, ...] = QUICK_SERVER
    arguments: tuple[str, ...] = ()
    number: signal.Signals = signal.SIGTERM


MOMENTS = {
    "imports": Moment(catches_signals, COMMAND),
    "torch is imported": Moment(lambda s: "libtorch" in Path(f"/proc/{s.process.pid}/maps").read_text(), COMMAND),
    "configuration": Moment(lambda s: list(s.base.glob("cascadeinfer-*"))),
    "spawned instance": Moment(lambda s: s.below(), COMMAND),
    "instances listen": Moment(lambda s: s.listening() == 2, number=signal.SIGINT),
    "followers": Moment(lambda s: len(s.below()) == 3, arguments=("--api-servers", "2")),
}
MORE = {
    "first instance's folder": Moment(lambda s: s.folders()),
    "a forked instance": Moment(lambda s: s.below()),
    "two forked instances": Moment(lambda s: len(s.below()) == 2),
    "its sockets": Moment(lambda s: any(list(f.iterdir()) for f in s.folders())),
    "one instance listens": Moment(lambda s: s.listening()),
    "metrics": Moment(lambda s: list(s.base.glob("cascadeinfer-*/metrics")), arguments=("--api-servers", "2")),
    "first follower": Moment(lambda s: s.below(), arguments=("--api-servers", "3")),
    "two spawned instances": Moment(lambda s: len(s.below()) == 2, COMMAND),
    "spawned instances listen": Moment(lambda s: s.listening() == 2, COMMAND),
}
TRACKER = "resource_tracker"
"""
An engine that is killed in the moment in which it makes its shared memory leaves the name to Python's tracker, which
says so when it removes it.
"""
if os.environ.get("START_MOMENTS") == "all":
    MOMENTS |= MORE


@pytest.fixture
def base() -> Iterator[Path]:
    """The server's temporary folder, with a short path for its sockets."""
    with tempfile.TemporaryDirectory(prefix="st", dir="/tmp") as folder:
        yield Path(folder)


@contextlib.contextmanager
def started(tiny_model: Path, tmp_path: Path, base: Path, moment: Moment) -> Iterator[Start]:
    """A start that has reached this moment; nothing of it is left afterwards."""
    words = ["serve", str(tiny_model), "--port", str(free_port()), "--instances", "2", "--stages", "0-64:1,64-:1"]
    words += ["--dtype", "float32", "--block-size", "32", "--enforce-eager", "--num-gpu-blocks-override", "64"]
    words += ["--max-model-len", "512", "--event-log", str(tmp_path / "events"), *moment.arguments]
    mark = uuid.uuid4().hex
    environment = {**os.environ, **QUICK_ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", MARK: mark}
    environment |= {"TMPDIR": str(base), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}
    environment.pop("VLLM_RPC_BASE_PATH", None)
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen([*moment.program, *words], stdout=output, stderr=subprocess.STDOUT, env=environment)
    start = Start(process, base, log, mark)
    try:
        wait_for(lambda: moment.come(start), start)
        yield start
    finally:
        for left in start.marked():
            left.kill()
        process.wait()


@pytest.mark.parametrize("name", MOMENTS)
def test_start_is_stopped(tiny_model: Path, tmp_path: Path, base: Path, name: str) -> None:
    """
    The last line is ours, without a traceback; exit code 128 + the signal;
    no process, file or shared memory is left.
    """
    moment = MOMENTS[name]
    with started(tiny_model, tmp_path, base, moment) as start:
        segments = start.segments()
        start.process.send_signal(moment.number)
        code = start.process.wait(timeout=60)
        text = start.log.read_text()
        assert code == 128 + moment.number, text
        lines = [line for line in text.splitlines() if TRACKER not in line]
        assert lines[-1] == f"cascadeinfer: stopped by {moment.number.name} while starting", text
        assert text.count("cascadeinfer: ") == 1
        assert "Traceback" not in text, text
        psutil.wait_procs(start.marked(), timeout=10)  # the resource tracker ends by itself
        assert not start.marked()
        assert not list(base.iterdir())
        assert not [name for name in segments if (SHARED_MEMORY / name).exists()]


def test_what_a_killed_server_leaves_is_swept(tiny_model: Path, tmp_path: Path, base: Path) -> None:
    """After `kill -9` of process 0 the rest exit, shared memory is freed, and the next start removes the files."""
    with started(tiny_model, tmp_path, base, MOMENTS["followers"]) as start:
        wait_for(lambda: any(list(folder.iterdir()) for folder in start.folders()), start)
        [folder] = base.iterdir()
        assert sweep(base) == []
        segments = start.segments()
        start.process.kill()
        start.process.wait()
        psutil.wait_procs(start.marked(), timeout=DEADLINE_S)
        assert not start.marked()
        assert sweep(base) == [folder]
        assert not list(base.iterdir())
        assert not [name for name in segments if (SHARED_MEMORY / name).exists()]


def wait_for(condition: Callable[[], object], start: Start) -> None:
    """Wait until the moment has come."""
    end_s = time.monotonic() + DEADLINE_S
    while True:
        try:
            if condition():
                return
        except psutil.Error:  # one that has just ended
            assert start.process.poll() is None
        assert start.process.poll() is None, start.log.read_text()
        assert time.monotonic() < end_s, start.log.read_text()
        time.sleep(0.005)

"""Stopping a server during its start: one line, exit code 128 + signal, nothing left, at any moment. Without vLLM."""

import asyncio
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from cascadeinfer.frontend.stop_signals import StopSignals

HEAD = """
import asyncio, os, subprocess, sys, threading, time
from pathlib import Path
from cascadeinfer.frontend.stop_signals import StopSignals

left = Path(sys.argv[1])
left.touch()

def ready():
    os.write(1, b"ready\\n")

async def run(signals):
    signals.attend()
    try:
        await work(signals)
    finally:
        os.write(1, b"stopped in order\\n")

with StopSignals() as signals:
    signals.at_leave.append(left.unlink)
"""
MOMENTS = {
    "import": (
        "    ready()\n    while True:\n        try:\n            time.sleep(0.01)\n        except BaseException: pass\n"
    ),
    "child": "    subprocess.Popen(['sleep', '600'])\n    ready()\n    time.sleep(600)\n",
    "held": """    with signals.held():
        kept = left.with_name("kept")
        kept.touch()
        ready()
        time.sleep(1.0)
        signals.at_leave.append(kept.unlink)
    time.sleep(600)
""",
    "blocked loop": """
    async def work(signals):
        ready()
        time.sleep(1.0)
        await asyncio.sleep(600)
    asyncio.run(signals.until_stopped(run(signals)))
""",
    "waits": """
    async def work(signals):
        ready()
        await asyncio.sleep(600)
    asyncio.run(signals.until_stopped(run(signals)))
""",
    "blocked thread": """
    async def work(signals):
        subprocess.Popen(['sleep', '600'])
        task = asyncio.create_task(asyncio.to_thread(time.sleep, 600))
        ready()
        await task
    asyncio.run(signals.until_stopped(run(signals)))
""",
    "fails while stopped": """
    async def work(signals):
        ready()
        try:
            await asyncio.sleep(600)
        finally:
            raise RuntimeError("an engine that was killed")
    asyncio.run(signals.until_stopped(run(signals)))
""",
    "just before it serves": """
    async def work(signals):
        ready()
        time.sleep(1.0)
        signals.drain(None)
        await asyncio.sleep(600)
    asyncio.run(signals.until_stopped(run(signals)))
""",
}


def start(tmp_path: Path, moment: str) -> subprocess.Popen[str]:
    """Start a process and wait until it has reached this moment."""
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD + moment, str(tmp_path / "left")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_start_is_stopped(tmp_path: Path, moment: str, number: signal.Signals) -> None:
    """One line, the exit code, no child process left, and all cleanup done."""
    process = start(tmp_path, MOMENTS[moment])
    below = psutil.Process(process.pid).children()
    process.send_signal(number)
    out, err = process.communicate(timeout=50)
    assert process.returncode == 128 + number
    assert err == f"cascadeinfer: stopped by {number.name} while starting\n"
    assert out == ("" if "asyncio" not in MOMENTS[moment] else "stopped in order\n")
    assert not psutil.wait_procs(below, timeout=10)[1]
    assert not list(tmp_path.iterdir())


def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    """The child takes for ever to stop; a second signal kills it."""
    moment = """
    async def work(signals):
        subprocess.Popen(['sleep', '600'])
        ready()
        try:
            await asyncio.sleep(600)
        finally:
            os.write(1, b"stopping\\n")
            await asyncio.sleep(600)
    asyncio.run(signals.until_stopped(run(signals)))
"""
    process = start(tmp_path, moment)
    below = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert process.stdout.readline() == "stopping\n"
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=50)
    assert (process.returncode, out) == (143, "")
    assert err == "cascadeinfer: stopped by SIGTERM while starting\n"
    assert not psutil.wait_procs(below, timeout=10)[1]


def test_a_forked_child_ends_alone(tmp_path: Path) -> None:
    """It has its parent's signal handlers until it sets its own, but does not run its parent's cleanup."""
    moment = (
        "    child = os.fork()\n    if child:\n        os.write(1, f'{child}\\n'.encode())\n"
        "    ready() if child else None\n    time.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD + moment, str(tmp_path / "left")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    child = psutil.Process(int(process.stdout.readline()))
    while child.status() != psutil.STATUS_ZOMBIE:
        child.terminate()  # Python forgets a signal that comes while it forks
        time.sleep(0.05)
    assert process.poll() is None
    assert (tmp_path / "left").exists()
    process.terminate()
    assert process.wait(timeout=50) == 143


def test_a_serving_server_drains_then_stops() -> None:
    """
    Once there is a server, the first signal drains it and the second stops it at once; a follower stops only when told
    to.
    """
    told: list[bool] = []

    async def serve(*, second_is_at_once: bool) -> SimpleNamespace:
        server = SimpleNamespace(should_exit=False, force_exit=False)
        with StopSignals(second_is_at_once=second_is_at_once) as signals:
            signals.told.append(told.append)
            signals.attend()
            signals.drain(server)  # type: ignore[arg-type]
            for _ in range(2):
                signal.raise_signal(signal.SIGTERM)
                await asyncio.sleep(0)
                await asyncio.sleep(0)
        return server

    assert asyncio.run(serve(second_is_at_once=True)) == SimpleNamespace(should_exit=True, force_exit=True)
    assert asyncio.run(serve(second_is_at_once=False)) == SimpleNamespace(should_exit=True, force_exit=False)
    assert told == [False, True, False, False]

"""
A part of the engine tests on vLLM's V2 model runner, in a process of its own; `make test-v2` runs all of them.

A process has one model runner, so these tests need another `pytest`. If it hangs, it is ended.
"""

import os
import sys
from pathlib import Path

import psutil
import pytest
from zoo import eventually

from support.bounded_run import run_bounded

pytestmark = [pytest.mark.engine, pytest.mark.runner("V1")]

LIMIT_S = 1500.0
"""On two cores that thirty processes shared, the run took seven minutes."""
TESTS = Path(__file__).parent.parent
PARTS = {"test_v2_states", "test_moves", "test_commands", "test_tensor_parallel"}
"""Each contributes."""

STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = [sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(3600)"]
print(subprocess.Popen(child, start_new_session=True).pid, flush=True)
time.sleep(3600)
"""
"""Hangs, as does its child in another session, and neither ends when asked to."""


@pytest.mark.timeout(LIMIT_S + 300)
def test_the_part_of_ci_passes_on_v2(capsys: pytest.CaptureFixture[str]) -> None:
    """The tests marked `quick_v2` all pass, none is skipped; their counts are printed."""
    command = [sys.executable, "-m", "pytest", "-p", "support.v2_runner", "-m", "quick_v2", "--exitfirst", "--verbose"]
    path = os.pathsep.join([str(TESTS), *(entry for entry in sys.path if entry)])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    ended = run_bounded([*command, "--durations=5", str(TESTS / "engine")], LIMIT_S, environment=environment)
    lines = ended.output.splitlines()
    with capsys.disabled():
        sys.stdout.write(f"\nthe part of the tests that runs on V2: {lines[-1].strip(' =') if lines else 'nothing'}\n")
    assert ended.in_time, ended.output[-8000:]
    assert ended.code == 0, ended.output[-8000:]
    assert {"failed", "errors", "skipped", "xfailed"}.isdisjoint(pytest.RunResult.parse_summary_nouns(lines))
    assert {Path(line.partition("::")[0]).stem for line in lines if " PASSED " in line} == PARTS


async def test_a_run_that_hangs_is_ended() -> None:
    """At the limit it is asked, then killed, with a child in a session of its own; its output is kept."""
    ended = run_bounded([sys.executable, "-c", STUBBORN], 10.0, grace_s=1.0)
    assert not ended.in_time
    assert ended.code < 0
    await eventually(lambda: not _lives(int(ended.output)), "the child is gone")


def _lives(pid: int) -> bool:
    """Whether such a process runs; a dead one may wait to be reaped."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

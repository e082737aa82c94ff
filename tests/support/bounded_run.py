"""A command that is ended, with all it has started, when its time is up."""

import contextlib
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import psutil

KILLED_TIMEOUT_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Ended:
    """
    How a command ended.

    Attributes:
        code: Its exit code; negative if a signal ended it.
        in_time: Whether it ended by itself.
        output: What it wrote, errors included.
    """

    code: int
    in_time: bool
    output: str


def run_bounded(
    command: Sequence[str], limit_s: float, *, grace_s: float = 60.0, environment: Mapping[str, str] | None = None
) -> Ended:
    """
    Run a command to its end.

    Args:
        command: Program and arguments.
        limit_s: Then it gets SIGTERM.
        grace_s: Then it and its descendants, also those in sessions of their own, are killed.
        environment: All its variables; None: those of this process.
    """
    with tempfile.TemporaryFile() as output:
        process = psutil.Popen(
            list(command), stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        in_time = True
        try:
            process.wait(limit_s)
        except psutil.TimeoutExpired:
            in_time = False
            family = _end(process, grace_s)
            psutil.wait_procs(family, timeout=KILLED_TIMEOUT_S)
        finally:
            if process.is_running():  # interrupted
                _end(process, 0.0)
        output.seek(0)
        return Ended(process.wait(KILLED_TIMEOUT_S), in_time, output.read().decode(errors="replace"))


def _end(process: psutil.Popen, grace_s: float) -> list[psutil.Process]:
    """SIGTERM, then SIGKILL to everybody who is left; returns the family."""
    family = {process, *process.children(recursive=True)}
    process.terminate()
    with contextlib.suppress(psutil.TimeoutExpired):
        process.wait(grace_s)
    if process.is_running():
        family |= set(process.children(recursive=True))
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    return list(family)

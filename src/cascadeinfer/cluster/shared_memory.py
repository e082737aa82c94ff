"""
Removes the shared memory of killed processes.

vLLM's message queues live in Python shared memory, unlinked by their creator on exit; a killed process never gets
there. Python's resource tracker would, but the server and all its processes share one, and it waits for the server's
exit.
"""

import contextlib
import re
from collections.abc import Iterable
from multiprocessing.process import BaseProcess
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import psutil

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Linux keeps it
PREFIX = "psm_"
"""Of the names that Python chooses."""


def segments_of(pid: int) -> set[str]:
    """
    Names of the Python shared memory that a process and its descendants use. Empty for one that has ended, or that
    `/proc` does not show us.
    """
    names: set[str] = set()
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for user in (process, *process.children(recursive=True)):
            # Segments unknown here stay until the server exits.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                used = Path(f"/proc/{user.pid}/maps").read_text()
                names.update(re.findall(rf"{SHARED_MEMORY}/({PREFIX}\w+)", used))
    return names


class Segments:
    """The segments of one instance's processes and all their descendants."""

    def __init__(self) -> None:
        """None known yet."""
        self._names: set[str] = set()

    def remember(self, processes: Iterable[BaseProcess]) -> None:
        """Record segments while the processes live: a killed process's segments cannot be told from others."""
        for process in processes:
            if process.is_alive() and process.pid is not None:  # else its number may be another's by now
                self._names.update(segments_of(process.pid))

    def remember_all_of(self, pid: int) -> None:
        """Record the segments of a process that lives and of its descendants."""
        self._names.update(segments_of(pid))

    def remove(self) -> None:
        """Once the processes are gone: remove the remaining segments, so that the resource tracker need not."""
        for name in self._names:
            with contextlib.suppress(FileNotFoundError):
                segment = SharedMemory(name)
                segment.close()
                segment.unlink()

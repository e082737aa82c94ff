"""
The shared memory of processes that were killed.

vLLM's message queues are Python's shared memory. Whoever made it removes it at its end, which a killed process does not
come to; Python's resource tracker would, but there is one for the server and all its processes, and it waits for the
server's end.
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
    """Names of Python's shared memory that a process and those below it use. None of one that has ended, or that
    `/proc` does not show us.
    """
    names: set[str] = set()
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for user in (process, *process.children(recursive=True)):
            # What is not known here stays until the server's end.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                used = Path(f"/proc/{user.pid}/maps").read_text()
                names.update(re.findall(rf"{SHARED_MEMORY}/({PREFIX}\w+)", used))
    return names


class Segments:
    """Those of one instance's processes and of all below them."""

    def __init__(self) -> None:
        """None known yet."""
        self._names: set[str] = set()

    def remember(self, processes: Iterable[BaseProcess]) -> None:
        """While the processes live: what belonged to one that was killed cannot be told from anybody else's."""
        for process in processes:
            if process.is_alive() and process.pid is not None:  # else its number may be another's by now
                self._names.update(segments_of(process.pid))

    def remove(self) -> None:
        """Once its processes are gone: remove what is still there, so that the resource tracker need not."""
        for name in self._names:
            with contextlib.suppress(FileNotFoundError):
                segment = SharedMemory(name)
                segment.close()
                segment.unlink()

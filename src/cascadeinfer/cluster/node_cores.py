"""
Cores of one machine, shared out among processes that do not know each other: who holds the lock of a core's file has
the core. The kernel drops locks with their process, however it ends.
"""

import contextlib
import fcntl
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cascadeinfer.cluster.fleet import make_ours

logger = logging.getLogger(__name__)

FOLDER: Final = "cascadeinfer-cores-{user}"


class NodeCores:
    """The cores of this process."""

    def __init__(self, base: Path | None = None) -> None:
        """
        Args:
            base: Where the folder of locks is; by default that of temporary files.
        """
        self._folder = (base or Path(tempfile.gettempdir())) / FOLDER.format(user=os.geteuid())
        self._held: list[int] = []

    def take(self, n_cores: int, cores: Sequence[int] | None = None) -> str:
        """
        Take cores that no other process has; where there are too few, some are shared.

        Args:
            n_cores: So many.
            cores: Among these; by default all that this process may run on.

        Returns:
            Them, in vLLM's notation.
        """
        make_ours(self._folder)
        usable = sorted(os.sched_getaffinity(0)) if cores is None else list(cores)
        taken: list[int] = []
        for core in usable:
            if len(taken) == n_cores:
                break
            file = os.open(self._folder / str(core), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
                continue
            self._held.append(file)
            taken.append(core)
        if len(taken) < n_cores:
            shared = [core for core in usable if core not in taken][: n_cores - len(taken)]
            logger.warning("cores %s are shared with other instances: there are no free ones", shared)
            taken += shared
        return ",".join(str(core) for core in sorted(taken))

    def give_back(self) -> None:
        """Let go of all of them."""
        for file in self._held:
            with contextlib.suppress(OSError):
                os.close(file)
        self._held.clear()

"""
Processes of a measurement: servers and routers whose CPU time is added up, and a load generator with priority over
them.

None has a separate session. Linux first divides a core among sessions (autogroup), so a router in its own session would
get as much as a server with all its engines, and the load generator's niceness would count for nothing against either.
"""

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from cascadeinfer.loadgen.served_process import ServedProcess

CLIENT_NICENESS = -10


class Service(ServedProcess):
    """One server or router."""

    def __init__(
        self, name: str, command: Sequence[str], port: int, log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        """Describe a process to start; its output goes to `log`."""
        super().__init__(command, port=port, log=log, name=name, environment=environment, own_session=False)

    def cpu_s(self) -> float:
        """CPU time of the process tree so far, including ended children for which their parent has waited."""
        total = 0.0
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                total += sum(process.cpu_times()[:4])
        return total


def client_first() -> None:
    """
    Give this process, and those it starts from now on, priority over others, if permitted (root).

    The load generator needs little, and its waiting would count as the server's. This works only against processes of
    the same session (see above).
    """
    if os.geteuid() == 0:
        os.setpriority(os.PRIO_PROCESS, 0, CLIENT_NICENESS)

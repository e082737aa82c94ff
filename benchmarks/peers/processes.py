"""
Processes of a measurement: each started in its own process group and ended by id with everything it started; their
processor time is summed.

They do not get their own sessions: Linux divides a core by sessions first (autogroup), so a router in its own session
would get as much of it as a server with all its engines, and the load generator's niceness would count for nothing
against either.
"""

import contextlib
import http.client
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

STOP_TIMEOUT_S = 30.0
POLL_S = 0.25
HTTP_TIMEOUT_S = 5.0
CLIENT_NICENESS = -10


class FailedError(Exception):
    """A process did not start or ended by itself; the message has the end of its log."""


class Service:
    """One server or router."""

    def __init__(self, name: str, command: Sequence[str], port: int, environment: Mapping[str, str], log: Path) -> None:
        """Start the process; its output goes to `log`."""
        self.name = name
        self.port = port
        self.log = log
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                process_group=0,
            )
        self._root = psutil.Process(self._process.pid)

    @property
    def url(self) -> str:
        """Its base URL."""
        return f"http://127.0.0.1:{self.port}"

    def wait_ready(self, path: str, timeout_s: float) -> None:
        """Wait until it answers this path with 200. Raises FailedError when it ends or takes too long."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            if self._process.poll() is not None:
                raise FailedError(f"{self.name} ended with {self._process.returncode}:\n{self.tail()}")
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self._status(path) == http.HTTPStatus.OK:
                    return
            time.sleep(POLL_S)
        raise FailedError(f"{self.name} was not ready after {timeout_s:g} s:\n{self.tail()}")

    def _status(self, path: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=HTTP_TIMEOUT_S)
        with contextlib.closing(connection):
            connection.request("GET", path)
            return connection.getresponse().status

    def tail(self, n_lines: int = 15) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-n_lines:])

    def tree(self) -> list[psutil.Process]:
        """The process and everything it started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return [self._root, *self._root.children(recursive=True)]
        return []

    def cpu_s(self) -> float:
        """Processor time of the tree so far, including ended children for which their parent waited."""
        total = 0.0
        for process in self.tree():
            with contextlib.suppress(psutil.Error):
                total += sum(process.cpu_times()[:4])
        return total

    def stop(self) -> None:
        """SIGTERM to the root, then SIGKILL to whatever is left of the tree and of its group."""
        family = self.tree()
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._process.wait()


def client_first() -> None:
    """
    Give this process and those it starts from now on priority over others, where that is allowed (root).

    The load generator needs little, and its waiting would count as the server's. Works only against processes of the
    same session (see above).
    """
    if os.geteuid() == 0:
        os.setpriority(os.PRIO_PROCESS, 0, CLIENT_NICENESS)


@contextlib.contextmanager
def stopped_at_end(services: list[Service]) -> Iterator[list[Service]]:
    """Stop them all, last started first, whatever happens."""
    try:
        yield services
    finally:
        for service in reversed(services):
            service.stop()
